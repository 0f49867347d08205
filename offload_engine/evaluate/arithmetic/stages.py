"""Composition: a staged story is an opening, any number of events and a closing, which together cost its steps.

Every stage knows from which running values it may start (`fits`), and the stage before it draws its numbers so that
they lead there; a division at the end is thereby exact whatever came before.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from offload_engine.evaluate.arithmetic.ranges import LARGEST_FACTOR, LARGEST_TERM
from offload_engine.evaluate.arithmetic.tale import Accept, DeadEndError, Tale


def anything(_value: int) -> bool:
    """Any running value will do."""
    return True


def term(value: int) -> bool:
    """A value a sum or difference may go on from, with room on both sides."""
    return 1 <= value < LARGEST_TERM


def losable(value: int) -> bool:
    """A value from which some can be taken and some left."""
    return 2 <= value <= LARGEST_TERM


def factor(value: int) -> bool:
    """A value that a product may go on from."""
    return 2 <= value <= LARGEST_FACTOR


def divisible(value: int) -> bool:
    """A value that a division may go on from."""
    return bool(divisors(value))


def divisors(value: int) -> list[int]:
    """The divisors k of 2..12 whose quotient is within 2..12 as well."""
    return [k for k in range(2, LARGEST_FACTOR + 1) if value % k == 0 and 2 <= value // k <= LARGEST_FACTOR]


@dataclass(frozen=True)
class Stage:
    """One part of a story."""

    cost: int
    weight: float
    tell: Callable[[Tale], None]
    fits: Accept = anything


@dataclass(frozen=True)
class Theme:
    """A kind of story: `build` tells one of the wanted number of steps, or raises DeadEndError."""

    kind: str
    weight: float
    build: Callable[[Tale, int], None]
    steps: tuple[int, ...] = (1, 2, 3, 4)


def _draw(tale: Tale, stages: Sequence[Stage], limit: int) -> Stage:
    open_stages = [stage for stage in stages if stage.cost <= limit]
    if not open_stages:
        raise DeadEndError
    return tale.rng.choices(open_stages, [stage.weight for stage in open_stages])[0]


def staged(
    prepare: Callable[[Tale], None], openings: Sequence[Stage], events: Sequence[Stage], closings: Sequence[Stage]
) -> Callable[[Tale, int], None]:
    """A builder that composes stages until their costs add up to the wanted steps."""

    def build(tale: Tale, steps: int) -> None:
        prepare(tale)
        plan = [_draw(tale, openings, steps)]
        closing = _draw(tale, closings, steps - plan[0].cost)
        rest = steps - plan[0].cost - closing.cost
        while rest:
            event = _draw(tale, events, rest)
            if event in plan and event.cost > 1:
                raise DeadEndError  # the same long event twice reads like a riddle
            plan.append(event)
            rest -= event.cost
        plan.append(closing)
        for stage, following in zip(plan, [*plan[1:], None], strict=True):
            tale.accept = following.fits if following else anything
            stage.tell(tale)

    return build
