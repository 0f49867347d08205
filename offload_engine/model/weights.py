"""From a checkpoint to the resident network, and to where each routed expert's matrices lie (names: REFERENCE §1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from offload_engine.core import ExpertKey
from offload_engine.errors import CheckpointError, MemoryBudgetError
from offload_engine.model.checkpoint import Checkpoint
from offload_engine.model.config import ModelConfig
from offload_engine.model.llada2 import LLaDA2Model
from offload_engine.model.safetensors_header import TensorInfo
from offload_engine.pages import huge_pages

__all__ = [
    "Checkpoint",
    "ExpertSpans",
    "FileSpan",
    "TensorInfo",
    "all_expert_spans",
    "expert_spans",
    "load_resident",
    "resident_infos",
    "resident_nbytes",
    "resident_shapes",
    "unexpected_tensors",
]

LINE = 64
"""Bytes of a cache line, at which tensors begin."""

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What the weights of a checkpoint may be stored as."""
EMBEDDING, HEAD = "model.word_embeddings.weight", "lm_head.weight"
MATRICES = ("gate_proj", "up_proj", "down_proj")


def resident_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor but the routed experts', by published name."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        shapes |= {prefix + "attention." + name: shape for name, shape in _attention_shapes(config).items()}
        shapes |= {prefix + "mlp." + name: shape for name, shape in _mlp_shapes(config, layer).items()}
    return shapes


def _attention_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    queries = config.num_attention_heads * config.head_dim
    fused = queries + 2 * config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "query_key_value.weight": (fused, config.hidden_size),
        "dense.weight": (config.hidden_size, queries),
    }
    if config.use_qkv_bias:
        shapes["query_key_value.bias"] = (fused,)
    if config.use_bias:
        shapes["dense.bias"] = (config.hidden_size,)
    if config.use_qk_norm:
        shapes["query_layernorm.weight"] = shapes["key_layernorm.weight"] = (config.head_dim,)
    return shapes


def _mlp_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    hidden, shared = config.hidden_size, config.shared_intermediate_size
    if layer not in config.moe_layers:
        return _swiglu_shapes("", hidden, config.intermediate_size)
    shapes: dict[str, tuple[int, ...]] = {"gate.weight": (config.num_experts, hidden)}
    if config.moe_router_enable_expert_bias:
        shapes["gate.expert_bias"] = (config.num_experts,)
    if shared:
        shapes |= _swiglu_shapes("shared_experts.", hidden, shared)
    return shapes


def _swiglu_shapes(prefix: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        prefix + "gate_proj.weight": (width, hidden),
        prefix + "up_proj.weight": (width, hidden),
        prefix + "down_proj.weight": (hidden, width),
    }


def resident_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """What a resident tensor is held in: routers stay float32 (`router_dtype`), all else is `dtype`."""
    return torch.float32 if name.endswith((".mlp.gate.weight", ".mlp.gate.expert_bias")) else dtype


def resident_nbytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes that `load_resident` allocates for the model it returns."""
    shapes = resident_shapes(config)
    return sum(torch.Size(shape).numel() * resident_dtype(name, dtype).itemsize for name, shape in shapes.items())


def resident_infos(config: ModelConfig, checkpoint: Checkpoint) -> list[TensorInfo]:
    """Where every tensor but the routed experts' lies. Raises `CheckpointError` as `load_resident` does."""
    shapes = resident_shapes(config)
    missing = [name for name in shapes if name not in checkpoint.tensors]
    if missing:
        raise _missing(checkpoint, missing)
    return [_checked(checkpoint, name, shape) for name, shape in shapes.items()]


def load_resident(
    config: ModelConfig,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> LLaDA2Model:
    """The network without its routed experts, in evaluation mode and without gradients.

    Weights are cast to `dtype`, but for the routers (`resident_dtype`). Peak memory is the model plus 24 MiB.
    On another device than the CPU, the embedding table stays on the host unless it is the lm head as well; what stays
    on the host lies in one piece, in huge pages. `progress(done, total)` is called as they come, in bytes of the
    checkpoint. Raises `CheckpointError` before the first read when a tensor is missing, of another shape, or not stored
    in bf16, fp16 or fp32, and `MemoryBudgetError` if the system refuses the memory.
    """
    infos = resident_infos(config, checkpoint)
    hosted = set() if config.tie_word_embeddings else {EMBEDDING}
    if torch.device(device).type == "cpu":
        hosted = {info.name for info in infos}
    host = _Shelf([(info.shape, resident_dtype(info.name, dtype)) for info in infos if info.name in hosted])
    state: dict[str, Tensor] = {}
    for info in infos:
        held = resident_dtype(info.name, dtype)
        if info.name in hosted:
            state[info.name] = host.take(info.shape, held)
        else:
            state[info.name] = torch.empty(info.shape, dtype=held, device=device)
    checkpoint.read_into(state, progress)
    if config.tie_word_embeddings:
        state[HEAD] = state[EMBEDDING]
    with torch.device("meta"), _Uninitialised():
        model = LLaDA2Model(config).requires_grad_(False).eval()
    model.load_state_dict(state, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.word_embeddings.weight  # assignment has made them two parameters
    return model


class _Shelf:
    """Room for tensors on the host, side by side in huge pages: by itself a tensor could not fill those at its ends."""

    def __init__(self, wanted: Collection[tuple[Sequence[int], torch.dtype]]) -> None:
        """For these shapes and dtypes, to be taken in any order. Raises `MemoryBudgetError`."""
        nbytes = sum(map(self._bytes, wanted))
        try:
            self._memory = torch.frombuffer(huge_pages(nbytes), dtype=torch.uint8) if nbytes else torch.empty(0)
        except (OSError, OverflowError) as error:
            raise MemoryBudgetError(
                f"the system refused {nbytes} bytes for the dense weights ({error}); end other programs"
            ) from None
        self._used = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """One of them."""
        first = self._used
        self._used += self._bytes((shape, dtype))
        return self._memory[first : first + math.prod(shape) * dtype.itemsize].view(dtype).view(tuple(shape))

    @staticmethod
    def _bytes(one: tuple[Sequence[int], torch.dtype]) -> int:
        """That it takes up, in whole cache lines."""
        shape, dtype = one
        return -(-math.prod(shape) * dtype.itemsize // LINE) * LINE


class _Uninitialised(TorchFunctionMode):
    """Modules made under it keep their parameters as allocated: `torch.nn.init` does nothing.

    Drawing initial values on the meta device has torch import sympy, which takes 75 MB and half a second.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":  # getters of properties have none
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _missing(checkpoint: Checkpoint, names: Sequence[str]) -> CheckpointError:
    others = f" and {len(names) - 1} more are" if len(names) > 1 else " is"
    return CheckpointError(
        f"{checkpoint.directory}: tensor {names[0]!r}{others} missing, wanted by config.json; "
        "download the checkpoint again, or mend its config.json"
    )


def _checked(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> TensorInfo:
    """The tensor of that name; raises `CheckpointError` unless it has this shape and a dtype we compute with."""
    info = checkpoint.tensors.get(name)
    if info is None:
        raise _missing(checkpoint, [name])
    if info.shape != shape:
        raise CheckpointError(
            f"{info.path}: tensor {name!r} has shape {list(info.shape)}, wanted {list(shape)} by config.json"
        )
    if info.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"{info.path}: tensor {name!r} is stored as {_plain(info.dtype)}, "
            f"wanted {', '.join(_plain(dtype) for dtype in FLOAT_DTYPES)}"
        )
    return info


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class FileSpan(NamedTuple):
    """A run of bytes in a file."""

    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ExpertSpans:
    """Where one routed expert's matrices lie: gate and up [intermediate, hidden], down [hidden, intermediate]."""

    gate: FileSpan
    up: FileSpan
    down: FileSpan
    dtype: torch.dtype
    intermediate: int
    hidden: int


def expert_spans(config: ModelConfig, checkpoint: Checkpoint, layer: int, expert: int) -> ExpertSpans:
    """Find one expert in either published layout: a tensor per matrix, or one per layer with an expert's row in each.

    Raises `CheckpointError` when a matrix is missing, of another shape, or the three differ in dtype.
    """
    hidden, width = config.hidden_size, config.moe_intermediate_size
    shapes = ((width, hidden), (width, hidden), (hidden, width))
    if merged_name(layer, MATRICES[0]) in checkpoint.tensors:
        stacks = [
            _checked(checkpoint, merged_name(layer, which), (config.num_experts, *shape))
            for which, shape in zip(MATRICES, shapes, strict=True)
        ]
        infos = [_row(stack, expert) for stack in stacks]
    else:
        infos = [
            _checked(checkpoint, split_name(layer, expert, which), shape)
            for which, shape in zip(MATRICES, shapes, strict=True)
        ]
    for info in infos[1:]:
        if info.dtype != infos[0].dtype:
            raise CheckpointError(
                f"{info.path}: tensor {info.name!r} is stored as {_plain(info.dtype)}, "
                f"wanted {_plain(infos[0].dtype)} as {infos[0].name!r}"
            )
    gate, up, down = (FileSpan(info.path, info.offset, info.nbytes) for info in infos)
    return ExpertSpans(gate, up, down, infos[0].dtype, width, hidden)


def _row(stack: TensorInfo, index: int) -> TensorInfo:
    nbytes = stack.nbytes // stack.shape[0]
    return stack._replace(shape=stack.shape[1:], offset=stack.offset + index * nbytes, nbytes=nbytes)


def split_name(layer: int, expert: int, which: str) -> str:
    """One expert's matrix in the published layout; `which` is one of `MATRICES`."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{which}.weight"


def merged_name(layer: int, which: str) -> str:
    """All experts' matrices of one kind in the merged layout."""
    return f"model.layers.{layer}.mlp.experts.{which}"


def expert_keys(config: ModelConfig) -> Iterator[ExpertKey]:
    """Every routed expert of the model, in the order of its layers."""
    return (ExpertKey(layer, expert) for layer in config.moe_layers for expert in range(config.num_experts))


def all_expert_spans(config: ModelConfig, checkpoint: Checkpoint) -> dict[ExpertKey, ExpertSpans]:
    """`expert_spans` of every routed expert; complete, or `CheckpointError`."""
    return {key: expert_spans(config, checkpoint, *key) for key in expert_keys(config)}


def unexpected_tensors(config: ModelConfig, checkpoint: Checkpoint) -> list[str]:
    """Names of tensors that this config has no use for, sorted; they are ignored."""
    expected = set(resident_shapes(config))
    for layer in config.moe_layers:
        expected.update(merged_name(layer, which) for which in MATRICES)
    expected.update(split_name(*key, which) for key in expert_keys(config) for which in MATRICES)
    return sorted(checkpoint.tensors.keys() - expected)
