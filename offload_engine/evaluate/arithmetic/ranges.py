"""The numbers a problem may hold, in one place: problems, drills and tests read them here."""

import random

LARGEST_TERM = 99
"""Operands and results of + and - lie in 0..99."""

LARGEST_FACTOR = 12
"""Products stay in the 12 x 12 table; a quotient is the inverse of such a product."""


def result_of(left: int, operator: str, right: int) -> int | None:
    """The result of one step, or None where the step lies outside the ranges."""
    if operator in "+-":
        result = left + right if operator == "+" else left - right
        fits = all(0 <= number <= LARGEST_TERM for number in (left, right, result))
    elif operator == "*":
        result = left * right
        fits = all(0 <= number <= LARGEST_FACTOR for number in (left, right))
    elif operator == "/":
        if not 1 <= right <= LARGEST_FACTOR or left % right:
            return None
        result = left // right
        fits = 0 <= result <= LARGEST_FACTOR
    else:
        raise ValueError(f"unknown operator {operator!r}")
    return result if fits else None


def draw_operands(rng: random.Random, operator: str) -> tuple[int, int]:
    """Operands of one bare equation: every pair of the ranges is equally likely, so every carry and borrow is met."""
    if operator in "+-":
        while True:
            left, right = rng.randint(0, LARGEST_TERM), rng.randint(0, LARGEST_TERM)
            if left + right <= LARGEST_TERM:
                return (left, right) if operator == "+" else (left + right, left)
    left, right = rng.randint(0, LARGEST_FACTOR), rng.randint(1, LARGEST_FACTOR)
    if operator == "/":
        return left * right, right
    return (left, right) if rng.random() < 0.5 else (right, left)
