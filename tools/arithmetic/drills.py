"""Lines of bare equations in the style of the answers, for training only."""

import random

from tools.arithmetic.ranges import LARGEST_FACTOR, LARGEST_TERM

SHORTEST_LINE, LONGEST_LINE = 6, 10
"""Equations on one line."""


def equation(rng: random.Random) -> tuple[int, str, int, int]:
    """One equation (left, operator, right, result), each operator equally likely, in the ranges of the problems.

    Sums and differences come from one uniform draw over all pairs with a total of at most 99, so that every carry and
    borrow is met; a quotient is the inverse of a product.
    """
    operator = rng.choice("+-*/")
    if operator in "+-":
        total = LARGEST_TERM - int(rng.random() ** 2 * (LARGEST_TERM + 1))
        part = rng.randint(0, total)
        return (part, "+", total - part, total) if operator == "+" else (total, "-", part, total - part)
    left, right = rng.randint(0, LARGEST_FACTOR), rng.randint(1, LARGEST_FACTOR)
    if operator == "*":
        if rng.random() < 0.5:
            left, right = right, left
        return left, "*", right, left * right
    return left * right, "/", right, left


def drill(rng: random.Random) -> tuple[str, list[tuple[int, int]]]:
    """A line such as `37+58=95. 8*7=56.` and the character span (start, end) of each result.

    In training only the results may be masked: operands are unpredictable, and masking them would drown the loss.
    """
    text, spans = "", []
    for _ in range(rng.randint(SHORTEST_LINE, LONGEST_LINE)):
        left, operator, right, result = equation(rng)
        text += f"{' ' if text else ''}{left}{operator}{right}="
        spans.append((len(text), len(text) + len(str(result))))
        text += f"{result}."
    return text, spans
