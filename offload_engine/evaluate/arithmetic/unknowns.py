"""Stories told to the end, asking for the beginning: worked backwards from the last number."""

from offload_engine.evaluate.arithmetic import lexicon
from offload_engine.evaluate.arithmetic.stages import Theme
from offload_engine.evaluate.arithmetic.tale import Amount, Clause, DeadEndError, Tale, Who

_GAINS = ("buy", "get", "find", "receive")
_LOSSES = ("lose", "give away", "sell", "use")


def _some(tale: Tale) -> str:
    return tale.any(("some", "a number of", "some", "some"))


def _event(tale: Tale, hero: Who, value: int, operator: str) -> tuple[Amount, Clause]:
    verb, _, particle = tale.any(_GAINS if operator == "+" else _LOSSES).partition(" ")
    more = "more" if operator == "+" else ""
    amount, phrase = tale.count(value, tale.thing, more)
    text = f"{tale.verb(verb, hero)} {particle + ' ' if particle else ''}{phrase}"
    return amount, Clause(hero, text, event=True)


def _start(tale: Tale, steps: int) -> None:
    """The start is unknown: 'had some, bought 9, has 23 now'; the events are undone last to first."""
    tale.past = True
    tale.thing = tale.any(lexicon.THINGS)
    hero = tale.person(tale.thing.family)
    tale.fact(hero, f"had {_some(tale)} {tale.thing.many}")
    value = tale.rng.randint(1, 99)
    events: list[tuple[str, Amount]] = []
    for _ in range(steps):
        operator = tale.any("+-")
        room = 99 - value if operator == "+" else value
        if room < 1:
            raise DeadEndError
        change = tale.rng.randint(1, room)
        value += change if operator == "+" else -change
        if not value:
            raise DeadEndError
        amount, clause = _event(tale, hero, change, operator)
        tale.clauses.append(clause)
        events.append((operator, amount))
    current = tale.give(value)
    now = tale.any(("now", "left")) if events[-1][0] == "-" else "now"
    tale.fact(hero, f"{'have' if hero.first else 'has'} {current} {tale.thing.form(value)} {now}")
    when = tale.any((" at first", " at the start", " in the beginning", " to begin with"))
    tale.question(f"how many {tale.thing.many} did {hero} have{when}", movable=False)
    for operator, amount in reversed(events):
        current = tale.step(current, "-" if operator == "+" else "+", amount, tale.thing, fixed=True)


def _change(tale: Tale) -> None:
    """The change is unknown: 'had 23, lost some, has 14 now'."""
    tale.past = True
    tale.thing = tale.any(lexicon.THINGS)
    hero = tale.person(tale.thing.family)
    more, less = sorted(tale.rng.sample(range(1, 100), 2), reverse=True)
    gained = tale.chance(0.5)
    before, after = (less, more) if gained else (more, less)
    start, phrase = tale.count(before, tale.thing)
    verb, _, particle = tale.any(_GAINS if gained else _LOSSES).partition(" ")
    tale.fact(hero, f"had {phrase}")
    tale.event(hero, f"{tale.verb(verb, hero)} {particle + ' ' if particle else ''}some{' more' if gained else ''}")
    end = tale.give(after)
    tale.fact(hero, f"{'have' if hero.first else 'has'} {end} {tale.thing.form(after)} now")
    tale.question(f"how many {tale.thing.many} did {hero} {verb}{' ' + particle if particle else ''}", movable=False)
    tale.step(*((end, "-", start) if gained else (start, "-", end)), tale.thing)


def _size(tale: Tale) -> None:
    """The number of equal parts' contents is unknown, or the number behind a comparison."""
    tale.thing = tale.any(lexicon.THINGS)
    hero, other = tale.person(), tale.person()
    times = tale.rng.randint(2, 12)
    base = tale.rng.randint(2, 12)
    have = tale.verb("have", hero)
    total, phrase = tale.count(times * base, tale.thing)
    factor, words = tale.times(times)
    tale.fact(hero, f"{have} {phrase}")
    tale.fact(None, f"this {tale.verb('be')} {words} as many as {other} {tale.verb('have', other)}")
    tale.question(f"how many {tale.thing.many} {tale.aux(other)} {other} have", movable=False)
    tale.step(total, "/", factor, tale.thing)


def _build(tale: Tale, steps: int) -> None:
    if steps == 1 and tale.chance(0.6):
        tale.any((_change, _size))(tale)
    else:
        _start(tale, steps)


THEME = Theme("unknowns", 0.9, _build, (1, 2, 3))
