"""Lines of bare equations in the style of the answers, for training only."""

import random

from offload_engine.evaluate.arithmetic.ranges import draw_operands, result_of

SHORTEST_LINE, LONGEST_LINE = 6, 10
"""Equations on one line."""


def drill(rng: random.Random) -> tuple[str, list[tuple[int, int]]]:
    """A line such as `37+58=95. 8*7=56.` and the character span (start, end) of each result.

    In training only the results may be masked: operands are unpredictable, and masking them would drown the loss.
    """
    text = ""
    spans: list[tuple[int, int]] = []
    for _ in range(rng.randint(SHORTEST_LINE, LONGEST_LINE)):
        operator = rng.choice("+-*/")
        left, right = draw_operands(rng, operator)
        text += f"{' ' if text else ''}{left}{operator}{right}="
        result = str(result_of(left, operator, right))
        spans.append((len(text), len(text) + len(result)))
        text += f"{result}."
    return text, spans
