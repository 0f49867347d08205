"""The MoE block, who executes its experts, and the resident executor that every other one is held against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offload_engine import kernels
from offload_engine.core import ForwardInfo, RoutingDecision
from offload_engine.model.config import ModelConfig
from offload_engine.model.layers import SwiGLU, part
from offload_engine.model.quantized import Matrix, QuantizedMatrix, in_dtype
from offload_engine.routing.base import Route


class Weights(Protocol):
    """One expert's matrices, gate, up and down, as they are stored."""

    @property
    def kernel_expert(self) -> kernels.Expert | None:
        """The same as our kernels take it, or None where they don't."""

    def __iter__(self) -> Iterator[Matrix]: ...


class _Matrices(NamedTuple):
    gate: Matrix
    """[I, H]"""
    up: Matrix
    """[I, H]"""
    down: Matrix
    """[H, I]"""


class ExpertWeights(_Matrices):
    """One expert's matrices as they are stored, `I` the expert's width and `H` the model's."""

    @cached_property
    def kernel_expert(self) -> kernels.Expert | None:
        """The same as our kernels take it, or None; kept, since checking costs a tenth of computing."""
        matrices = [_kernel_matrix(matrix) for matrix in self]
        return kernels.Expert.of(*matrices) if kernels.fits(*matrices) else None


Decide = Callable[[], RoutingDecision]
"""Has a layer's router decide."""

Beside = Callable[[], None]
"""What a layer computes beside its routed experts, and independently of them."""


def nothing() -> None:
    """A `Beside` of a layer that has no such thing, or has it no more."""


Preview = Callable[[int], RoutingDecision]
"""How a given MoE layer would route if nothing between here and there changed the residual stream."""


class ExpertExecutor(Protocol):
    """Runs routed experts. The model calls it in this order in every forward: `begin` once, then per MoE layer
    `prepare` before attention, `route` to have it decided where its tokens go, and `run`. Nothing an executor does
    ahead of `run` may change its result.
    """

    def begin(self, info: ForwardInfo) -> None:
        """A forward starts."""

    def prepare(self, layer: int, preview: Preview) -> None:
        """`layer` is about to run its attention: the time to prefetch. `preview` may be called for this layer and
        later ones, at the cost of their router.
        """

    def route(self, layer: int, hidden: Tensor, decide: Decide) -> RoutingDecision:
        """What `decide` returns, for the `hidden` states [T, H] with which `layer` will be run next; along with that it
        may be looked up where the experts chosen are (`RoutingDecision.lookup`).
        """

    def run(self, layer: int, hidden: Tensor, decision: RoutingDecision, beside: Beside = nothing) -> Tensor:
        """The weighted sum over each token's experts, [T, H] in `hidden`'s dtype.

        The sum is accumulated in float32 over k in the decision's order, whatever order experts are computed in.
        `beside` may be called, once: by whoever would otherwise wait for experts.
        """

    def sweep(self, layer: int, hidden: Tensor, decision: RoutingDecision, rows: int) -> Tensor:
        """As `run`, for more tokens than every choice's output could be kept for: [T, H] float32.

        Experts are computed by rising index, at most `rows` tokens at a time, and the sum is accumulated in that order.
        """


class ExpertTokens(NamedTuple):
    """The tokens of a forward that chose one expert."""

    expert: int
    places: Tensor
    """[n] int64 into the flattened [T * k] decision, rising; `places // k` is the token."""


class ExpertWork(NamedTuple):
    """An expert of the layer to be run."""

    expert: int
    weights: Weights
    slot: int = -1
    """Where the weights lie, if that is in a slot of the expert cache."""


def tokens_by_expert(experts: Tensor) -> list[ExpertTokens]:
    """Group a decision's `experts` [T, k] by expert, by rising expert index; -1 left out."""
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    used, counts = flat[order].unique_consecutive(return_counts=True)
    places = order.split(counts.tolist())
    return [ExpertTokens(expert, rows) for expert, rows in zip(used.tolist(), places, strict=True) if expert >= 0]


def padded_rows(rows: int, dtype: torch.dtype) -> int:
    """Rows a product is computed with: oneDNN builds a primitive per new shape, so 16-bit ones keep to few sizes."""
    if dtype == torch.float32:
        return rows
    step = 4 if rows <= 32 else 32
    return -(-rows // step) * step


def expert_ffn(hidden: Tensor, weights: Weights) -> Tensor:
    """One expert on its tokens: down(silu(gate(x)) * up(x)), [n, H] -> [n, H], in `hidden`'s dtype.

    In bf16 on the CPU by our kernel, if it is there, from whatever the weights are stored as; otherwise by torch, with
    weights of another kind converted, or dequantised, here.
    """
    expert = _for_kernel(hidden, weights)
    if expert is not None:
        return kernels.one_expert_ffn(hidden, expert)
    rows = hidden.shape[0]
    missing = padded_rows(rows, hidden.dtype) - rows
    if missing:
        hidden = F.pad(hidden, (0, 0, 0, missing))
    gate, up, down = (in_dtype(matrix, hidden.dtype) for matrix in weights)
    return F.linear(F.silu(F.linear(hidden, gate)) * F.linear(hidden, up), down)[:rows]


def _for_kernel(hidden: Tensor, weights: Weights) -> kernels.Expert | None:
    """The expert as our kernels take it, if they are to compute it on `hidden`: in bf16, and on the CPU."""
    if hidden.dtype != torch.bfloat16 or not hidden.is_cpu:
        return None
    expert = weights.kernel_expert
    return expert if expert is not None and kernels.serves(hidden, expert) else None


def _kernel_matrix(matrix: Matrix) -> kernels.Matrix:
    if isinstance(matrix, QuantizedMatrix):
        return kernels.Matrix(matrix.values, matrix.scales)
    return kernels.Matrix(matrix)


class LayerOutputs(Protocol):
    """Outputs of the experts of one layer, kept apart by token and choice until all are there.

    Every executor sums through one, over k in the decision's order, so that the order of computation can't show.
    """

    def compute(self, work: Sequence[ExpertWork]) -> None:
        """Run some of the experts, each on the tokens that chose it."""

    def put(self, places: Tensor, rows: Tensor) -> None:
        """Take outputs [n, H] that were computed elsewhere; `places` [n] int64 as those of `ExpertTokens`."""

    def combine(self) -> Tensor:
        """The weighted sum [T, H]: accumulated in float32, then cast (REFERENCE §1). Once all have been computed."""


class ExpertOutputs:
    """`LayerOutputs` by torch, or on the CPU by our kernels."""

    def __init__(self, hidden: Tensor, decision: RoutingDecision, known: Tensor | None = None) -> None:
        """`known`: the decision's experts [T, k] on the host, if it has them: then nobody waits for a device."""
        self.hidden = hidden.contiguous()
        self.chosen = decision.experts.contiguous()
        self.known = self.chosen if known is None else known
        self.weights = decision.weights.contiguous()
        self.fused = hidden.dtype == torch.bfloat16 and not torch.is_grad_enabled() and kernels.serves(hidden)
        """Our kernels sum, and compute what they can. Places of no expert then stay unwritten, and are not read."""
        rows = self.chosen.numel(), hidden.shape[1]
        self.outputs = hidden.new_empty(rows) if self.fused else hidden.new_zeros(rows)

    @cached_property
    def places(self) -> dict[int, Tensor]:
        """By expert, where its outputs go: `ExpertTokens.places`."""
        groups = tokens_by_expert(self.known)
        if not groups:
            return {}
        joined = torch.cat([group.places for group in groups]).to(self.hidden.device, non_blocking=True)
        places = joined.split([len(group.places) for group in groups])
        return {group.expert: part for group, part in zip(groups, places, strict=True)}

    def compute(self, work: Sequence[ExpertWork]) -> None:
        """See `LayerOutputs`."""
        if self.fused:
            experts = [one.weights.kernel_expert for one in work]
            fitting = [expert for expert in experts if expert is not None]
            if len(fitting) == len(work) and kernels.serves(self.hidden, *fitting):
                numbers = [one.expert for one in work]
                kernels.experts_ffn(self.hidden, self.chosen, numbers, fitting, self.outputs)
                return
        choices = self.chosen.shape[1]
        for expert, weights, _slot in work:
            places = self.places[expert]
            rows = self.hidden.index_select(0, places.div(choices, rounding_mode="floor"))
            self.outputs.index_copy_(0, places, expert_ffn(rows, weights))

    def put(self, places: Tensor, rows: Tensor) -> None:
        """See `LayerOutputs`."""
        self.outputs.index_copy_(0, places, rows)

    def combine(self) -> Tensor:
        """See `LayerOutputs`."""
        per_choice = self.outputs.view(*self.chosen.shape, -1)
        if self.fused:
            return kernels.weighted_sum(per_choice, self.chosen, self.weights)
        summed = per_choice.to(torch.float32, copy=True).mul_(self.weights.unsqueeze(-1)).sum(dim=1)
        return summed.to(self.hidden.dtype)


class ExpertSum:
    """The weighted sum [T, H] float32 of one layer, to which experts are added one after the other.

    Needs no memory per choice, but its rounding depends on the order: every executor adds by rising expert index.
    """

    def __init__(self, hidden: Tensor, decision: RoutingDecision, rows: int) -> None:
        """At most `rows` tokens are computed at a time."""
        self.hidden = hidden
        self.weights = decision.weights.flatten()
        self.choices = decision.experts.shape[1]
        self.rows = rows
        self.sum = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)

    def compute(self, tokens: ExpertTokens, work: Sequence[ExpertWork]) -> None:
        """As `add`, of an expert that is the only one of a launch."""
        self.add(tokens, work[0].weights)

    def add(self, tokens: ExpertTokens, weights: Weights) -> None:
        """Run one expert on its tokens."""
        for places in tokens.places.split(self.rows):
            rows = places.div(self.choices, rounding_mode="floor")
            out = expert_ffn(self.hidden.index_select(0, rows), weights).float()
            self.sum.index_add_(0, rows, out.mul_(self.weights[places].unsqueeze(-1)))


class ResidentExperts:
    """Runs experts whose weights are all in memory: the oracle of every offloaded run."""

    def __init__(self, weights: Callable[[int, int], Weights]) -> None:
        """`weights(layer, expert)` gives an expert's matrices."""
        self.weights = weights

    def begin(self, info: ForwardInfo) -> None:
        """Nothing to do."""

    def prepare(self, layer: int, preview: Preview) -> None:
        """Nothing to do: everything is here."""

    def route(self, layer: int, hidden: Tensor, decide: Decide) -> RoutingDecision:  # noqa: ARG002
        """See `ExpertExecutor`: there is nothing to look up."""
        return decide()

    def run(self, layer: int, hidden: Tensor, decision: RoutingDecision, beside: Beside = nothing) -> Tensor:  # noqa: ARG002
        """See `ExpertExecutor`: there is nothing to wait for."""
        outputs = ExpertOutputs(hidden, decision)
        used = decision.experts.unique().tolist()
        outputs.compute([ExpertWork(expert, self.weights(layer, expert)) for expert in used if expert >= 0])
        return outputs.combine()

    def sweep(self, layer: int, hidden: Tensor, decision: RoutingDecision, rows: int) -> Tensor:
        """See `ExpertExecutor`."""
        total = ExpertSum(hidden, decision, rows)
        for tokens in tokens_by_expert(decision.experts):
            total.add(tokens, self.weights(layer, tokens.expert))
        return total.sum


class Router(nn.Module):
    """The gate: float32 logits over a layer's experts, and the frozen bias used for selection (REFERENCE §1)."""

    weight: Tensor = part()

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.expert_bias: Tensor | None
        bias = torch.zeros(config.num_experts) if config.moe_router_enable_expert_bias else None
        self.register_buffer("expert_bias", bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[T, H] -> logits [T, E] float32."""
        if kernels.serves_router(hidden, self.weight):
            return kernels.router_logits(hidden, self.weight)
        return F.linear(hidden.float(), self.weight.float())


class MoEBlock(nn.Module):
    """Routed experts plus the shared ones. It owns the router; the routed experts' weights live with the executor."""

    gate: Router = part()

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.gate = Router(config)
        shared = config.shared_intermediate_size
        self.shared_experts = SwiGLU(config.hidden_size, shared) if shared else None

    def forward(self, hidden: Tensor, block_ids: Tensor, policy: Route, experts: ExpertExecutor) -> Tensor:
        """[.., H] -> [.., H]; `block_ids` [T] with T the product of the leading dimensions."""
        return self.routed(hidden, self.gate(hidden.flatten(0, -2)), block_ids, policy, experts)

    def routed(
        self, hidden: Tensor, logits: Tensor, block_ids: Tensor, policy: Route, experts: ExpertExecutor
    ) -> Tensor:
        """As `forward`, once the router has spoken: `logits` [T, E]."""
        flat = hidden.dim() == 2  # as where experts are offloaded; reshaping what has its shape takes as long as a norm
        rows = hidden if flat else hidden.flatten(0, -2)
        decision = experts.route(self.layer, rows, partial(self.decide, logits, block_ids, policy))
        shared: list[Tensor] = []
        out = experts.run(self.layer, rows, decision, partial(self._share, hidden, shared))
        # in shape before the sum: the residual stream is added to it in place, which FSDP does not survive on a view
        return self.with_shared(out if flat else out.view_as(hidden), hidden, *shared)

    def _share(self, hidden: Tensor, shared: list[Tensor]) -> None:
        if self.shared_experts is not None:
            shared.append(self.shared(hidden))

    def shared(self, hidden: Tensor) -> Tensor:
        """The shared experts' output, [.., H] as `hidden`. There are some."""
        assert self.shared_experts is not None
        out: Tensor = self.shared_experts(hidden)
        return out

    def with_shared(self, routed: Tensor, hidden: Tensor, shared: Tensor | None = None) -> Tensor:
        """The routed experts' output and the shared ones' of `hidden`, both [.., H], together. `shared` is the latter,
        where it has been computed; it is overwritten.
        """
        if self.shared_experts is None:
            return routed
        return (self.shared(hidden) if shared is None else shared).add_(routed)

    def route(self, hidden: Tensor, block_ids: Tensor, policy: Route) -> RoutingDecision:
        """Where `hidden` [.., H], normed, goes."""
        return self.decide(self.gate(hidden.flatten(0, -2)), block_ids, policy)

    def decide(self, logits: Tensor, block_ids: Tensor, policy: Route) -> RoutingDecision:
        """Where tokens with these `logits` [T, E] go."""
        return policy(logits, self.gate.expert_bias, block_ids)
