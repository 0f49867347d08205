"""The numbers a problem may hold, in one place: problems, drills and tests read them here."""

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
