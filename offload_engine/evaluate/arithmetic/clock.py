"""Stories of time: minutes of an hour, hours of a day, days of weeks, months of years."""

from offload_engine.evaluate.arithmetic.lexicon import DAY, HOUR, MINUTE, MONTH, WEEK, YEAR, Noun
from offload_engine.evaluate.arithmetic.stages import Theme
from offload_engine.evaluate.arithmetic.tale import Amount, Clause, DeadEndError, Tale, Who

_ACTIVITIES = (
    ("spend", "on homework"),
    ("spend", "in the garden"),
    ("read", ""),
    ("practice", ""),
    ("walk", ""),
    ("play", ""),
    ("spend", "in the kitchen"),
    ("work", ""),
    ("study", ""),
    ("wait", ""),
    ("travel", ""),
    ("spend", "at the shop"),
)
_SHOWS = ("movie", "film", "game", "lesson", "concert", "trip", "play", "meeting", "class", "show")


def _span(tale: Tale, minutes: int) -> tuple[Amount, str]:
    """A length of time; beyond an hour it may be told in hours and minutes, which costs the first step."""
    if minutes > 60 and tale.chance(0.7):
        hour = tale.give(60, tale.any(("1 hour", "an hour", "one hour")))
        rest, words = tale.count(minutes - 60, MINUTE)
        return tale.step(hour, "+", rest, MINUTE), f"{hour} and {words}"
    return tale.count(minutes, MINUTE)


def _activities(tale: Tale, hero: Who, minutes: list[int]) -> list[Amount]:
    amounts = []
    chosen = tale.rng.sample(_ACTIVITIES, len(minutes))
    for index, ((verb, where), length) in enumerate(zip(chosen, minutes, strict=True)):
        amount, phrase = tale.count(length, MINUTE)
        spent = f"{'' if verb == 'spend' else 'for '}{phrase}{' ' + where if where else ''}"
        tale.clauses.append(Clause(hero, f"{tale.verb(verb, hero)} {spent}", event=index > 0))
        amounts.append(amount)
    return amounts


def _total_minutes(tale: Tale, steps: int) -> None:
    """Several activities one after the other."""
    cuts = sorted(tale.rng.sample(range(1, 99), steps + 1))
    minutes = [after - before for before, after in zip([0, *cuts], cuts, strict=False)]
    hero = tale.person()
    amounts = _activities(tale, hero, minutes)
    total = amounts[0]
    for amount in amounts[1:]:
        total = tale.step(total, "+", amount, MINUTE)
    tale.question(
        f"how many minutes {tale.verb('be')} that {tale.any(('in total', 'altogether', 'in all'))}",
        movable=False,
    )


def _left_of_show(tale: Tale, steps: int) -> None:
    show = tale.any(_SHOWS)
    length = tale.rng.randint(20, 99)
    whole, phrase = _span(tale, length)
    tale.fact(None, f"{tale.any(('a', 'the'))} {show} {tale.verb('last')} {phrase}")
    left = whole
    while len(tale.steps) < steps:
        gone = tale.rng.randint(1, max(1, left.value - 1))
        amount, words = tale.count(gone, MINUTE)
        have = "had" if tale.past else "has" if gone == 1 else "have"
        passed = f"{words} {have} {tale.any(('passed', 'gone by'))}"
        if left is not whole:
            passed = f"another {passed}" if gone > 1 else f"{amount} more minute {have} passed"
        tale.fact(None, passed)
        left = tale.step(left, "-", amount, MINUTE)
    if left is whole:
        raise DeadEndError
    tale.question(f"how many minutes {tale.verb('be', many=True)} left", movable=len(tale.clauses) == 2)


def _hours_of_day(tale: Tale, steps: int) -> None:
    """A day has 24 hours; some are spent."""
    hero = tale.person()
    day = tale.give(24, "the day")
    tale.past = False
    rest: Amount = day
    chosen = tale.rng.sample(("sleep", "work", "play", "read", "study", "travel"), steps)
    hours = [tale.rng.randint(1, 11) for _ in chosen]
    clauses = []
    for verb, number in zip(chosen, hours, strict=True):
        amount, phrase = tale.count(number, HOUR)
        clauses.append(Clause(hero, f"{tale.verb(verb, hero)} for {phrase}"))
        rest = tale.step(rest, "-", amount, HOUR)
    listed = ", ".join(clause.text for clause in clauses[:-1]) + (" and " if clauses[1:] else "") + clauses[-1].text
    tale.fact(hero, f"{listed}{tale.any((' each day', ' every day', ' on Sunday'))}")
    tale.question(f"how many hours of {day} are left", movable=False)


_CONVERSIONS: tuple[tuple[Noun, Noun, int, int], ...] = ((WEEK, DAY, 7, 12), (YEAR, MONTH, 12, 8))


def _conversion(tale: Tale, steps: int) -> None:
    """Weeks and days in days, years and months in months, 24 hours a day for one or two days."""
    long, short, per, most = tale.any(_CONVERSIONS)
    number = tale.rng.randint(2, most)
    count, phrase = tale.count(number, long)
    constant = tale.give(per, short.many)
    total = tale.step(count, "*", constant, short, fixed=True)
    if steps == 1:
        tale.question(
            f"how many {constant} are {tale.any((f'in {phrase}', f'{phrase}', f'there in {phrase}'))}", movable=False
        )
        return
    lasts = tale.verb("last")
    what = tale.any(("trip", "course", "holiday", "project", "journey") if long is WEEK else ("course", "project"))
    value = tale.rng.randint(1, 6 if long is WEEK else 11)
    if tale.chance(0.5) or steps == 3:
        rest, words = tale.count(value, short)
        tale.fact(None, f"a {what} {lasts} {phrase} and {words}")
        total = tale.step(total, "+", rest, short)
    else:
        tale.fact(None, f"a {what} {lasts} {phrase}")
    if len(tale.steps) < steps:
        gone = tale.rng.randint(1, max(1, min(99, total.value) - 1))
        amount, words = tale.count(gone, short)
        have = "had" if tale.past else "has" if gone == 1 else "have"
        tale.fact(None, f"{words} {have} passed")
        tale.step(total, "-", amount, short)
        tale.question(f"how many {constant} {tale.verb('be', many=True)} left", movable=False)
    else:
        tale.question(f"how many {constant} {tale.verb('be')} that", movable=False)


def _build(tale: Tale, steps: int) -> None:
    tale.any((_total_minutes, _left_of_show, _left_of_show, _conversion, _hours_of_day))(tale, steps)


THEME = Theme("time", 1.0, _build, (1, 2, 3))
