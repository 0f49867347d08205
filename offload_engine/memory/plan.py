"""The memory plan: what it is made for, its numbers, and how it prints."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

from offload_engine.config import format_bytes
from offload_engine.memory.footprint import DeviceKind, round_up

MIN_BLOCK = 32
"""A plan allows for blocks of at least this many tokens, LLaDA2's own."""
RUNTIME_BYTES: dict[DeviceKind, int] = {"cpu": 400_000_000, "cuda": 600_000_000}
"""What the process takes before any of the model, where the caller has not measured it. CPU: Python, torch and this
package (245 MB measured), and the tokenizer. CUDA: driver context, kernels and library handles; an estimate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Everything but budgets and the context that decides how much memory a run of a model takes."""

    device: DeviceKind
    """Where the layers run. On "cpu" fast memory is RAM; on "cuda" it is VRAM, and RAM is the host tier."""
    itemsize: int = 2
    """Bytes of one number of the compute dtype."""
    stored_itemsize: int = 2
    """Bytes of one stored expert weight."""
    slab_bytes: int | None = None
    """Bytes of one expert slot as its store has it; None: `estimated_slab_bytes`."""
    max_block: int = MIN_BLOCK
    """Longest block in tokens that will be decoded."""
    prefill_chunk: int = 512
    """Prompt tokens that attend together."""
    sequences: int = 1
    """Sequences decoded together, each with a KV cache for the whole context."""
    fused_commit: bool = True
    """The first denoising step of a block commits the block before it in the same forward."""
    choices: int | None = None
    """Routed experts per token; None: the model's own number."""
    runtime_bytes: int | None = None
    """What the process (cpu) or the driver and its libraries (cuda) already take; None: `RUNTIME_BYTES`."""
    transfers_in_flight: int = 2
    """Bounce buffers between disk and device; only "cuda" needs them."""
    shared_tokens: int = 0
    """Tokens of the largest forward of whose experts the CPU may compute some, beside a device; 0: it never does."""
    step_graphs: bool = False
    """Attention and routers of denoising steps are replayed from recordings, which have memory of their own."""

    @property
    def block(self) -> int:
        """Tokens of the longest block a plan allows for."""
        return max(self.max_block, MIN_BLOCK)

    @property
    def chunk(self) -> int:
        """`prefill_chunk` in whole blocks, at least one."""
        return round_up(self.prefill_chunk, self.block)

    @property
    def step_tokens(self) -> int:
        """Tokens of the largest denoising step: a block of every sequence, and the finished one before it."""
        return self.sequences * self.block * (2 if self.fused_commit else 1)


PROMPTS_TOGETHER: Final = 2048
"""Tokens of several prompts that may go through the layers together, though the context of each is less."""


def prompt_tokens(context: int, sequences: int) -> int:
    """Tokens that go through a prefill's layers together, at most: one long prompt, or the prompts of a batch, so that
    each layer's experts are read once for all of them.
    """
    return max(context, min(sequences * context, PROMPTS_TOGETHER))


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """A division of the fast memory, in bytes unless said otherwise; `total` is the planned peak."""

    device: DeviceKind
    budget: int
    weights: int
    """All weights but the routed experts; on "cuda" without an embedding table of its own, which stays on the host."""
    kv_cache: int
    workspace: int
    """Upper bound of what a forward of `forward_tokens` needs beside everything else. Unlike all other parts it isn't
    taken before it is needed: a run with prompts shorter than `forward_tokens` stays below the planned peak by some of
    it, and so does one that draws no tokens from a large vocabulary (temperature 0)."""
    staging: int
    """Embedding rows, and outputs of experts that the CPU computes, on their way to the device; 0 on "cpu". Experts
    land in their slots directly."""
    runtime: int
    slab_bytes: int
    slots: int
    """Number of expert slots."""
    all_experts: int
    """Number of routed experts in the model: more slots would lie idle."""
    moe_layers: int
    context: int
    """Positions a sequence may have."""
    kv_positions: int
    """`context` rounded up to whole blocks: what each sequence's KV cache is allocated for."""
    sequences: int
    """Sequences that have a KV cache."""
    forward_tokens: int
    """Tokens of the largest forward allowed for; a prefill may have more, of which this many attend together."""
    host_embedding: int
    host_staging: int
    host_slots: int
    """Number of slots of the host tier."""
    host_budget: int | None
    """None where there is no host tier."""
    reasons: dict[str, str]
    """How the number of each row of the table came about."""
    warnings: tuple[str, ...] = ()

    @property
    def expert_slots(self) -> int:
        """Bytes of all slots."""
        return self.slots * self.slab_bytes

    @property
    def fixed(self) -> int:
        """Everything but the slots."""
        return self.weights + self.kv_cache + self.workspace + self.staging + self.runtime

    @property
    def total(self) -> int:
        """The planned peak of fast memory."""
        return self.fixed + self.expert_slots

    @property
    def spare(self) -> int:
        """What the plan leaves of the budget; negative only in a refusal's table."""
        return self.budget - self.total

    @property
    def slots_per_layer(self) -> float:
        """Slots per MoE layer; 0 for a model without any."""
        return self.slots / self.moe_layers if self.moe_layers else 0.0

    @property
    def host_total(self) -> int:
        """What the plan puts in host memory, the process itself left out; 0 on "cpu"."""
        return self.host_embedding + self.host_staging + self.host_slots * self.slab_bytes

    def as_dict(self) -> dict[str, int | float | str | list[str] | None]:
        """All numbers by name, for reports."""
        names = [field.name for field in fields(self) if field.name not in ("reasons", "warnings")]
        derived = ("expert_slots", "total", "spare", "slots_per_layer", "host_total")
        return {name: getattr(self, name) for name in (*names, *derived)} | {"warnings": list(self.warnings)}

    def table(self) -> str:
        """Aligned plain text: part, size, how it came about."""
        fast = [("weights", self.weights), ("KV cache", self.kv_cache), ("workspace", self.workspace)]
        fast += [("staging", self.staging)] if self.device == "cuda" else []
        fast += [("runtime", self.runtime), ("expert slots", self.expert_slots)]
        left = ("spare", self.spare) if self.spare >= 0 else ("short by", -self.spare)
        sums = [("total", self.total), ("budget", self.budget), left]
        host: list[tuple[str, int]] = []
        if self.device == "cuda":
            host = [("embedding table", self.host_embedding), ("bounce buffers", self.host_staging)]
            host += [("host slots", self.host_slots * self.slab_bytes), ("host total", self.host_total)]
            host += [("host budget", self.host_budget)] if self.host_budget is not None else []
        title = "fast memory (VRAM)" if self.device == "cuda" else "memory (RAM)"
        return _aligned(title, [fast, sums, host], self.reasons, self.warnings)


def _aligned(
    title: str, groups: list[list[tuple[str, int]]], reasons: dict[str, str], warnings: tuple[str, ...]
) -> str:
    """Rows of name, size and reason in columns, a rule between groups, warnings below."""
    groups = [group for group in groups if group]
    rows = [row for group in groups for row in group]
    wide = max(len(title), *(len(name) for name, _ in rows))
    sizes = max(len(format_bytes(size)) for _, size in rows)
    lines = [title]
    for group in groups:
        rule = [] if group is groups[0] else ["-" * (wide + sizes + 2)]
        lines += rule + [
            f"{name:<{wide}}  {format_bytes(size):>{sizes}}  {reasons.get(name, '')}".rstrip() for name, size in group
        ]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in warnings)])
