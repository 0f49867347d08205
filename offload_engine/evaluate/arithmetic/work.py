"""Stories of what is done over days: pages, laps, sums of money earned or saved, minutes of practice."""

from offload_engine.evaluate.arithmetic import lexicon
from offload_engine.evaluate.arithmetic.lexicon import DOLLAR, noun
from offload_engine.evaluate.arithmetic.settings import TASKS
from offload_engine.evaluate.arithmetic.stages import Stage, Theme, staged, term
from offload_engine.evaluate.arithmetic.tale import Amount, Clause, DeadEndError, Tale

_LENGTHS = {"hour": (), "day": (("a week", 7),), "week": (), "month": (("a year", 12),)}


def _prepare(tale: Tale) -> None:
    tale.task = tale.any(TASKS)
    tale.thing = tale.task.unit
    tale.hero = tale.person()


def does(tale: Tale) -> str:
    """The verb of the task."""
    return tale.verb(tale.task.verb, tale.hero)


def phrase_of(tale: Tale, value: int, extra: str = "") -> tuple[Amount, str]:
    """An amount of what is done: 8 pages, 2 baskets of apples, $5."""
    if tale.thing is DOLLAR and not extra:
        return tale.money(value)
    amount, words = tale.count(value, tale.thing, extra)
    return amount, words + ("" if extra else tale.task.extra)


def in_tense(tale: Tale) -> str:
    """The words before the size of the task: the book has, the order was for."""
    whole = tale.task.whole
    return whole.replace(" has", " had").replace(" is", " was") if tale.past else whole


def rate_of(tale: Tale, rate: int, spans: int) -> tuple[Amount, Amount, str]:
    """The rate, the number of spans and the words `8 pages a day for 5 days`."""
    per = tale.any(tale.task.per)
    each, phrase = phrase_of(tale, rate)
    every = tale.any((f"each {per}", f"every {per}", f"a {per}" if per != "hour" else "an hour"))
    lengths = {value: text for text, value in _LENGTHS[per]}
    if spans in lengths and tale.chance(0.6):
        count = tale.give(spans, lengths[spans])
        return each, count, f"{phrase} {every} for {count}"
    count, length = tale.count(spans, noun(per))
    return each, count, f"{phrase} {every} for {length}"


# --- openings --------------------------------------------------------------------------------------------------


def _some(tale: Tale) -> None:
    tale.value, phrase = phrase_of(tale, tale.pick(tale.accept))
    tale.fact(tale.hero, f"{does(tale)} {phrase} on {tale.any(lexicon.DAYS)}")


def _at_a_rate(tale: Tale) -> None:
    rate, spans = tale.factors(tale.accept)
    if tale.chance(0.25):
        spans, rate = (7, rate) if tale.accept(7 * rate) else (spans, rate)
    each, count, words = rate_of(tale, rate, spans)
    tale.fact(tale.hero, f"{does(tale)} {words}")
    tale.value = tale.step(each, "*", count, tale.thing)


def _two_days(tale: Tale) -> None:
    total = tale.pick(lambda number: number >= 2 and tale.accept(number), 2)
    first = tale.rng.randint(1, total - 1)
    one, other = tale.rng.sample(lexicon.DAYS, 2)
    left, phrase = phrase_of(tale, first)
    right, more = phrase_of(tale, total - first)
    short = tale.any((more, str(right))) if "$" not in more else more
    tale.fact(
        tale.hero,
        tale.any(
            (
                f"{does(tale)} {phrase} on {one} and {short} on {other}",
                f"{does(tale)} {phrase} in the morning and {short} in the evening",
                f"{does(tale)} {phrase} one day and {short} the next day",
            )
        ),
    )
    tale.value = tale.step(left, "+", right, tale.thing)


def _second_is_compared(tale: Tale) -> None:
    """One day's amount, the next day's by comparison; the running value is their total."""
    total = tale.pick(lambda number: number >= 4 and tale.accept(number), 4)
    first = tale.rng.randint(2, total - 2)
    second = total - first
    if first == second:
        raise DeadEndError
    one, other = tale.rng.sample(lexicon.DAYS, 2)
    base, phrase = phrase_of(tale, first)
    gap = tale.give(abs(second - first))
    compared = f"{gap} {'more' if second > first else 'fewer'} {tale.thing.form(gap.value)} than on {one}"
    tale.fact(tale.hero, f"{does(tale)} {phrase} on {one}")
    tale.fact(None, f"on {other} {tale.hero} {does(tale)} {compared}")
    later = tale.step(base, "+" if second > first else "-", gap, tale.thing, fixed=True)
    tale.value = tale.step(base, "+", later, tale.thing)


# --- events ----------------------------------------------------------------------------------------------------


def _more(tale: Tale) -> None:
    start = tale.value.value
    amount, phrase = phrase_of(tale, tale.pick(lambda number: tale.accept(start + number), 1, 99 - start), "more")
    tale.fact(tale.hero, f"{does(tale)} {phrase} {tale.any(('after that', 'the next day', 'later', 'at the weekend'))}")
    tale.run("+", amount)


def _more_at_a_rate(tale: Tale) -> None:
    start = tale.value.value
    rate, spans = tale.factors(lambda product: start + product <= 99 and tale.accept(start + product))
    each, count, words = rate_of(tale, rate, spans)
    tale.event(tale.hero, f"{does(tale)} {words}")
    tale.run("+", tale.step(each, "*", count, tale.thing))


# --- closings --------------------------------------------------------------------------------------------------


def _total(tale: Tale) -> None:
    asked = (
        "how much money"
        if tale.thing is DOLLAR and tale.chance(0.5)
        else f"how many {tale.thing.many}{tale.task.extra}"
    )
    tail = tale.any((" in total", " altogether", " in all", ""))
    tale.question(f"{asked} {tale.aux(tale.hero)} {tale.hero} {tale.task.verb}{tail}")


def _to_go(tale: Tale) -> None:
    goal, phrase = phrase_of(tale, tale.pick(lambda number: number > tale.value.value))
    tale.clauses.insert(0, Clause(None, f"{in_tense(tale)} {phrase}"))
    asked = f"how many {tale.any((tale.thing.many, f'more {tale.thing.many}'))}"
    left = f"{tale.aux(tale.hero)} {tale.hero} still have to {tale.task.verb}"
    be = tale.verb("be", many=True)
    remaining = f"how many {tale.thing.many} {be} left" if tale.thing is not DOLLAR else f"{asked} {left}"
    tale.question(tale.any((f"{asked} {left}", remaining)), movable=False)
    tale.value = tale.step(goal, "-", tale.value, tale.thing)


def _compared(tale: Tale) -> None:
    value = tale.value.value
    other = tale.person()
    theirs, phrase = phrase_of(tale, tale.pick(lambda number: number != value))
    verb = tale.task.verb
    tale.fact(other, f"{tale.verb(verb, other)} {phrase}")
    more, fewer = (tale.hero, other) if value > theirs.value else (other, tale.hero)
    tale.question(f"how many more {tale.thing.many} {tale.aux(more)} {more} {verb} than {fewer.obj}")
    pair = (tale.value, theirs) if value > theirs.value else (theirs, tale.value)
    tale.value = tale.step(pair[0], "-", pair[1], tale.thing)


OPENINGS = (Stage(0, 1.5, _some), Stage(1, 3, _at_a_rate), Stage(1, 2, _two_days), Stage(2, 1, _second_is_compared))
EVENTS = (Stage(1, 2, _more, term), Stage(2, 1.5, _more_at_a_rate, lambda value: 1 <= value <= 95))
CLOSINGS = (Stage(0, 4, _total), Stage(1, 2, _to_go, term), Stage(1, 1.2, _compared, term))
THEME = Theme("work", 1.6, staged(_prepare, OPENINGS, EVENTS, CLOSINGS))
