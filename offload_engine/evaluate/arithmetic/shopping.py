"""Stories of buying: prices, totals, change, what is left and what is missing."""

from offload_engine.evaluate.arithmetic import lexicon
from offload_engine.evaluate.arithmetic.lexicon import Noun, article, nouns
from offload_engine.evaluate.arithmetic.stages import Stage, Theme, divisible, divisors, staged, term
from offload_engine.evaluate.arithmetic.tale import Amount, Clause, DeadEndError, Tale

GOODS = (
    *(
        thing
        for thing in lexicon.THINGS
        if thing.family in ("toy", "supplies", "clothes", "reading", "flower", "fragile")
    ),
    *nouns("cake pizza ticket lamp chair bike watch|watches bag radio blanket pillow sandwich drink umbrella plant"),
)


def _prepare(tale: Tale) -> None:
    tale.hero = tale.person()
    tale.thing = lexicon.DOLLAR
    tale.unnamed = tale.rng.sample(GOODS, 6)


def _new(tale: Tale) -> Noun:
    """Goods the story has not named yet."""
    if not tale.unnamed:
        raise DeadEndError
    return tale.unnamed.pop()


def _buys(tale: Tale) -> str:
    return tale.verb("buy" if tale.chance(0.85) else "order", tale.hero)


def _a(thing: Noun) -> str:
    return f"{article(thing.one)} {thing.one}"


def _several_at_a_price(tale: Tale, number: int, price: int, also: bool = False) -> Amount:
    """Tells that the hero buys some goods of one price ; returns their cost."""
    goods = _new(tale)
    also_word = tale.any((" also", "")) if also else ""
    if also or tale.chance(0.45):
        count, phrase = tale.count(number, goods)
        each, cost = tale.money(price)
        ending = tale.any((f"for {cost} each", f"at {cost} each", f"that cost {cost} each"))
        verb = tale.verb("buy", tale.hero)
        tale.fact(
            tale.hero, f"{verb}{also_word} {phrase} {ending}" if not also_word else f"also {verb} {phrase} {ending}"
        )
    else:
        each, cost = tale.money(price)
        count, phrase = tale.count(number, goods)
        costs = tale.verb("cost")
        priced = tale.any(
            (f"{_a(goods)} {costs} {cost}", f"one {goods.one} {costs} {cost}", f"each {goods.one} {costs} {cost}")
        )
        clauses = [Clause(None, priced), Clause(tale.hero, f"{_buys(tale)} {phrase}")]
        tale.clauses += clauses[::-1] if tale.chance(0.25) else clauses
    return tale.step(count, "*", each, lexicon.DOLLAR)


# --- openings --------------------------------------------------------------------------------------------------


def _one_thing(tale: Tale) -> None:
    goods = _new(tale)
    tale.value, cost = tale.money(tale.pick(tale.accept))
    tale.fact(tale.hero, f"{_buys(tale)} {_a(goods)} for {cost}")


def _several(tale: Tale) -> None:
    number, price = tale.factors(tale.accept)
    tale.value = _several_at_a_price(tale, number, price)


def _two_things(tale: Tale) -> None:
    total = tale.pick(lambda number: number >= 2 and tale.accept(number), 2)
    first = tale.rng.randint(1, total - 1)
    one, other = _new(tale), _new(tale)
    left, left_cost = tale.money(first)
    right, right_cost = tale.money(total - first)
    costs = tale.verb("cost")
    if tale.chance(0.5):
        tale.fact(tale.hero, f"{_buys(tale)} {_a(one)} for {left_cost} and {_a(other)} for {right_cost}")
    else:
        tale.fact(None, f"{_a(one)} {costs} {left_cost} and {_a(other)} {costs} {right_cost}")
        tale.fact(tale.hero, f"{_buys(tale)} {tale.any(('both', 'one of each'))}")
    tale.value = tale.step(left, "+", right, lexicon.DOLLAR)


def _compared(tale: Tale) -> None:
    """One price told by another: the hero buys the second thing."""
    one, other = _new(tale), _new(tale)
    more = tale.chance(0.5)
    result = tale.pick(tale.accept, 1, 98)
    base_value = tale.rng.randint(1, result - 1) if more and result > 1 else tale.rng.randint(result + 1, 99)
    difference_value = abs(result - base_value)
    base, cost = tale.money(base_value)
    difference, gap = tale.money(difference_value)
    costs = tale.verb("cost")
    operator = "+" if result > base_value else "-"
    tale.fact(None, f"{_a(one)} {costs} {cost}")
    tale.fact(None, f"{_a(other)} {costs} {gap} {'more' if operator == '+' else 'less'} than the {one.one}")
    tale.fact(tale.hero, f"{_buys(tale)} the {other.one}")
    tale.value = tale.step(base, operator, difference, lexicon.DOLLAR, fixed=True)


# --- events ----------------------------------------------------------------------------------------------------


def _another(tale: Tale) -> None:
    spent = tale.value.value
    goods = _new(tale)
    amount, cost = tale.money(tale.pick(lambda number: tale.accept(spent + number), 1, 99 - spent))
    verb = tale.verb("buy", tale.hero)
    tale.fact(tale.hero, tale.any((f"also {verb} {_a(goods)} for {cost}", f"{verb} {_a(goods)} for {cost}")))
    tale.run("+", amount)


def _several_more(tale: Tale) -> None:
    spent = tale.value.value
    number, price = tale.factors(lambda product: spent + product <= 99 and tale.accept(spent + product))
    tale.run("+", _several_at_a_price(tale, number, price, also=True))


def _discount(tale: Tale) -> None:
    spent = tale.value.value
    amount, cost = tale.money(tale.pick(lambda number: tale.accept(spent - number), 1, spent - 1))
    gets, has = tale.verb("get", tale.hero), tale.verb("have", tale.hero)
    tale.fact(tale.hero, tale.any((f"{gets} a discount of {cost}", f"{has} a coupon for {cost} off the total")))
    tale.run("-", amount)


# --- closings --------------------------------------------------------------------------------------------------


def _total(tale: Tale) -> None:
    aux, hero = tale.aux(tale.hero), tale.hero
    verb = tale.any(("pay", "spend", "pay"))
    tail = tale.any((" in total", " altogether", " in all", ""))
    tale.question(f"how {tale.any(('much money', 'many dollars', 'much'))} {aux} {hero} {verb}{tail}")


def _change(tale: Tale) -> None:
    amount, cash = tale.money(tale.pick(lambda number: number >= tale.value.value))
    pays = tale.verb("pay", tale.hero)
    tale.fact(
        tale.hero,
        tale.any((f"{pays} with {cash}", f"{pays} with {cash}", f"{tale.verb('give', tale.hero)} the seller {cash}")),
    )
    get = tale.any(("get", "get back", "receive"))
    tale.question(f"how {tale.any(('much', 'many dollars in'))} change {tale.aux(tale.hero)} {tale.hero} {get}")
    tale.value = tale.step(amount, "-", tale.value, lexicon.DOLLAR)


def _left(tale: Tale) -> None:
    amount, cash = tale.money(tale.pick(lambda number: number >= tale.value.value))
    has = tale.verb("have", tale.hero)
    tale.clauses.insert(0, Clause(tale.hero, f"{has} {cash}"))
    asked = tale.any(("how much money", "how many dollars"))
    tale.question(f"{asked} {tale.aux(tale.hero)} {tale.hero} have", tale.any((" left", " left", " now")))
    tale.value = tale.step(amount, "-", tale.value, lexicon.DOLLAR)


def _missing(tale: Tale) -> None:
    cost = tale.value.value
    amount, cash = tale.money(tale.rng.randint(1, cost - 1))
    tale.fact(tale.hero, f"{tale.verb('have', tale.hero)} only {cash}")
    asked = tale.any(("how much more money", "how many more dollars"))
    tale.question(f"{asked} {tale.aux(tale.hero)} {tale.hero} need", movable=False)
    tale.run("-", amount)


def _divide(tale: Tale) -> None:
    group = tale.any(nouns("friend classmate neighbor person|people"))
    count, phrase = tale.count(tale.any(divisors(tale.value.value)), group)
    be = tale.verb("be")
    verb = tale.verb("share", many=count.value > 1)
    tale.fact(None, tale.any((f"the cost {be} shared equally by {phrase}", f"{phrase} {verb} the cost equally")))
    tale.question(f"how {tale.any(('much', 'many dollars'))} {tale.aux()} each {group.one} pay")
    tale.run("/", count)


OPENINGS = (Stage(0, 1.5, _one_thing), Stage(1, 4, _several), Stage(1, 1.5, _two_things), Stage(1, 1, _compared))
EVENTS = (
    Stage(1, 2, _another, term),
    Stage(2, 2, _several_more, lambda value: 1 <= value <= 95),
    Stage(1, 0.8, _discount, lambda value: 2 <= value <= 99),
)
CLOSINGS = (
    Stage(0, 3, _total),
    Stage(1, 2.5, _change, term),
    Stage(1, 2, _left, term),
    Stage(1, 0.8, _missing, lambda value: 2 <= value <= 99),
    Stage(1, 0.7, _divide, divisible),
)
THEME = Theme("shopping", 1.8, staged(_prepare, OPENINGS, EVENTS, CLOSINGS))
