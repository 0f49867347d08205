"""How long a forward's parts take on a machine: a roofline per kernel, launch and host time beside it.

The roofline (Williams et al., CACM 52(4), 2009): a kernel takes the longer of the time to read its bytes and the time
for its operations, each at the share of the machine's peak that such kernels reach. Where memory and arithmetic don't
run at once (`Profile.overlap` below 1), part of the shorter time is added. A product of [T, in] with [in, out] takes
2 T in out operations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from offload_engine.errors import InternalError
from offload_engine.experts.scheduling.cpu_rates import HANDOVER, OWN_PART
from offload_engine.experts.scheduling.sharing import Rates
from offload_engine.simulate.forwards import ForwardRun, LayerRun
from offload_engine.simulate.profile import Profile

FLOAT32 = 4
LAUNCHES = {"attention": 12, "router": 4, "experts": 3, "shared": 4, "dense": 4, "head": 6}
"""Kernels of each part: attention with its norms, projections, rotary and cache writes; the router with its norm; the
grouped products with their sum; a SwiGLU; the final norm, the head and the choice of tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of a network that decide its bytes and operations."""

    layers: int
    moe_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    dense_width: int
    expert_width: int
    shared_width: int
    """Of all shared experts together; 0 where there are none."""
    num_experts: int
    top_k: int
    vocabulary: int
    itemsize: int = 2
    """Bytes of a resident weight."""
    expert_bytes: int
    """Of one routed expert as it is stored."""


@dataclass(frozen=True, slots=True)
class Timing:
    """A `CostModel` of one model on one machine. Forwards must be `sized`."""

    shape: ModelShape
    profile: Profile

    def kernel(self, nbytes: float, flops: float, launches: int) -> float:
        """Seconds of `launches` kernels that read `nbytes` and do `flops` together."""
        profile = self.profile
        reading = nbytes / (profile.memory_bandwidth.value * profile.memory_efficiency.value)
        computing = flops / (profile.compute.value * profile.compute_efficiency.value)
        return self.beside(self.beside(reading, computing), launches * profile.launch.value)

    def beside(self, one: float, other: float) -> float:
        """Seconds of two things that overlap as far as this machine lets them."""
        return max(one, other) + (1 - self.profile.overlap.value) * min(one, other)

    def begin(self, forward: ForwardRun) -> float:
        """See `CostModel`: the embedding's rows, and the dense layers."""
        shape, tokens = self.shape, forward.size.tokens
        rows = self.kernel(2 * tokens * shape.hidden * shape.itemsize, 0, 1)
        layer = self.attention(forward) + self._swiglu(shape.dense_width, tokens, "dense")
        return rows + (shape.layers - shape.moe_layers) * layer

    def before(self, forward: ForwardRun, run: LayerRun) -> float:  # noqa: ARG002
        """See `CostModel`: attention, router, selection, and telling the host."""
        host = self.profile.readback.value + self.profile.layer.value
        return self.attention(forward) + self.preview(forward) + host

    def preview(self, forward: ForwardRun) -> float:
        """A router on the stream as it stands, and the selection among its scores."""
        shape, tokens = self.shape, forward.size.tokens
        router = shape.hidden * shape.num_experts
        return self.kernel(router * FLOAT32, 2 * tokens * router, LAUNCHES["router"]) + self.profile.selection.value

    def experts(self, forward: ForwardRun, run: LayerRun, count: int) -> float:
        """See `CostModel`. Tokens are taken to spread evenly over the experts of the layer."""
        shape, choices = self.shape, forward.size.tokens * self.shape.top_k
        tokens = count * choices / max(len(run.experts), 1)
        flops = 2 * tokens * 3 * shape.hidden * shape.expert_width
        host = count * self.profile.expert.value
        return self.beside(self.kernel(count * shape.expert_bytes, flops, LAUNCHES["experts"]), host)

    def after(self, forward: ForwardRun, run: LayerRun) -> float:  # noqa: ARG002
        """See `CostModel`: the shared experts."""
        width = self.shape.shared_width
        return self._swiglu(width, forward.size.tokens, "shared") if width else 0.0

    def end(self, forward: ForwardRun) -> float:
        """See `CostModel`: logits of the masked positions; a prefill or commit has none. A prefill leaves the last
        layer's experts out, whose attention is counted here.
        """
        shape, masked = self.shape, forward.size.masked
        left_out = shape.moe_layers - len(forward.layers)
        unrouted = left_out * self.attention(forward)
        if not masked:
            return unrouted
        head = shape.hidden * shape.vocabulary
        logits = masked * shape.vocabulary * FLOAT32
        return unrouted + self.kernel(head * shape.itemsize + 2 * logits, 2 * masked * head, LAUNCHES["head"])

    def attention(self, forward: ForwardRun) -> float:
        """Projections, and every token's look at its positions."""
        shape, (tokens, positions, _masked) = self.shape, forward.size
        heads = shape.heads * shape.head_dim
        projections = shape.hidden * (2 * heads + 2 * shape.kv_heads * shape.head_dim)
        cache = 2 * positions * shape.kv_heads * shape.head_dim * shape.itemsize
        flops = 2 * tokens * projections + 4 * tokens * positions * heads
        return self.kernel(projections * shape.itemsize + cache, flops, LAUNCHES["attention"])

    def link_seconds(self, *, pinned: bool = True) -> float:
        """Of one expert from host memory; infinite where there is no link."""
        profile = self.profile
        if profile.link_bandwidth is None or profile.link_efficiency is None or profile.pageable_bandwidth is None:
            return math.inf
        whole = profile.link_bandwidth.value * profile.link_efficiency.value
        return self.shape.expert_bytes / (whole if pinned else min(whole, profile.pageable_bandwidth.value))

    def rates(self, forward: ForwardRun, *, pinned: bool = True) -> Rates:
        """What it takes to share misses with the CPU: its kernels read an expert's weights once, and spend on each of
        its tokens what the products come to. Only of a profile that `shares`.
        """
        profile, shape = self.profile, self.shape
        if profile.host_bandwidth is None or profile.host_compute is None or profile.link_latency is None:
            raise InternalError(f"profile {profile.name} says nothing of the CPU")
        copy = self.link_seconds(pinned=pinned)
        row = shape.hidden * shape.itemsize * copy / shape.expert_bytes
        trip = 2 * profile.link_latency.value + profile.readback.value + forward.size.tokens * row + HANDOVER
        return Rates(
            copy=copy,
            expert=shape.expert_bytes / profile.host_bandwidth.value,
            token=2 * 3 * shape.hidden * shape.expert_width / profile.host_compute.value,
            trip=trip,
            row=row,
            own=OWN_PART,
            read=self.disk_seconds(),
        )

    def disk_seconds(self) -> float:
        """Of one expert from disk."""
        return self.shape.expert_bytes / self.profile.disk_bandwidth.value

    def _swiglu(self, width: int, tokens: int, part: str) -> float:
        weights = 3 * self.shape.hidden * width
        return self.kernel(weights * self.shape.itemsize, 2 * tokens * weights, LAUNCHES[part])
