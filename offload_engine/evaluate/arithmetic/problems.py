"""Problems by (seed, index): the mixture of kinds and steps, and the checks every problem passes."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from offload_engine.evaluate.arithmetic import surface
from offload_engine.evaluate.arithmetic.asides import add_aside
from offload_engine.evaluate.arithmetic.stages import Theme
from offload_engine.evaluate.arithmetic.tale import DeadEndError, Tale
from offload_engine.evaluate.arithmetic.themes import BARE, THEMES

BARE_SHARE = 0.08
STEP_SHARES = {1: 0.27, 2: 0.40, 3: 0.18, 4: 0.07}
"""Shares of all problems; with BARE_SHARE they add up to one."""

MOST_WORDS = 60


@dataclass(frozen=True)
class Problem:
    """A word problem with its worked answer."""

    question: str
    answer: str
    gold: str
    steps: int
    kind: str


def problem(seed: int, index: int) -> Problem:
    """The problem with this index in the sequence of a seed, the same on every machine and Python version."""
    rng = random.Random(f"arithmetic:{seed}:{index}")
    draw = rng.random()
    theme, steps = BARE, 0
    if draw >= BARE_SHARE:
        steps = rng.choices(list(STEP_SHARES), list(STEP_SHARES.values()))[0]
        fitting = [theme for theme in THEMES if steps in theme.steps]
        theme = rng.choices(fitting, [theme.weight for theme in fitting])[0]
    while True:
        told = _tell(rng, theme, steps)
        if told is not None:
            return told


def generate(seed: int, n: int) -> Iterator[Problem]:
    """The first n problems of a seed."""
    return (problem(seed, index) for index in range(n))


def _tell(rng: random.Random, theme: Theme, steps: int) -> Problem | None:
    """One attempt at a story; None where its numbers or its length do not work out."""
    tale = Tale(rng, past=rng.random() < 0.4, dollar_sign=rng.random() < 0.4)
    tale.words = rng.choices((0.0, 0.6, 1.0), (72, 20, 8))[0]
    try:
        theme.build(tale, steps)
        add_aside(tale, theme.kind)
    except DeadEndError:
        return None
    marked = surface.write(tale)
    question = surface.fill_numbers(tale, marked)
    if len(question.split()) > MOST_WORDS:
        return None
    answer = surface.answer(tale, marked)
    return Problem(question, answer, str(tale.steps[-1].result.value), len(tale.steps), theme.kind)
