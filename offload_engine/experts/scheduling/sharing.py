"""Which of a layer's missing experts the CPU computes from host memory while the others are copied to the device.

A decision and nothing else: no thread, clock or tensor, so that the engine and the simulator decide alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

ShareMode = Literal["off", "auto"] | float
"""off; auto: as many as make the layer end soonest; or that share of its missing experts, whatever it costs."""


class Missing(NamedTuple):
    """An expert that a layer wants and that has no slot on the device."""

    expert: int
    tokens: int
    """That chose it."""
    hosted: bool = True
    """Whether its weights are in host memory, the only place from which the CPU computes."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What things take, in seconds."""

    copy: float
    """One expert from host memory to the device."""
    expert: float
    """One expert on the CPU, of any number of tokens, ..."""
    token: float
    """... and beside that, each of its tokens."""
    trip: float = 0.0
    """Activations down and results up, once per layer, ..."""
    row: float = 0.0
    """... and beside that, each token of each expert."""
    own: float = 0.0
    """That all else waits for the decision and its consequences, once per layer of which the CPU computes any."""
    read: float = 0.0
    """One expert from disk into host memory, ahead of its copy."""

    @staticmethod
    def unknown() -> Rates:
        """For those who don't ask."""
        return Rates(copy=0.0, expert=0.0, token=0.0)

    def cpu(self, tokens: int) -> float:
        """One expert of so many tokens on the CPU, its share of the way up included."""
        return self.expert + tokens * (self.token + self.row)


def choose(mode: ShareMode, missing: Sequence[Missing], rates: Rates, waiting: float = 0.0) -> list[int]:
    """The experts of `missing`, the most wanted first, that the CPU is to compute; the rest is copied.

    `waiting`: how many copies are begun already, and hold up those of this layer. See `soonest`; a share is rounded to
    the nearest number of experts, those with the fewest tokens.
    """
    if mode == "off" or not missing:
        return []
    able = cheapest_first(missing)
    count = soonest(missing, rates, waiting) if mode == "auto" else round(mode * len(missing))
    return [one.expert for one in able[:count]]


def cheapest_first(missing: Sequence[Missing]) -> list[Missing]:
    """Those that the CPU can compute, by rising number of tokens; of equals the least wanted first."""
    return sorted((one for one in reversed(missing) if one.hosted), key=lambda one: one.tokens)


def soonest(missing: Sequence[Missing], rates: Rates, waiting: float = 0.0) -> int:
    """How many of `cheapest_first` the CPU takes for the layer to end soonest; of equals the fewest.

    Copies follow each other on one link, CPU experts on the processor, reads on one disk, and the layer ends with the
    last of them. All copies take the same time, so that of all sets of one size the one that the CPU is through with
    first is best: prefixes of `cheapest_first` are all that has to be tried.
    """
    able = cheapest_first(missing)
    left, unread = len(missing), len(missing) - len(able)
    best, count = _link(left, unread, rates, waiting), 0
    cpu = rates.trip
    for taken, one in enumerate(able, start=1):
        cpu += rates.cpu(one.tokens)
        ends = rates.own + max(_link(left - taken, unread, rates, waiting), cpu)
        if ends < best:
            best, count = ends, taken
    return count


def _link(copies: int, unread: int, rates: Rates, waiting: float) -> float:
    """When so many copies are through, some of them of what is read from disk first; nobody waits for no copy."""
    if not copies:
        return 0.0
    through = (waiting + copies) * rates.copy
    return max(through, unread * rates.read + rates.copy) if unread else through
