"""How stories of belongings end: what is counted, shared, packed, sold or compared."""

from offload_engine.evaluate.arithmetic import lexicon
from offload_engine.evaluate.arithmetic.possessions import container, hero_does, the_rest
from offload_engine.evaluate.arithmetic.stages import Stage, divisible, divisors, factor, term
from offload_engine.evaluate.arithmetic.tale import Tale


def _now(tale: Tale) -> None:
    hero, many = tale.hero, tale.thing.many
    if len(tale.steps) == 1 and not any(clause.event for clause in tale.clauses):
        tail = tale.any((" in total", " altogether", "", " in all"))
    elif tale.lost:
        tail = tale.any((" left", " left", " now", " remaining"))
    else:
        tail = tale.any((" now", " now", " in total", " in the end"))
    if tale.past and tail.strip() in ("now", "left") and tale.chance(0.5):
        has = "do" if hero.first else "does"
        tale.question(f"how many {many} {has} {hero} have", " now", movable=False, present=True)
    else:
        tale.question(f"how many {many} {tale.aux(hero)} {hero} have", tail)


def _share(tale: Tale) -> None:
    people = tale.any(divisors(tale.value.value))
    group = tale.any(lexicon.GROUPS)
    count, phrase = tale.count(people, group)
    verb = hero_does(tale, tale.any(("share", "divide", "split")))
    what = the_rest(tale)
    tale.event(
        tale.hero, f"{verb} {what} equally {tale.any(('among', 'between')) if people == 2 else 'among'} {phrase}"
    )
    get = tale.any(("get", "receive"))
    tale.question(f"how many {tale.thing.many} {tale.aux()} each {group.one} {get}")
    tale.run("/", count)


def _pack(tale: Tale) -> None:
    size = tale.any(divisors(tale.value.value))
    holder = container(tale)
    verb = hero_does(tale, tale.any(("put", "pack", "place")))
    what = the_rest(tale)
    if tale.chance(0.5):
        number, phrase = tale.count(size, tale.thing)
        words = tale.any((f"into {holder.many} of {phrase} each", f"in {holder.many} with {phrase} in each"))
        tale.event(tale.hero, f"{verb} {what} {words}")
        tale.question(f"how many {holder.many} {tale.aux(tale.hero)} {tale.hero} {tale.any(('need', 'fill', 'use'))}")
        tale.value = tale.step(tale.value, "/", number, holder)
    else:
        number, phrase = tale.count(size, holder)
        tale.event(tale.hero, f"{verb} {what} equally into {phrase}")
        be = tale.verb("be", many=True)
        tale.question(f"how many {tale.thing.many} {be} in each {holder.one}")
        tale.run("/", number)


def _compare(tale: Tale) -> None:
    other = tale.person()
    value = tale.value.value
    theirs = tale.pick(lambda number: number != value)
    amount, phrase = tale.count(theirs, tale.thing)
    tale.fact(other, f"{tale.verb('have', other)} {phrase}")
    more, fewer = (tale.hero, other) if value > theirs else (other, tale.hero)
    things = tale.thing.many
    if tale.chance(0.75):
        core = f"how many more {things} {tale.aux(more)} {more} have than {fewer.obj}"
    else:
        core = f"how many fewer {things} {tale.aux(fewer)} {fewer} have than {more.obj}"
    tale.question(core)
    pair = (tale.value, amount) if value > theirs else (amount, tale.value)
    tale.value = tale.step(pair[0], "-", pair[1], tale.thing)


def _together(tale: Tale) -> None:
    other = tale.person()
    amount, phrase = tale.count(tale.pick(bool, 1, 99 - tale.value.value), tale.thing)
    tale.fact(other, f"{tale.verb('have', other)} {phrase}")
    people = tale.any(("they", f"{other.name} and {tale.hero.name}")) if not tale.hero.first else "we"
    tail = tale.any((" together", " altogether", " in total", " in all"))
    tale.question(f"how many {tale.thing.many} {tale.aux(many=True)} {people} have{tail}", movable=people != "they")
    tale.run("+", amount)


def _needs_more(tale: Tale) -> None:
    goal = tale.pick(lambda number: number > tale.value.value)
    amount, phrase = tale.count(goal, tale.thing)
    verb = hero_does(tale, tale.any(("need", "want")))
    what = phrase if verb.startswith("need") else f"to have {phrase}"
    tale.fact(tale.hero, f"{verb} {what}{tale.any(('', ' in total', ' in all'))}")
    tale.question(f"how many more {tale.thing.many} {tale.aux(tale.hero)} {tale.hero} need", movable=False)
    tale.value = tale.step(amount, "-", tale.value, tale.thing)


def _sell_all(tale: Tale) -> None:
    price, phrase = tale.money(tale.rng.randint(2, 12))
    what = the_rest(tale)
    tale.event(tale.hero, f"{hero_does(tale, 'sell')} {what} for {phrase} each")
    asked = tale.any(("how much money", "how many dollars"))
    tale.question(f"{asked} {tale.aux(tale.hero)} {tale.hero} {tale.any(('get', 'earn', 'make'))}")
    tale.value = tale.step(tale.value, "*", price, lexicon.DOLLAR)


def _other_has_times(tale: Tale) -> None:
    other = tale.person()
    times, words = tale.times(tale.rng.randint(2, 12))
    tale.fact(other, f"{tale.verb('have', other)} {words} as many {tale.thing.many} as {tale.hero.obj}")
    tale.question(f"how many {tale.thing.many} {tale.aux(other)} {other} have")
    tale.run("*", times)


CLOSINGS = (
    Stage(0, 7, _now),
    Stage(1, 1.6, _share, divisible),
    Stage(1, 1.6, _pack, divisible),
    Stage(1, 1, _compare, term),
    Stage(1, 1, _together, term),
    Stage(1, 0.8, _needs_more, term),
    Stage(1, 1, _sell_all, factor),
    Stage(1, 0.6, _other_has_times, factor),
)
