"""How many bytes each part of a running model takes: integer arithmetic over its config, no torch.

Weights and KV cache are exact. The workspace is an upper bound, derived from the forward as it is written in
`offload_engine.model`: each of its stages is summed over the tensors alive at its worst moment, and the largest stage
counts, since stages follow one another and free what they used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from offload_engine.model.config import ModelConfig

DeviceKind = Literal["cpu", "cuda"]

FLOAT32 = 4
INT64 = 8
SLAB_ALIGNMENT = 4096
"""Direct reads start and end on multiples of this."""
GEMM_SCRATCH_BYTES: dict[DeviceKind, int] = {"cpu": 16 * 2**20, "cuda": 32 * 2**20}
"""The matrix libraries' own buffers: up to 11 MB were measured with MKL and oneDNN on 2 threads; cuBLAS takes 8 to 32
MiB."""
GRAPH_ALIGNMENT = 512
"""What torch rounds an allocation up to."""
GRAPH_BYTES = 2**18
"""The driver's memory for a recording of some sixty kernels; an estimate."""
ATTENTION_ROWS = 32
"""As in `model.attention`."""
ROUTING_BYTES_PER_SCORE = 64
"""Per token and expert, an upper bound: logits, scores, selection, masks, and where scores tie a stable sort with its
int64 indices (37 measured with all of them tied, 21 with none)."""
SAMPLER_BYTES_PER_LOGIT = 7 * FLOAT32 + INT64
"""Per position and vocabulary entry when a token is drawn: logits, the same scaled, a sort's values and int64 indices,
probabilities, two running sums of them, and the draw's noise with room for the mask of kept entries."""


@dataclass(frozen=True, slots=True)
class Forward:
    """The size of the largest forward a plan allows for."""

    tokens: int
    """Tokens that go through the layers together."""
    positions: int
    """Positions those tokens attend to, themselves included."""
    block: int
    """Tokens whose logits are taken together."""
    choices: int
    """Routed experts per token."""
    itemsize: int
    """Bytes of one number of the compute dtype."""
    dequantise: bool = False
    """Expert weights are stored in another dtype than they are computed in."""
    prompt: int = 0
    """Tokens of a prefill that go through the layers together, `tokens` of them attending at a time; 0: no more than
    those."""
    masked: bool = False
    """Attention is to the sequence itself under a mask, rather than block by block to a prefix."""


def round_up(count: int, step: int) -> int:
    """The smallest multiple of `step` that is not less than `count`."""
    return -(-count // step) * step


def estimated_slab_bytes(config: ModelConfig, stored_itemsize: int) -> int:
    """Bytes of the slot of one routed expert, for a plan made before its store is open.

    The three matrices, rounded up to whole pages, and a page of slack at either end: where an expert starts in a
    safetensors file is arbitrary, and a direct read begins and ends on a page.
    """
    payload = 3 * config.hidden_size * config.moe_intermediate_size * stored_itemsize
    return round_up(payload, SLAB_ALIGNMENT) + 2 * SLAB_ALIGNMENT


def all_experts(config: ModelConfig) -> int:
    """Routed experts of the whole model."""
    return len(config.moe_layers) * config.num_experts


def embedding_bytes(config: ModelConfig, itemsize: int) -> int:
    """Bytes of the embedding table, or of the lm head, which has the same shape."""
    return config.vocab_size * config.hidden_size * itemsize


def shared_activation_bytes(tokens: int, hidden: int, itemsize: int) -> int:
    """Bytes of the buffer through which activations go to the CPU, where it computes some of the experts."""
    return round_up(tokens * hidden * itemsize, SLAB_ALIGNMENT)


def shared_result_bytes(outputs: int, hidden: int, itemsize: int) -> int:
    """Bytes of the buffer through which so many outputs come back, with an int64 each that says where they belong."""
    return round_up(round_up(outputs * hidden * itemsize, INT64) + outputs * INT64, SLAB_ALIGNMENT)


def resident_bytes(config: ModelConfig, itemsize: int) -> int:
    """Bytes of all weights but the embedding table, the lm head and the routed experts.

    Everything is held in the compute dtype, routers and their biases excepted, which are float32.
    """
    hidden, head_dim = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    fused = (heads + 2 * kv_heads) * head_dim
    attention = hidden * fused + heads * head_dim * hidden
    attention += (fused if config.use_qkv_bias else 0) + (hidden if config.use_bias else 0)
    attention += 2 * head_dim if config.use_qk_norm else 0
    moe_layers = len(config.moe_layers)
    dense_layers = config.num_hidden_layers - moe_layers
    numbers = hidden + config.num_hidden_layers * (attention + 2 * hidden)
    numbers += 3 * hidden * (dense_layers * config.intermediate_size + moe_layers * config.shared_intermediate_size)
    router = config.num_experts * (hidden + (1 if config.moe_router_enable_expert_bias else 0))
    return numbers * itemsize + moe_layers * router * FLOAT32


def kv_bytes_per_position(config: ModelConfig, itemsize: int) -> int:
    """Bytes one position takes in the KV caches of all layers."""
    return config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * itemsize


def workspace_bytes(config: ModelConfig, forward: Forward, device: DeviceKind) -> int:
    """Upper bound of the memory a forward needs beside weights, slots and KV cache; see the module's docstring."""
    tokens, item = forward.tokens, forward.itemsize
    stream = tokens * config.hidden_size * item  # one copy of the residual stream
    angles = tokens * config.rotary * 2 * max(item, FLOAT32)
    predictor = tokens * config.hidden_size * FLOAT32 + tokens * config.num_experts * FLOAT32
    fixed = 3 * stream + angles + predictor  # residual before and after attention, and the normed input of a half-layer
    norm = tokens * config.hidden_size * 2 * (FLOAT32 + item)  # RMSNorm of the stream: input and product in float32
    attention = _attention_bytes(config, forward, device)
    logits = forward.block * config.vocab_size * (item + SAMPLER_BYTES_PER_LOGIT)
    largest = fixed + max(norm, attention, _feed_forward_bytes(config, forward), logits)
    if forward.prompt:
        swept = max(norm, attention, _feed_forward_bytes(config, forward, swept=True))
        largest = max(largest, _prompt_bytes(config, forward) + fixed + swept)
    if device == "cuda":
        largest += largest // 4  # torch's caching allocator keeps freed blocks whose size fits no later stage
    return largest + GEMM_SCRATCH_BYTES[device]


def step_graph_bytes(config: ModelConfig, step: Forward) -> int:
    """Upper bound of what recordings of attention and router of a denoising step (`model.graphs`) take on a GPU: the
    results of every layer, the working memory that all share, torch's rounding, the matrix library's buffers on the
    stream that records, and the driver's own share.
    """
    tokens, item = step.tokens, step.itemsize
    stream = tokens * config.hidden_size * item
    kept = 2 * round_up(stream, GRAPH_ALIGNMENT) + round_up(tokens * config.num_experts * FLOAT32, GRAPH_ALIGNMENT)
    angles = 2 * round_up(tokens * config.rotary * item, GRAPH_ALIGNMENT)
    norm = tokens * config.hidden_size * 2 * (FLOAT32 + item)
    working = 3 * stream + max(norm, _attention_bytes(config, step, "cuda"))
    layers = len(config.moe_layers)
    shared = stream + working + working // 4 + GEMM_SCRATCH_BYTES["cuda"]
    return layers * (kept + angles + GRAPH_BYTES) + shared


def _prompt_bytes(config: ModelConfig, forward: Forward) -> int:
    """What a prefill in several pieces keeps of all its tokens (`offload_engine.model.prefill`)."""
    streams = config.hidden_size * (2 * forward.itemsize + FLOAT32)  # residual, its norm, the experts' sum
    # Choices and weights, twice while pieces are joined; then the choices' order, and the places of each expert.
    routed = forward.choices * (2 * (INT64 + FLOAT32) + 4 * INT64)
    angles = 2 * config.rotary * forward.itemsize
    return forward.prompt * (streams + routed + angles + 2 * INT64)


def _attention_bytes(config: ModelConfig, forward: Forward, device: DeviceKind) -> int:
    tokens, positions, item = forward.tokens, forward.positions, forward.itemsize
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    query = tokens * heads * head_dim
    one_layer = 2 * positions * kv_heads * head_dim  # keys and values
    projected = tokens * (heads + 2 * kv_heads) * head_dim * item * 2  # fused, and queries and keys once normed
    turning = query * max(5 * item, 2 * (FLOAT32 + item))  # rotary's products, or the norm's float32 copies
    mask = tokens * positions * (1 + FLOAT32) if forward.masked else 0  # bool, and the additive mask torch makes of it
    attended = one_layer * item + mask + 3 * query * item  # keys and values packed, output, output made contiguous
    if item < FLOAT32:  # scores of a few positions in one key-value head, plain, scaled in float32, and their softmax
        attended += ATTENTION_ROWS * (heads // kv_heads) * positions * 2 * (item + FLOAT32)
    if device == "cuda":
        # No fused kernel takes both a mask and shared key-value heads, so torch may fall back to its math path:
        # scores and their softmax, and keys and values repeated for every head, once plain and once scaled.
        scores = 2 * heads * tokens * positions
        repeated = 3 * positions * heads * head_dim + one_layer
        attended += (scores + repeated + 3 * query) * FLOAT32
    return projected + max(turning, attended)


def _feed_forward_bytes(config: ModelConfig, forward: Forward, *, swept: bool = False) -> int:
    """The larger of a dense layer's and a MoE layer's need; `swept`: without what is kept of all tokens."""
    tokens, item, hidden = forward.tokens, forward.itemsize, config.hidden_size
    dense = tokens * (4 * config.intermediate_size + hidden) * item
    if not config.moe_layers:
        return dense
    shared = tokens * (4 * config.shared_intermediate_size + 2 * hidden) * item
    routing = tokens * (hidden * FLOAT32 + config.num_experts * ROUTING_BYTES_PER_SCORE)
    decision = tokens * forward.choices * (4 * INT64 + 2 * FLOAT32)
    outputs = tokens * forward.choices * hidden * item
    # All tokens may choose one expert: padded as `model.moe.padded_rows` does, or packed as float32 by the CPU kernel.
    rows = round_up(tokens, 32)
    one_expert = rows * (4 * hidden + 4 * config.moe_intermediate_size) * item
    if forward.dequantise:
        matrix = hidden * config.moe_intermediate_size
        one_expert += 3 * matrix * item + matrix * (FLOAT32 + 1)  # the three, and one on its way through float32
    if swept:
        return max(dense, shared, routing, one_expert + tokens * hidden * FLOAT32)
    combine = tokens * hidden * ((forward.choices + 1) * FLOAT32 + item)
    return max(dense, shared, routing, decision + outputs + max(one_expert, combine))
