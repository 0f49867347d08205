"""Stories of somebody's money: earned, saved, spent, given, missing."""

from offload_engine.evaluate.arithmetic import lexicon
from offload_engine.evaluate.arithmetic.lexicon import DOLLAR, article, noun, nouns
from offload_engine.evaluate.arithmetic.shopping import GOODS
from offload_engine.evaluate.arithmetic.stages import Stage, Theme, divisible, divisors, factor, losable, staged, term
from offload_engine.evaluate.arithmetic.tale import Clause, Tale

_EARNED_BY = (
    "washing cars",
    "walking dogs",
    "selling lemonade",
    "helping a neighbor",
    "cleaning windows",
    "mowing lawns",
)
_SPENT_ON = ("lunch", "a ticket", "a present", "food", "clothes", "the bus", "toys", "a movie")


def _prepare(tale: Tale) -> None:
    tale.thing = DOLLAR
    tale.hero = tale.person()


def _do(tale: Tale, verb: str) -> str:
    return tale.verb(verb, tale.hero)


def _has(tale: Tale) -> None:
    tale.value, phrase = tale.money(tale.pick(tale.accept))
    tale.fact(tale.hero, f"{_do(tale, tale.any(('have', 'have', 'save', 'earn')))} {phrase}")


def _earns_by_time(tale: Tale) -> None:
    rate, time = tale.factors(tale.accept)
    each, phrase = tale.money(rate)
    verb, span = tale.any((("earn", "hour"), ("earn", "day"), ("save", "week"), ("save", "month"), ("get", "day")))
    every = tale.any((f"each {span}", f"every {span}", "an hour" if span == "hour" else f"a {span}"))
    count, length = tale.count(time, noun(span))
    if verb == "earn" and tale.chance(0.4):
        tale.clauses += [
            Clause(tale.hero, f"{_do(tale, verb)} {phrase} {every}"),
            Clause(tale.hero, f"{_do(tale, 'work')} {length}"),
        ]
    else:
        tale.fact(tale.hero, f"{_do(tale, verb)} {phrase} {every} for {length}")
    tale.value = tale.step(each, "*", count, DOLLAR)


def _sells(tale: Tale) -> None:
    number, price = tale.factors(tale.accept)
    goods = tale.any(GOODS)
    count, phrase = tale.count(number, goods)
    each, cost = tale.money(price)
    tale.fact(tale.hero, f"{_do(tale, 'sell')} {phrase} {tale.any((f'for {cost} each', f'at {cost} each'))}")
    tale.value = tale.step(count, "*", each, DOLLAR)


def _gain(tale: Tale) -> None:
    start = tale.value.value
    value = tale.pick(lambda number: tale.accept(start + number), 1, 99 - start)
    amount, phrase = tale.money(value)
    if not tale.dollar_sign and tale.chance(0.4):
        phrase = f"{amount} more {DOLLAR.form(value)}"
    form = tale.rng.random()
    if form < 0.5:
        tale.event(tale.hero, f"{_do(tale, 'earn')} {phrase} {tale.any(('by', 'for'))} {tale.any(_EARNED_BY)}")
    elif form < 0.75:
        tale.event(tale.hero, f"{_do(tale, 'get')} {phrase} from {tale.relative(tale.hero)}")
    else:
        tale.event(None, f"{tale.relative(tale.hero)} {tale.verb('give')} {tale.hero.obj} {phrase}")
    tale.run("+", amount)


def _spend(tale: Tale) -> None:
    start = tale.value.value
    amount, phrase = tale.money(tale.pick(lambda number: tale.accept(start - number), 1, start))
    goods = tale.any(GOODS)
    form = tale.rng.random()
    if form < 0.45:
        tale.event(tale.hero, f"{_do(tale, 'spend')} {phrase} on {tale.any(_SPENT_ON)}")
    elif form < 0.8:
        tale.event(tale.hero, f"{_do(tale, 'buy')} {article(goods.one)} {goods.one} for {phrase}")
    else:
        tale.event(tale.hero, f"{_do(tale, 'give')} {phrase} to {tale.relative(tale.hero)}")
    tale.run("-", amount)


def _buy_several(tale: Tale) -> None:
    start = tale.value.value
    number, price = tale.factors(lambda product: product <= start and tale.accept(start - product))
    count, phrase = tale.count(number, tale.any(GOODS))
    each, cost = tale.money(price)
    tale.event(tale.hero, f"{_do(tale, 'buy')} {phrase} {tale.any((f'for {cost} each', f'at {cost} each'))}")
    tale.run("-", tale.step(count, "*", each, DOLLAR))


# --- closings --------------------------------------------------------------------------------------------------


def _now(tale: Tale) -> None:
    asked = tale.any(("how much money", "how many dollars"))
    tail = tale.any((" left", " left", " now")) if tale.lost else tale.any((" now", " in total", " altogether"))
    tale.question(f"{asked} {tale.aux(tale.hero)} {tale.hero} have", tail)


def _missing(tale: Tale) -> None:
    price, phrase = tale.money(tale.pick(lambda number: number > tale.value.value))
    goods = tale.any(nouns("bike game watch|watches guitar tent camera skateboard chair table phone"))
    if tale.chance(0.5):
        tale.fact(tale.hero, f"{_do(tale, 'want')} to buy a {goods.one} that {tale.verb('cost')} {phrase}")
    else:
        tale.clauses.insert(0, Clause(None, f"a {goods.one} {tale.verb('cost')} {phrase}"))
    asked = tale.any(("how much more money", "how many more dollars"))
    what = f" to buy the {goods.one}" if tale.chance(0.6) else f" for the {goods.one}"
    tale.question(f"{asked} {tale.aux(tale.hero)} {tale.hero} need{what}", movable=False)
    tale.value = tale.step(price, "-", tale.value, DOLLAR)


def _how_many(tale: Tale) -> None:
    """How many things of one price the money buys."""
    goods = tale.any(GOODS)
    each, phrase = tale.money(tale.any(divisors(tale.value.value)))
    one = tale.any((f"{article(goods.one)} {goods.one}", f"one {goods.one}", f"each {goods.one}"))
    rest = tale.any(("the rest", "the rest of the money")) if tale.lost else tale.any(("all the money", "this money"))
    if tale.chance(0.5):
        tale.fact(None, f"{one} {tale.verb('cost')} {phrase}")
        tale.question(
            f"how many {goods.many} {'could' if tale.past else 'can'} {tale.hero} buy{tale.any(('', f' with {rest}'))}",
            movable=False,
        )
    else:
        tale.event(tale.hero, f"{_do(tale, 'spend')} {rest} on {goods.many} at {phrase} each")
        tale.question(f"how many {goods.many} {tale.aux(tale.hero)} {tale.hero} buy")
    tale.value = tale.step(tale.value, "/", each, goods)


def _share(tale: Tale) -> None:
    group = tale.any(lexicon.GROUPS)
    count, phrase = tale.count(tale.any(divisors(tale.value.value)), group)
    rest = tale.any(("the rest", "the rest of the money")) if tale.lost else "the money"
    verb = _do(tale, tale.any(("share", "divide", "split")))
    tale.event(tale.hero, f"{verb} {rest} equally among {phrase}")
    asked = tale.any(("how much money", "how many dollars"))
    tale.question(f"{asked} {tale.aux()} each {group.one} {tale.any(('get', 'receive'))}")
    tale.run("/", count)


def _compared(tale: Tale) -> None:
    value = tale.value.value
    other = tale.person()
    theirs, phrase = tale.money(tale.pick(lambda number: number != value))
    tale.fact(other, f"{tale.verb('have', other)} {phrase}")
    more, fewer = (tale.hero, other) if value > theirs.value else (other, tale.hero)
    tale.question(
        f"{tale.any(('how much more money', 'how many more dollars'))} {tale.aux(more)} {more} have than {fewer.obj}"
    )
    pair = (tale.value, theirs) if value > theirs.value else (theirs, tale.value)
    tale.value = tale.step(pair[0], "-", pair[1], DOLLAR)


def _other_has_times(tale: Tale) -> None:
    other = tale.person()
    times, words = tale.times(tale.rng.randint(2, 12))
    tale.fact(other, f"{tale.verb('have', other)} {words} as much money as {tale.hero.obj}")
    tale.question(f"how {tale.any(('much money', 'many dollars'))} {tale.aux(other)} {other} have")
    tale.run("*", times)


OPENINGS = (Stage(0, 3, _has), Stage(1, 2.5, _earns_by_time), Stage(1, 1, _sells))
EVENTS = (
    Stage(1, 2, _gain, term),
    Stage(1, 2.5, _spend, losable),
    Stage(2, 2, _buy_several, lambda value: 4 <= value <= 99),
)
CLOSINGS = (
    Stage(0, 4, _now),
    Stage(1, 1.5, _missing, term),
    Stage(1, 1.5, _how_many, divisible),
    Stage(1, 0.8, _share, divisible),
    Stage(1, 0.8, _compared, term),
    Stage(1, 0.5, _other_has_times, factor),
)
THEME = Theme("purse", 1.4, staged(_prepare, OPENINGS, EVENTS, CLOSINGS))
