"""Stories of lengths, weights and volumes that are cut, poured, joined and compared."""

from offload_engine.evaluate.arithmetic.lexicon import Noun, noun
from offload_engine.evaluate.arithmetic.settings import STUFF
from offload_engine.evaluate.arithmetic.stages import Stage, Theme, divisible, divisors, losable, staged, term
from offload_engine.evaluate.arithmetic.tale import Tale


def _prepare(tale: Tale) -> None:
    tale.stuff = tale.any(STUFF)
    tale.thing = noun(tale.any(tale.stuff.units))


def _size(tale: Tale, phrase: str) -> str:
    words = tale.stuff.size.format(phrase)
    return words.replace("is ", "was ").replace("holds ", "held ") if tale.past else words


def _has_size(tale: Tale) -> None:
    tale.value, phrase = tale.count(tale.pick(tale.accept), tale.thing)
    tale.fact(None, f"{tale.any(('a', 'the'))} {tale.stuff.name} {_size(tale, phrase)}")


def _several(tale: Tale) -> None:
    """The running value is the total of several equal ones."""
    number, size = tale.factors(tale.accept)
    count, phrase = tale.count(number, noun(tale.stuff.part))
    each, in_each = tale.count(size, tale.thing)
    be = tale.verb("be")
    of = "from" if "long" in tale.stuff.size else "with the contents of"
    made = "made" if "long" in tale.stuff.size else "filled"
    tale.fact(None, f"a {tale.stuff.name} {be} {made} {of} {phrase} of {in_each} each")
    tale.value = tale.step(count, "*", each, tale.thing)


def _participle(tale: Tale, phrase: str, many: bool, words: tuple[str, ...]) -> str:
    return f"{phrase} {tale.verb('be', many=many)} {tale.any(words)}"


def _take(tale: Tale) -> None:
    start = tale.value.value
    value = tale.pick(lambda number: tale.accept(start - number), 1, start)
    amount, phrase = tale.count(value, tale.thing)
    tale.event(None, _participle(tale, phrase, value != 1, tale.stuff.taken))
    tale.run("-", amount)


def _add(tale: Tale) -> None:
    start = tale.value.value
    value = tale.pick(lambda number: tale.accept(start + number), 1, 99 - start)
    amount, phrase = tale.count(value, tale.thing, tale.any(("", "more")))
    tale.event(None, _participle(tale, phrase, value != 1, tale.stuff.added))
    tale.run("+", amount)


def _take_several(tale: Tale) -> None:
    start = tale.value.value
    number, size = tale.factors(lambda product: product <= start and tale.accept(start - product))
    count, phrase = tale.count(number, noun(tale.stuff.part))
    each, in_each = tale.count(size, tale.thing)
    words = ("cut off", "used") if "long" in tale.stuff.size else ("filled from it", "taken from it")
    tale.event(None, _participle(tale, f"{phrase} of {in_each} each", True, words))
    tale.run("-", tale.step(count, "*", each, tale.thing))


def _left(tale: Tale) -> None:
    be, many = tale.verb("be", many=True), tale.thing.many
    if "long" in tale.stuff.size:
        long = f"how many {many} long {tale.verb('be')} the {tale.stuff.name}"
        long = long if tale.chance(0.6) else f"how long {tale.verb('be')} the {tale.stuff.name}"
        tale.question(tale.any((f"how many {many} {be} left", long)) if tale.lost else long, tale.any((" now", "")))
    else:
        where = tale.any((f"in the {tale.stuff.name}", f"left in the {tale.stuff.name}" if tale.lost else "there"))
        tale.question(f"how many {many} {be} {where}", tale.any((" now", "")))


def _cut_up(tale: Tale) -> None:
    number = tale.any(divisors(tale.value.value))
    part: Noun = noun(tale.stuff.part)
    be, what = tale.verb("be"), f"the {tale.stuff.name}" if not tale.lost else tale.any(("the rest", "what is left"))
    what = "the rest" if tale.past and what == "what is left" else what
    how = "cut into" if "long" in tale.stuff.size else "filled into"
    if tale.chance(0.5):
        count, phrase = tale.count(number, part)
        tale.event(
            None, f"{what if how == 'cut into' or tale.lost else 'all of it'} {be} {how} {count} equal {part.many}"
        )
        long = f"how many {tale.thing.many} long {be} each piece"
        tale.question(
            long if how == "cut into" else f"how many {tale.thing.many} {tale.verb('be', many=True)} in each {part.one}"
        )
        tale.run("/", count)
    else:
        size, phrase = tale.count(number, tale.thing)
        tale.event(
            None, f"{what if how == 'cut into' or tale.lost else 'all of it'} {be} {how} {part.many} of {phrase} each"
        )
        tale.question(f"how many {part.many} {tale.verb('be', many=True)} there")
        tale.value = tale.step(tale.value, "/", size, part)


def _compared(tale: Tale) -> None:
    value = tale.value.value
    theirs, phrase = tale.count(tale.pick(lambda number: number != value), tale.thing)
    name = tale.stuff.name
    tale.fact(None, f"another {name} {_size(tale, phrase)}")
    if "long" in tale.stuff.size:
        more = "longer" if value > theirs.value else "shorter"
        tale.question(f"how many {tale.thing.many} {more} {tale.verb('be')} the first {name} than the other one")
    else:
        tale.question(f"how many {tale.thing.many} {tale.verb('be', many=True)} in both {noun(name).many} together")
        tale.run("+", theirs)
        return
    pair = (tale.value, theirs) if value > theirs.value else (theirs, tale.value)
    tale.value = tale.step(pair[0], "-", pair[1], tale.thing)


OPENINGS = (Stage(0, 3, _has_size), Stage(1, 0.8, _several))
EVENTS = (
    Stage(1, 3, _take, losable),
    Stage(1, 1.5, _add, term),
    Stage(2, 1.5, _take_several, lambda value: 4 <= value <= 99),
)
CLOSINGS = (Stage(0, 3, _left), Stage(1, 1.5, _cut_up, divisible), Stage(1, 1, _compared, term))
THEME = Theme("measures", 0.9, staged(_prepare, OPENINGS, EVENTS, CLOSINGS))
