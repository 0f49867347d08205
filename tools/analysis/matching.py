"""DES-Vote at dMoE's compression: with a coreset so large that it uses no fewer experts than dMoE.

Group-limited routing leaves some of a coreset unused, so its size is found by measuring: guessed from the DES-Vote runs
there are, evaluated, and adjusted. What comes next depends on finished evaluations alone, so that a report finds the
same rows again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import NamedTuple

from tools.analysis.evaluations import Evaluated
from tools.analysis.runs import Run, coreset_of, des_vote, dmoe, matched_des_vote

ATTEMPTS = 3
"""Coreset sizes evaluated at most."""
KNOWN_BETAS = (0.10, 0.15)
"""The main comparison's, which are evaluated before."""


class Search(NamedTuple):
    """How far the search is."""

    best: Evaluated | None
    """Of the runs evaluated: the fewest experts that are no fewer than dMoE's; failing that the most."""
    following: Run | None
    """The next to evaluate; None: the search is over, or dMoE hasn't been evaluated."""


def search(find: Callable[[Run], Evaluated | None], num_experts: int) -> Search:
    """Where the search stands; `find` gives the finished evaluations."""
    ours = find(dmoe(0.6))
    if ours is None:
        return Search(None, None)
    used = {}
    for beta in KNOWN_BETAS:
        known = find(des_vote(beta))
        if known is not None:
            used[coreset_of(beta, num_experts)] = known.unique
    tried: dict[int, Evaluated] = {}
    following = None
    for _ in range(ATTEMPTS):
        keep = estimate(ours.unique, used, num_experts)
        if keep in tried:
            break
        found = find(matched_des_vote(keep, num_experts))
        if found is None:
            following = matched_des_vote(keep, num_experts)
            break
        tried[keep], used[keep] = found, found.unique
    enough = [one for one in tried.values() if one.unique >= ours.unique]
    best = (
        min(enough, key=lambda one: one.unique)
        if enough
        else max(tried.values(), key=lambda one: one.unique, default=None)
    )
    return Search(best, following)


def estimate(target: float, used: Mapping[int, float], num_experts: int) -> int:
    """The smallest coreset that should use `target` experts, on straight lines through `used` (coreset -> experts
    used) and the origin.
    """
    points = [(0, 0.0), *sorted(used.items())]
    for (low, below), (high, above) in pairwise(points):
        if below < target <= above:
            return _whole(low + (target - below) * (high - low) / (above - below), num_experts)
    most, above = points[-1]
    return _whole(max(most + 1, target * most / above) if above else target, num_experts)


def _whole(keep: float, num_experts: int) -> int:
    return min(num_experts, max(1, math.ceil(keep - 1e-9)))
