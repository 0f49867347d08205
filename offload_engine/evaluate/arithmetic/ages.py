"""Stories of ages."""

from offload_engine.evaluate.arithmetic.lexicon import YEAR
from offload_engine.evaluate.arithmetic.stages import Theme
from offload_engine.evaluate.arithmetic.tale import Amount, DeadEndError, Tale, Who


def _related(tale: Tale, base: Amount, than: Who) -> tuple[Who, Amount]:
    """Somebody whose age is told by another's."""
    person = tale.person()
    be = tale.verb("be", person)
    form = tale.rng.random()
    if form < 0.4:
        gap, phrase = tale.count(tale.rng.randint(1, 40), YEAR)
        tale.fact(person, f"{be} {phrase} older than {than.obj}")
        return person, tale.step(base, "+", gap, YEAR, fixed=True)
    if form < 0.7:
        gap, phrase = tale.count(tale.rng.randint(1, 40), YEAR)
        tale.fact(person, f"{be} {phrase} younger than {than.obj}")
        age = tale.step(base, "-", gap, YEAR, fixed=True)
    elif form < 0.9:
        times, words = tale.times(tale.rng.randint(2, 7))
        tale.fact(person, f"{be} {words} as old as {than.obj}")
        age = tale.step(base, "*", times, YEAR, fixed=True)
    else:
        half = tale.give(2, "half")
        tale.fact(person, f"{be} {half} as old as {than.obj}")
        age = tale.step(base, "/", half, YEAR)
    if age.value < 1:
        raise DeadEndError
    return person, age


def _in_future(tale: Tale, person: Who, age: Amount) -> None:
    gap, phrase = tale.count(tale.rng.randint(1, 30), YEAR)
    if tale.chance(0.6):
        tale.question(f"how old will {person} be in {phrase}")
        tale.step(age, "+", gap, YEAR, fixed=True)
    else:
        tale.question(f"how old was {person} {phrase} ago")
        if tale.step(age, "-", gap, YEAR, fixed=True).value < 1:
            raise DeadEndError


def _build(tale: Tale, steps: int) -> None:
    tale.past = False
    first = tale.person()
    age, phrase = tale.count(tale.rng.randint(2, 60), YEAR)
    old = tale.any((f"{phrase} old", str(age))) if tale.chance(0.3) else f"{phrase} old"
    tale.fact(first, f"{tale.verb('be', first)} {old}")
    last, last_age = first, age
    endings = ("future", "sum") if steps > 1 else ("future", "last")
    ending = tale.any((*endings, "last"))
    for _ in range(steps - (ending != "last")):
        last, last_age = _related(tale, last_age, last)
    if tale.chance(0.3):
        tale.clauses.reverse()
    if ending == "last":
        tale.question(f"how old {tale.verb('be', last)} {last}", tale.any((" now", "")))
    elif ending == "future":
        _in_future(tale, last, last_age)
    else:
        names = f"{last.name} and {first.name}"
        tale.question(
            f"how old are {names} together"
            if tale.chance(0.5) or first.first
            else f"what is the sum of the ages of {names}"
        )
        tale.step(age, "+", last_age, YEAR, fixed=True)


THEME = Theme("ages", 0.7, _build, (1, 2, 3))
