"""Short stories of nobody in particular: what each one has, what several cost, what a machine makes, equal shares."""

from offload_engine.evaluate.arithmetic import lexicon
from offload_engine.evaluate.arithmetic.lexicon import DAY, DOLLAR, HOUR, MINUTE, Noun, article, nouns
from offload_engine.evaluate.arithmetic.shopping import GOODS
from offload_engine.evaluate.arithmetic.stages import Theme, anything
from offload_engine.evaluate.arithmetic.tale import DeadEndError, Tale

_HOLDERS = nouns("child|children student boy girl player worker teacher visitor")
_MAKERS = (
    ("a machine", "make", nouns("toy box|boxes button pen candle"), (MINUTE, HOUR)),
    ("a printer", "print", nouns("page photo poster card"), (MINUTE, HOUR)),
    ("a factory", "make", nouns("car bike table chair lamp"), (HOUR, DAY)),
    ("a bakery", "bake", nouns("cake pie bun roll"), (HOUR, DAY)),
    ("a hen", "lay", nouns("egg"), (lexicon.WEEK, lexicon.MONTH)),
    ("a train", "travel", nouns("mile kilometer"), (MINUTE,)),
    ("a plant", "grow", nouns("inch centimeter"), (lexicon.WEEK, lexicon.MONTH)),
)


def _total_tail(tale: Tale) -> str:
    return tale.any(("", " in total", " altogether", " in all"))


def _each_has(tale: Tale) -> None:
    people, thing = tale.any(_HOLDERS), tale.any(lexicon.THINGS)
    number, size = tale.factors(anything)
    if tale.chance(0.5):
        count, who = tale.count(number, people)
        each, what = tale.count(size, thing)
        verb = tale.verb(tale.any(("have", "bring", "buy", "get")), many=True)
        tale.fact(None, tale.any((f"{who} each {verb} {what}", f"{who} {verb} {what} each")))
    else:
        count = tale.give(number)
        each, what = tale.count(size, thing)
        verb = tale.verb(tale.any(("have", "bring", "buy", "get")))
        tale.fact(None, f"each of {count} {people.many} {verb} {what}")
    do, be = tale.aux(many=True), tale.verb("be", many=True)
    they = f"how many {thing.many} {do} the {people.many} have{_total_tail(tale)}"
    tale.question(tale.any((they, f"how many {thing.many} {be} there{_total_tail(tale)}")))
    tale.step(count, "*", each, thing)


def _everybody_gets(tale: Tale) -> None:
    people, thing = tale.any(lexicon.GROUPS), tale.any(lexicon.THINGS)
    number, size = tale.factors(anything)
    form = tale.rng.random()
    be = tale.verb("be", many=True)
    verb = tale.any(("shared", "divided", "split"))
    if form < 0.5:
        total, what = tale.count(number * size, thing)
        count, who = tale.count(number, people)
        tale.fact(None, f"{what} {be} {verb} equally among {who}")
    else:
        count, who = tale.count(number, people)
        total, what = tale.count(number * size, thing)
        share = tale.verb(tale.any(("share", "divide", "split")), many=True)
        tale.fact(
            None, tale.any((f"{who} {share} {what} equally", f"{who} {share} {what}, and each gets the same number"))
        )
        if tale.past and "gets" in tale.clauses[-1].text:
            raise DeadEndError
    get = tale.any(("get", "receive", "have"))
    tale.question(f"how many {thing.many} {tale.aux()} each {people.one} {get}")
    tale.step(total, "/", count, thing)


def _costs(tale: Tale, goods: Noun, price: str) -> str:
    one = tale.any((f"{article(goods.one)} {goods.one}", f"one {goods.one}", f"each {goods.one}"))
    return f"{one} {tale.verb('cost')} {price}"


def _price_of_several(tale: Tale) -> None:
    goods = tale.any(GOODS)
    number, price = tale.factors(anything)
    each, cost = tale.money(price)
    tale.fact(None, _costs(tale, goods, cost))
    count, phrase = tale.count(number, goods)
    asked = tale.any(("how much", "how many dollars", "how much money"))
    tale.question(f"{asked} {tale.aux(many=True)} {phrase} cost{_total_tail(tale)}")
    tale.step(each, "*", count, DOLLAR)


def _price_of_one(tale: Tale) -> None:
    goods = tale.any(GOODS)
    number, price = tale.factors(anything)
    count, phrase = tale.count(number, goods)
    total, cost = tale.money(number * price)
    tale.fact(None, f"{phrase} {tale.verb('cost', many=True)} {cost}{tale.any(('', ' in total', ' altogether'))}")
    asked = tale.any(("how much", "how many dollars"))
    tale.question(f"{asked} {tale.aux()} {tale.any(('one', 'each'))} {goods.one} cost")
    tale.step(total, "/", count, DOLLAR)


def _price_by_price(tale: Tale) -> None:
    """The price of some tells the price of others: two steps."""
    goods = tale.any(GOODS)
    number, price = tale.factors(anything)
    wanted = tale.rng.randint(2, 12)
    if wanted == number:
        raise DeadEndError
    count, phrase = tale.count(number, goods)
    total, cost = tale.money(number * price)
    tale.fact(None, f"{phrase} {tale.verb('cost', many=True)} {cost}")
    other, others = tale.count(wanted, goods)
    asked = tale.any(("how much", "how many dollars"))
    tale.question(f"{asked} {tale.aux(many=True)} {others} cost")
    tale.step(tale.step(total, "/", count, DOLLAR), "*", other, DOLLAR)


def _made_in_time(tale: Tale, steps: int) -> None:
    maker, verb, things, spans = tale.any(_MAKERS)
    thing, span = tale.any(things), tale.any(spans)
    rate, time = tale.factors(anything)
    each, made = tale.count(rate, thing)
    every = tale.any(
        (f"each {span.one}", f"every {span.one}", f"{article(span.one)} {span.one}" if span != HOUR else "an hour")
    )
    it = f"the{maker[1:]}"
    if steps == 2:
        first = tale.rng.randint(2, 12)
        total, made = tale.count(rate * first, thing)
        begun, start = tale.count(first, span)
        tale.fact(None, f"{maker} {tale.verb(verb)} {made} in {start}")
        count, phrase = tale.count(time, span)
        tale.question(f"how many {thing.many} {tale.aux()} it {verb} in {phrase}", movable=False)
        tale.step(tale.step(total, "/", begun, thing), "*", count, thing)
        return
    tale.fact(None, f"{maker} {tale.verb(verb)} {made} {every}")
    if tale.chance(0.6):
        count, phrase = tale.count(time, span)
        tale.question(f"how many {thing.many} {tale.aux()} {tale.any(('it', it))} {verb} in {phrase}", movable=False)
        tale.step(each, "*", count, thing)
    else:
        total, phrase = tale.count(rate * time, thing)
        tale.question(f"how many {span.many} {tale.aux()} {tale.any(('it', it))} need for {phrase}", movable=False)
        tale.step(total, "/", each, span)


def _two_prices(tale: Tale) -> None:
    """Several of two kinds of goods: three steps."""
    one, other = tale.rng.sample(GOODS, 2)
    number, price = tale.factors(lambda product: product <= 80)
    more, price2 = tale.factors(lambda product: product <= 99 - number * price)
    each, cost = tale.money(price)
    each2, cost2 = tale.money(price2)
    tale.fact(None, _costs(tale, one, cost))
    tale.fact(None, _costs(tale, other, cost2))
    count, phrase = tale.count(number, one)
    count2, phrase2 = tale.count(more, other)
    tale.question(f"how much {tale.aux(many=True)} {phrase} and {phrase2} cost{_total_tail(tale)}")
    first = tale.step(each, "*", count, DOLLAR)
    tale.step(first, "+", tale.step(each2, "*", count2, DOLLAR), DOLLAR)


def _build(tale: Tale, steps: int) -> None:
    if steps == 3:
        _two_prices(tale)
    elif steps == 2:
        if tale.chance(0.5):
            _price_by_price(tale)
        else:
            _made_in_time(tale, steps)
    elif tale.chance(0.3):
        _made_in_time(tale, steps)
    else:
        tale.any((_each_has, _everybody_gets, _price_of_several, _price_of_one))(tale)


THEME = Theme("each", 1.2, _build, (1, 2, 3))
