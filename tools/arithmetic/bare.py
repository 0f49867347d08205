"""Bare arithmetic: What is 37 + 58? What is 8 times 7? Calculate 56 / 7."""

from tools.arithmetic.ranges import LARGEST_FACTOR, LARGEST_TERM, result_of
from tools.arithmetic.stages import Theme
from tools.arithmetic.tale import Amount, DeadEndError, Tale

_SIGNS = {"+": ("+", "+", "plus"), "-": ("-", "-", "minus"), "*": ("*", "x", "times"), "/": ("/", "/", "divided by")}
_NOUNS = {
    "+": "the sum of {} and {}",
    "-": "the difference between {} and {}",
    "*": "the product of {} and {}",
    "/": "the quotient of {} and {}",
}
_ASK = ("what is {}?", "what is {}?", "how much is {}?", "calculate {}.", "compute {}.", "work out {}.", "find {}.")
_SECOND_OPERATION = 0.15


def operands(tale: Tale, operator: str) -> tuple[int, int]:
    """Two numbers for an operator, over the whole of its range."""
    rng = tale.rng
    if operator in "+-":
        total = LARGEST_TERM - int(rng.random() ** 2 * (LARGEST_TERM + 1))
        part = rng.randint(0, total)
        return (part, total - part) if operator == "+" else (total, part)
    left, right = rng.randint(0, LARGEST_FACTOR), rng.randint(1, LARGEST_FACTOR)
    if operator == "/":
        return left * right, right
    return (left, right) if rng.random() < 0.5 else (right, left)


def _build(tale: Tale, _steps: int) -> None:
    operator = tale.any("+-*/")
    first, second = operands(tale, operator)
    left, right = tale.give(first), tale.give(second)
    tale.value = tale.step(left, operator, right, None)
    if operator in "*/" and tale.chance(2 * _SECOND_OPERATION):
        expression = _go_on(tale, f"{left} {tale.any(_SIGNS[operator][:2])} {right}")
    elif tale.chance(0.2):
        expression = _NOUNS[operator].format(left, right)
    else:
        expression = f"{left} {tale.any(_SIGNS[operator])} {right}"
    asked = tale.any(_ASK)
    tale.question(asked.format(expression), movable=False)


def _go_on(tale: Tale, expression: str) -> str:
    """A product or quotient plus or minus a third number."""
    operator = tale.any("+-")
    third = tale.pick(lambda number: result_of(tale.value.value, operator, number) is not None, 0)
    amount: Amount = tale.give(third)
    if tale.value.value > LARGEST_TERM:
        raise DeadEndError
    tale.value = tale.step(tale.value, operator, amount, None)
    return f"{expression} {operator} {amount}"


THEME = Theme("bare", 1.0, _build)
