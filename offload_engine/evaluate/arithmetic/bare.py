"""Bare arithmetic: What is 37 + 58? What is 8 times 7? Calculate 56 / 7."""

from offload_engine.evaluate.arithmetic.ranges import draw_operands, result_of
from offload_engine.evaluate.arithmetic.stages import Theme
from offload_engine.evaluate.arithmetic.tale import Tale

_SIGNS = {"+": "+", "-": "-", "*": "*x", "/": "/"}
_WORDS = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}
_NOUNS = {
    "+": "the sum of {} and {}",
    "-": "the difference between {} and {}",
    "*": "the product of {} and {}",
    "/": "the quotient of {} and {}",
}
_ASK = ("what is {}?", "what is {}?", "how much is {}?", "calculate {}.", "compute {}.", "work out {}.", "find {}.")
_SECOND_OPERATION = 0.3


def _build(tale: Tale, _steps: int) -> None:
    operator = tale.any("+-*/")
    form = tale.rng.random()
    if form < 0.65:
        tale.words = 0.0  # no number words beside signs
    first, second = draw_operands(tale.rng, operator)
    left, right = tale.give(first), tale.give(second)
    tale.value = tale.step(left, operator, right, None)
    if form < 0.65:
        expression = f"{left} {tale.any(_SIGNS[operator])} {right}"
        if operator in "*/" and tale.chance(_SECOND_OPERATION):
            expression = _go_on(tale, expression)
    elif form < 0.85:
        expression = f"{left} {_WORDS[operator]} {right}"
    else:
        expression = _NOUNS[operator].format(left, right)
    tale.question(tale.any(_ASK).format(expression), movable=False)


def _go_on(tale: Tale, expression: str) -> str:
    """A product or quotient plus or minus a third number."""
    operator = tale.any("+-")
    third = tale.pick(lambda number: result_of(tale.value.value, operator, number) is not None, 0)
    amount = tale.give(third)
    tale.value = tale.step(tale.value, operator, amount, None)
    return f"{expression} {operator} {amount}"


THEME = Theme("bare", 1.0, _build)
