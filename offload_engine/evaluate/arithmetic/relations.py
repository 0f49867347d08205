"""Comparisons as a way to say a number: twice as many, half as many, 5 more, 4 fewer."""

from dataclasses import dataclass

from offload_engine.evaluate.arithmetic.lexicon import Noun
from offload_engine.evaluate.arithmetic.ranges import LARGEST_FACTOR, LARGEST_TERM
from offload_engine.evaluate.arithmetic.tale import Accept, Amount, DeadEndError, Tale

_OPERATORS, _WEIGHTS = "*/+-", (4, 1.5, 2, 2)
_FRACTIONS = {2: "half", 3: "a third", 4: "a quarter"}


@dataclass(frozen=True)
class Relation:
    """`words` says an amount by the base, which is known: base operator by."""

    base: Amount
    base_phrase: str
    operator: str
    by: Amount
    words: str


def relate(tale: Tale, thing: Noun, than: str, accept: Accept, base: Amount | None = None) -> Relation:
    """Draws a relation to somebody's amount (a new one unless the base is given); the result is acceptable."""
    operator = tale.rng.choices(_OPERATORS, _WEIGHTS)[0]
    value, by = _numbers(tale, operator, accept, base.value if base else None)
    phrase = ""
    if base is None:
        base, phrase = tale.count(value, thing)
    amount, words = _say(tale, operator, by, thing, than)
    return Relation(base, phrase, operator, amount, words)


def _numbers(tale: Tale, operator: str, accept: Accept, base: int | None) -> tuple[int, int]:
    """A base (the given one, if any) and the number that relates to it."""
    result = {"*": lambda a, b: a * b, "/": lambda a, b: a // b, "+": lambda a, b: a + b, "-": lambda a, b: a - b}
    for _ in range(20):
        value = base if base is not None else _base(tale, operator)
        by = tale.rng.randint(2, LARGEST_FACTOR) if operator == "*" else tale.rng.randint(1, LARGEST_TERM)
        if operator == "*" and tale.chance(0.5):
            by = tale.rng.randint(2, 4)
        if operator == "/":
            by = tale.any((2, 2, 2, 3, 4))
        if _legal(operator, value, by) and accept(result[operator](value, by)):
            return value, by
    raise DeadEndError


def _base(tale: Tale, operator: str) -> int:
    if operator == "*":
        return tale.rng.randint(2, LARGEST_FACTOR)
    return tale.rng.randint(2, LARGEST_TERM)


def _legal(operator: str, value: int, by: int) -> bool:
    if operator == "*":
        return value <= LARGEST_FACTOR
    if operator == "/":
        return value % by == 0 and 1 <= value // by <= LARGEST_FACTOR
    return value + by <= LARGEST_TERM if operator == "+" else by < value <= LARGEST_TERM


def _say(tale: Tale, operator: str, by: int, thing: Noun, than: str) -> tuple[Amount, str]:
    if operator == "*":
        amount, times = tale.times(by)
        return amount, f"{times} as many {thing.many} as {than}"
    if operator == "/":
        amount = tale.give(by, _FRACTIONS[by])
        return amount, f"{amount} as many {thing.many} as {than}"
    amount = tale.give(by)
    if operator == "+":
        return amount, f"{amount} more {thing.form(by)} than {than}"
    fewer = "less" if by == 1 else "fewer"
    return amount, f"{amount} {fewer} {thing.form(by)} than {than}"
