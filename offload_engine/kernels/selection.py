"""Which experts the tokens of a forward go to, by the C kernels: the checks that keep them in bounds, and the calls.

They decide as the torch operations of offload_engine/routing do, bit for bit; cpu/select.c says how. Where `serves`
does not say yes, the decision is torch's.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from offload_engine.kernels.library import Library, status

MOST_EXPERTS, MOST_CHOICES = 1024, 64
"""What there is room for (cpu/select.c)."""

_VOTE, _ELECT, _CHOOSE, _TALLY, _FLOOR = 1, 2, 4, 8, 16
_NOTHING = torch.empty(0, device="cpu")
"""A null pointer to the kernel."""


class Router(Protocol):
    """How a layer limits and weighs a token's choice: `routing.RouterShape`."""

    @property
    def n_group(self) -> int:
        """Groups of experts; divides their number."""

    @property
    def topk_group(self) -> int:
        """Groups a token may choose from."""

    @property
    def norm_topk_prob(self) -> bool:
        """Whether weights are divided by their sum."""

    @property
    def routed_scaling_factor(self) -> float:
        """What weights are then multiplied with."""


class _Done(NamedTuple):
    """What the stages left; `_NOTHING` where none fills it."""

    experts: Tensor
    weights: Tensor
    marks: Tensor
    """[B, E] bool: the coreset; if only voted for, whether there were any votes."""
    votes: Tensor


class _Ungrouped:
    n_group = topk_group = 1
    norm_topk_prob = False
    routed_scaling_factor = 1.0


_UNGROUPED = _Ungrouped()


def serves(block_ids: Tensor, k: int, router: Router | None, *scores: Tensor) -> bool:
    """Whether the functions below take these: contiguous float32 `scores` [T, E], all of one shape, and int64 [T] on
    the CPU, no gradient wanted, numbers within bounds. `router` None: groups don't matter. Without a library: never.
    """
    if _library() is None:
        return False
    if torch.is_grad_enabled() and any(values.requires_grad for values in scores):
        return False
    shape = scores[0].shape
    if not all(_plain(values, torch.float32) and values.shape == shape for values in scores):
        return False
    return (
        len(shape) == 2
        and _plain(block_ids, torch.int64)
        and block_ids.shape == shape[:1]
        and 0 < shape[1] <= MOST_EXPERTS
        and 0 < k <= MOST_CHOICES
        and (router is None or _groups_fit(router, shape[1]))
    )


def route(
    scores: Tensor, selection: Tensor, block_ids: Tensor, k: int, router: Router
) -> tuple[Tensor, Tensor, Tensor]:
    """Group-limited top-k per token: experts [T, k] int64, weights [T, k] float32, block scores [B, E] float32."""
    done = _run(_CHOOSE | _TALLY | _FLOOR, block_ids, k, selection, scores, router)
    return done.experts, done.weights, done.votes


def route_by_coreset(
    scores: Tensor, selection: Tensor, block_ids: Tensor, k: int, router: Router, top_p: float, min_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dMoE: experts [T, k] int64, weights [T, k] float32, coresets [B, E] bool, block scores [B, E] float32."""
    stages = _VOTE | _ELECT | _CHOOSE | _FLOOR
    done = _run(stages, block_ids, k, selection, scores, router, top_p=top_p, least=min_experts)
    return done.experts, done.weights, done.marks, done.votes


def vote(selection: Tensor, block_ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `routing.base.block_votes`: votes [B, E] float32, and whether there were any, [B, E] bool."""
    done = _run(_VOTE, block_ids, k, selection)
    return done.votes, done.marks


def choose_inside(
    scores: Tensor, selection: Tensor, coreset: Tensor, block_ids: Tensor, k: int, router: Router
) -> tuple[Tensor, Tensor]:
    """As `routing.base.choose_inside`: experts [T, k] int64, weights [T, k] float32. Raises IndexError for a block that
    `coreset` [B, E] bool has no row for.
    """
    width = selection.shape[1]
    if not coreset.is_cpu or coreset.dtype != torch.bool or coreset.dim() != 2 or coreset.shape[1] != width:
        told = f"{coreset.dtype} {list(coreset.shape)} on {coreset.device}"
        raise ValueError(f"coreset is {told}, wanted bool [B, {width}] on the CPU")
    done = _run(_CHOOSE, block_ids, k, selection, scores, router, coreset=coreset.contiguous())
    return done.experts, done.weights


class Ranked(NamedTuple):
    """A decision's experts by falling score, and what came next."""

    experts: list[int]
    """Chosen by some token."""
    scores: list[float]
    """Theirs."""
    runners_up: list[int]
    """Chosen by none, with a score above 0."""


def ranked(experts: Tensor, block_scores: Tensor | None, furthest: int = 0) -> Ranked | None:
    """The distinct ones of `experts` (-1: none) by falling score summed over the blocks of `block_scores` [B, E], and
    at most `furthest` runners-up; None where it has to be found out by torch. Raises IndexError for an expert without a
    score.
    """
    library = _library()
    if library is None or block_scores is None or block_scores.dim() != 2:
        return None
    blocks, width = block_scores.shape
    if not (_plain(experts, torch.int64) and _plain(block_scores, torch.float32) and width <= MOST_EXPERTS):
        return None
    found, scores, counts = (ctypes.c_int64 * width)(), (ctypes.c_float * width)(), (ctypes.c_int64 * 2)()
    voted = width, blocks, block_scores.data_ptr()
    if library.rank(experts.numel(), experts.data_ptr(), *voted, furthest, found, scores, counts):
        raise IndexError(f"an expert of the decision is beyond the {width} that block scores name")
    distinct, others = counts
    return Ranked(found[:distinct], scores[:distinct], found[distinct : distinct + others])


def _library() -> Library | None:
    kernel = status()
    return None if kernel.variant is None else kernel.library


def _plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.is_cpu and tensor.dtype == dtype and tensor.is_contiguous()


def _groups_fit(router: Router, experts: int) -> bool:
    return router.n_group > 0 and experts % router.n_group == 0 and 0 < router.topk_group <= MOST_CHOICES


def _run(
    stages: int,
    block_ids: Tensor,
    k: int,
    selection: Tensor,
    scores: Tensor = _NOTHING,
    router: Router = _UNGROUPED,
    *,
    coreset: Tensor = _NOTHING,
    top_p: float = 1.0,
    least: int = 0,
) -> _Done:
    """Call `dmoe_select`; a second time where there turn out to be several blocks."""
    library = _library()
    if library is None:
        raise ValueError(f"no kernel is in use: {status().reason}")
    (tokens, width), k = selection.shape, min(k, selection.shape[1])
    choices = [tokens, k] if stages & _CHOOSE else [0]
    experts, weights = block_ids.new_empty(choices), selection.new_empty(choices)
    blocks = coreset.shape[0] if coreset is not _NOTHING else 1
    numbers = router.n_group, router.topk_group, router.norm_topk_prob, router.routed_scaling_factor, top_p, least
    while True:
        marks = selection.new_empty(blocks, width, dtype=torch.bool) if stages & _VOTE else coreset
        votes = selection.new_empty(blocks, width) if stages & (_VOTE | _TALLY) else _NOTHING
        done = _Done(experts, weights, marks, votes)
        pointers = [tensor.data_ptr() for tensor in (block_ids, scores, selection, *done)]
        needed = library.select(stages, tokens, width, blocks, k, *numbers, *pointers)
        if not needed:
            return done
        if needed < 0:
            raise ValueError(f"{width} experts, {k} of them per token, in {router.n_group} groups don't fit the kernel")
        if coreset is not _NOTHING:
            raise IndexError(f"block {needed - 1} has no row in a coreset of {blocks}")
        blocks = needed
