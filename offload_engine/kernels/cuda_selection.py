"""Routing on a CUDA device in one launch, with a look-up of where the chosen experts lie: checks and calls.

Given the same scores, the decisions are those of `routing.Coreset` and `routing.TopK` on the CPU, bit for bit
(cuda/select.cu says how). Nothing here waits for the device but `count_blocks`, the first time it is shown a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from offload_engine.kernels.cuda import CudaLibrary, SelectionCall, status
from offload_engine.kernels.selection import Router

MOST_EXPERTS, MOST_GROUPS = 512, 64
"""What there is room for (cuda/select.cu)."""

_counted = WeakTensorKeyDictionary()
"""How many blocks tensors of block ids name that are still in use."""

ABSENT, UNUSED = -1, -2
"""In place of a slot: the expert is in none, or no token wants it."""


@dataclass(frozen=True, slots=True)
class SelectionRule:
    """The numbers of `routing.Coreset`, or of `routing.TopK`."""

    k: int
    router: Router
    top_p: float | None = None
    """None: tokens are not confined to a coreset."""
    min_experts: int = 0

    def fits(self, experts: int) -> bool:
        """Whether the kernel has room for a layer of so many experts."""
        groups = self.router.n_group
        return (
            0 < experts <= MOST_EXPERTS
            and 0 < groups <= MOST_GROUPS
            and experts % groups == 0
            and self.router.topk_group > 0
            and self.k > 0
        )


class SlotTable:
    """On the device, where the experts of a layer lie. To be used on one stream at a time."""

    def __init__(self, experts: int, device: torch.device) -> None:
        self.slots = torch.full((experts,), ABSENT, dtype=torch.int32, device=device)
        """[E] int32: each expert's slot or ABSENT."""
        self.finished = torch.zeros(1, dtype=torch.int32, device=device)
        """The kernel's own count of thread blocks, 0 between launches."""

    @staticmethod
    def over(slots: Tensor, finished: Tensor) -> SlotTable:
        """Of `slots` that are kept up to date elsewhere; `finished` is 0, and may serve several tables."""
        table = SlotTable.__new__(SlotTable)
        table.slots, table.finished = slots, finished
        return table


_shown: ContextVar[SlotTable | None] = ContextVar("_shown", default=None)


@contextmanager
def looking_up(table: SlotTable) -> Iterator[None]:
    """While open, what this thread has decided by the kernel is looked up in `table` too, if that has its size."""
    token = _shown.set(table)
    try:
        yield
    finally:
        _shown.reset(token)


class Lookup(NamedTuple):
    """What a `SlotTable` said of the experts used."""

    slots: Tensor
    """[E] int32: the expert's slot, or ABSENT; UNUSED where no token wants it."""
    missing: Tensor
    """[E + 1] int32: how many of those used are ABSENT, then who, by falling score summed over the blocks, then -1."""
    scores: Tensor
    """[E] float32: the sums of these, then 0."""


class Routed(NamedTuple):
    """A decision, as in `RoutingDecision`, and what it was made of."""

    experts: Tensor
    weights: Tensor
    coreset: Tensor | None
    block_scores: Tensor
    used: Tensor
    """[B, E] bool: some token of the block chose it."""
    scores: Tensor
    """[T, E] float32; made of logits, only where tokens are no pads. So are the next."""
    selection: Tensor
    lookup: Lookup | None


def library_for(device: torch.device) -> CudaLibrary | None:
    """What selects experts on `device`; None: torch."""
    return status(device.index or 0).library if device.type == "cuda" else None


def count_blocks(block_ids: Tensor) -> int:
    """One more than the largest of `block_ids`, at least 1; remembered, since all layers of a forward ask."""
    if block_ids not in _counted:
        _counted[block_ids] = max(int(block_ids.max()), 0) + 1 if block_ids.numel() else 1
    return int(_counted[block_ids])


def decide(rule: SelectionRule, logits: Tensor, bias: Tensor | None, block_ids: Tensor) -> Routed | None:
    """As a `RoutingPolicy`, by the kernel; None where there is none, it doesn't serve these or a gradient is wanted."""
    library = library_for(logits.device)
    if library is None or not rule.fits(logits.shape[1]) or logits.dtype != torch.float32:
        return None
    if (bias is not None and bias.dtype != torch.float32) or (torch.is_grad_enabled() and logits.requires_grad):
        return None
    blocks, table = count_blocks(block_ids), _shown.get()
    if table is not None and (table.slots.shape != logits.shape[1:] or table.slots.device != logits.device):
        table = None
    return route_logits(library, rule, logits.contiguous(), bias, block_ids.contiguous(), blocks, table)


def route_logits(
    library: CudaLibrary,
    rule: SelectionRule,
    logits: Tensor,
    bias: Tensor | None,
    block_ids: Tensor,
    blocks: int,
    table: SlotTable | None = None,
) -> Routed:
    """Route by `logits` [T, E] float32 and `bias` [E] float32; see `RoutingPolicy`.

    `block_ids` [T] int64 name `blocks` blocks; a token of any other is a pad. The device's sigmoid may differ from the
    CPU's in the last bit. Raises ValueError for tensors or sizes that the kernel doesn't take, DeviceError.
    """
    scores, selection = torch.empty_like(logits), torch.empty_like(logits)
    return _run(library, rule, scores, selection, block_ids, blocks, table, logits, bias)


def route_scores(
    library: CudaLibrary,
    rule: SelectionRule,
    scores: Tensor,
    selection: Tensor,
    block_ids: Tensor,
    blocks: int,
    table: SlotTable | None = None,
) -> Routed:
    """As `route_logits`, by scores and selection scores, both [T, E] float32."""
    return _run(library, rule, scores, selection, block_ids, blocks, table)


def _run(
    library: CudaLibrary,
    rule: SelectionRule,
    scores: Tensor,
    selection: Tensor,
    block_ids: Tensor,
    blocks: int,
    table: SlotTable | None,
    logits: Tensor | None = None,
    bias: Tensor | None = None,
) -> Routed:
    rows = scores.shape
    if len(rows) != 2 or scores.device.type != library.device_type:
        told = f"{list(rows)} on {scores.device}"
        raise ValueError(f"scores: {told}; wanted [tokens, experts] on a {library.device_type} device")
    for name, given, dtype, shape in (
        ("scores", scores, torch.float32, rows),
        ("selection", selection, torch.float32, rows),
        ("logits", logits, torch.float32, rows),
        ("bias", bias, torch.float32, rows[1:]),
        ("block_ids", block_ids, torch.int64, rows[:1]),
        ("the slot table", table.slots if table else None, torch.int32, rows[1:]),
    ):
        if given is not None:
            _check(name, given, dtype, shape, scores.device)
    routed = _outputs(scores, selection, rule, blocks, table)
    call = _call(rule, routed, block_ids, logits, bias, table)
    if block_ids.is_cuda:
        with torch.cuda.device(block_ids.device):
            library.select(call, torch.cuda.current_stream().cuda_stream)
    else:
        library.select(call, None)
    return routed


def _check(name: str, given: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    if given.dtype != dtype or given.shape != shape or given.device != device or not given.is_contiguous():
        found = f"{given.dtype} {list(given.shape)} on {given.device}" + ", with gaps" * (not given.is_contiguous())
        raise ValueError(f"{name}: {found}; wanted {dtype} {list(shape)} on {device}, without gaps")


def _outputs(scores: Tensor, selection: Tensor, rule: SelectionRule, blocks: int, table: SlotTable | None) -> Routed:
    tokens, experts = scores.shape
    k = min(rule.k, experts)
    lookup = None
    if table is not None:
        lookup = Lookup(torch.empty_like(table.slots), table.slots.new_empty(experts + 1), scores.new_empty(experts))
    return Routed(
        experts=scores.new_empty(tokens, k, dtype=torch.int64),
        weights=scores.new_empty(tokens, k),
        coreset=None if rule.top_p is None else scores.new_empty(blocks, experts, dtype=torch.bool),
        block_scores=scores.new_empty(blocks, experts),
        used=scores.new_empty(blocks, experts, dtype=torch.bool),
        scores=scores,
        selection=selection,
        lookup=lookup,
    )


def _call(
    rule: SelectionRule,
    routed: Routed,
    block_ids: Tensor,
    logits: Tensor | None,
    bias: Tensor | None,
    table: SlotTable | None,
) -> SelectionCall:
    (tokens, experts), router = routed.scores.shape, rule.router
    call = SelectionCall(
        tokens=tokens,
        experts=experts,
        blocks=routed.block_scores.shape[0],
        choices=routed.experts.shape[1],
        groups=router.n_group,
        kept_groups=router.topk_group,
        least=rule.min_experts,
        normalise=router.norm_topk_prob,
        scale=router.routed_scaling_factor,
        top_p=rule.top_p or 0.0,
        block_ids=block_ids.data_ptr(),
        logits=_address(logits),
        bias=_address(bias),
        scores=routed.scores.data_ptr(),
        selection=routed.selection.data_ptr(),
        chosen=routed.experts.data_ptr(),
        weights=routed.weights.data_ptr(),
        coreset=_address(routed.coreset),
        block_scores=routed.block_scores.data_ptr(),
        used=routed.used.data_ptr(),
    )
    if table is not None and routed.lookup is not None:
        call.table, call.finished = table.slots.data_ptr(), table.finished.data_ptr()
        call.slots, call.missing, call.sums = (tensor.data_ptr() for tensor in routed.lookup)
    return call


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
