"""Stories of what somebody has, gets, gives away, shares, packs or compares."""

from tools.arithmetic import lexicon
from tools.arithmetic.lexicon import Noun
from tools.arithmetic.relations import relate
from tools.arithmetic.stages import Stage, Theme, anything, divisible, divisors, factor, losable, staged, term
from tools.arithmetic.tale import Accept, Amount, Clause, DeadEndError, Tale

_GAINED = {
    "fruit": ("pick", "buy", "get", "find"),
    "baked": ("bake", "buy", "make"),
    "snack": ("buy", "get", "make"),
    "vegetable": ("pick", "buy", "grow"),
    "supplies": ("buy", "get", "find", "order"),
    "toy": ("buy", "get", "win", "make"),
    "collected": ("find", "collect", "buy", "get"),
    "reading": ("buy", "get", "borrow", "order"),
    "flower": ("pick", "buy", "grow"),
    "fragile": ("buy", "get", "find"),
    "clothes": ("buy", "get", "order", "make"),
    "hardware": ("buy", "find", "get", "order"),
}
_LOST = {
    "fruit": ("eat", "sell", "use", "give away", "throw away"),
    "baked": ("eat", "sell", "give away", "drop"),
    "snack": ("eat", "give away", "sell"),
    "vegetable": ("use", "eat", "sell", "throw away"),
    "supplies": ("lose", "give away", "use", "lend"),
    "toy": ("lose", "give away", "break", "sell"),
    "collected": ("lose", "give away", "sell", "send"),
    "reading": ("lend", "give away", "sell", "return"),
    "flower": ("give away", "sell", "throw away", "use"),
    "fragile": ("break", "sell", "give away", "drop"),
    "clothes": ("give away", "donate", "sell", "lose"),
    "hardware": ("use", "lose", "sell", "give away"),
}


def _prepare(tale: Tale) -> None:
    tale.thing = tale.any(lexicon.THINGS)
    tale.hero = tale.person(tale.thing.family)


def container(tale: Tale) -> Noun:
    """Something that holds the things of the story."""
    special = lexicon.SPECIAL_CONTAINERS.get(tale.thing.family)
    return tale.any(special if special and tale.chance(0.6) else lexicon.CONTAINERS)


def _verb(tale: Tale, phrase: str) -> str:
    """A verb of the hero, with its particle: gives away."""
    base, _, particle = phrase.partition(" ")
    return tale.verb(base, tale.hero) + (f" {particle}" if particle else "")


def them(tale: Tale) -> str:
    """All the things: a pronoun only where nothing else was counted since."""
    plain = f"the {tale.thing.many}"
    return plain if tale.moved or tale.chance(0.5) else "them"


def the_rest(tale: Tale) -> str:
    """The things the story has come to, for its last event."""
    many = tale.thing.many
    if tale.lost:
        return tale.any(("the rest", f"the remaining {many}", f"the other {many}", f"the rest of the {many}"))
    return tale.any((them(tale), f"all the {many}", f"all of the {many}"))


# --- openings --------------------------------------------------------------------------------------------------


def _has(tale: Tale) -> None:
    value = tale.pick(tale.accept)
    tale.value, phrase = tale.count(value, tale.thing)
    verb = "have" if tale.chance(0.75) else tale.any(_GAINED[tale.thing.family])
    tale.fact(tale.hero, f"{_verb(tale, verb)} {phrase}")


def grouped(tale: Tale, accept: Accept) -> tuple[Amount, Amount, Noun, str]:
    """Counts of groups and of things in each, the group's noun and the words `3 boxes of 5 apples each`."""
    groups, size = tale.factors(accept)
    holder = container(tale)
    count, groups_phrase = tale.count(groups, holder)
    each, size_phrase = tale.count(size, tale.thing)
    words = tale.any(
        (
            f"{groups_phrase} of {size_phrase} each",
            f"{groups_phrase} with {size_phrase} in each",
            f"{groups_phrase} with {size_phrase} in each {holder.one}",
        )
    )
    return count, each, holder, words


def _has_groups(tale: Tale) -> None:
    verb = _verb(tale, tale.any(("have", "have", "buy")))
    if tale.chance(0.4):
        count, each, _, words = grouped(tale, tale.accept)
        tale.fact(tale.hero, f"{verb} {words}")
    else:
        groups, size = tale.factors(tale.accept)
        holder = container(tale)
        count, groups_phrase = tale.count(groups, holder)
        each, size_phrase = tale.count(size, tale.thing)
        holds = tale.verb(tale.any(("hold", "contain", "have")))
        there = f"there {tale.verb('be', many=True)} {size_phrase} in each {holder.one}"
        own = Clause(tale.hero, f"{verb} {groups_phrase}")
        inside = Clause(None, tale.any((f"each {holder.one} {holds} {size_phrase}", there)))
        tale.clauses += [own, inside]
    tale.value = tale.step(count, "*", each, tale.thing)


def _has_two_kinds(tale: Tale) -> None:
    total = tale.pick(lambda number: number >= 2 and tale.accept(number), 2)
    first = tale.rng.randint(1, total - 1)
    one, other = two_kinds(tale)
    left, right = tale.give(first), tale.give(total - first)
    have = _verb(tale, "have")
    things = tale.thing.form
    tale.fact(
        tale.hero,
        tale.any(
            (
                f"{have} {left} {one} {things(first)} and {right} {other} {things(total - first)}",
                f"{have} {left} {one} and {right} {other} {things(total - first)}",
            )
        ),
    )
    tale.value = tale.step(left, "+", right, tale.thing)


def two_kinds(tale: Tale) -> tuple[str, str]:
    """Two adjectives that tell things of a family apart."""
    if tale.thing.family in lexicon.COLOURED and tale.chance(0.7):
        one, other = tale.rng.sample(lexicon.COLOURS, 2)
        return one, other
    return tale.any(lexicon.CONTRASTS)


def _gets_on_two_days(tale: Tale) -> None:
    total = tale.pick(lambda number: number >= 2 and tale.accept(number), 2)
    first = tale.rng.randint(1, total - 1)
    days = tale.rng.sample(lexicon.DAYS, 2)
    verb = _verb(tale, tale.any(_GAINED[tale.thing.family]))
    left, phrase = tale.count(first, tale.thing)
    right = tale.give(total - first)
    more = tale.any(("", " more"))
    tale.fact(
        tale.hero,
        tale.any(
            (
                f"{verb} {phrase} on {days[0]} and {right}{more} on {days[1]}",
                f"{verb} {phrase} in the morning and {right}{more} in the afternoon",
            )
        ),
    )
    tale.value = tale.step(left, "+", right, tale.thing)


def _has_in_relation(tale: Tale) -> None:
    other = tale.person()
    relation = relate(tale, tale.thing, other.obj, tale.accept)
    known = Clause(other, f"{tale.verb('have', other)} {relation.base_phrase}")
    derived = Clause(tale.hero, f"{tale.verb('have', tale.hero)} {relation.words}")
    tale.clauses += [known, derived] if tale.chance(0.5) else [derived, known]
    tale.value = tale.step(relation.base, relation.operator, relation.by, tale.thing, fixed=True)


def _gets_a_share(tale: Tale) -> None:
    people, each = tale.factors(anything)
    if not tale.accept(each):
        raise DeadEndError
    group = tale.any(lexicon.GROUPS[3:5])
    count, group_phrase = tale.count(people, group)
    total, phrase = tale.count(people * each, tale.thing)
    split = tale.verb(tale.any(("share", "split")), many=True)
    be, are = tale.verb("be", tale.hero), tale.verb("be", many=True)
    tale.fact(
        None,
        tale.any(
            (
                f"{group_phrase} {split} {phrase} equally",
                f"{phrase} {are} shared equally by {group_phrase}",
                f"{phrase} {are} divided equally among {group_phrase}",
            )
        ),
    )
    tale.fact(tale.hero, f"{be} one of the {group.many}")
    tale.value = tale.step(total, "/", count, tale.thing)


# --- events ----------------------------------------------------------------------------------------------------


def _gain(tale: Tale) -> None:
    value = tale.pick(lambda number: tale.accept(tale.value.value + number), 1, 99 - tale.value.value)
    form = tale.rng.random()
    if form < 0.2:
        amount = tale.give(value)
        phrase = f"{amount} more"
    elif form < 0.3 and value > 1:
        amount, phrase = tale.count(value, tale.thing)
        phrase = f"another {phrase}"
    else:
        amount, phrase = tale.count(value, tale.thing, "more")
    if tale.chance(0.3):
        giver = tale.relative(tale.hero) if tale.chance(0.6) else str(tale.person())
        gives = tale.verb("give")
        tale.event(None, f"{giver} {gives} {tale.hero.obj} {phrase}")
    else:
        tale.event(tale.hero, f"{_verb(tale, tale.any(_GAINED[tale.thing.family]))} {phrase}")
    tale.run("+", amount)


def _lose(tale: Tale) -> None:
    value = tale.pick(lambda number: tale.accept(tale.value.value - number), 1, tale.value.value)
    form = tale.rng.random()
    if form < 0.3:
        amount = tale.give(value)
        phrase = f"{amount} of the {tale.thing.many}"
    elif form < 0.4:
        amount = tale.give(value)
        phrase = f"{amount} of {them(tale)}"
    else:
        amount, phrase = tale.count(value, tale.thing)
    if tale.chance(0.45):
        receiver = tale.relative(tale.hero) if tale.chance(0.4) else tale.person().obj
        verb = _verb(tale, tale.any(("give", "give", "give", "sell", "send")))
        tale.event(tale.hero, f"{verb} {phrase} to {receiver}")
    elif tale.chance(0.12) and tale.thing.family not in ("fragile", "flower"):
        be = tale.verb("be", many=value > 1)
        tale.event(None, f"{phrase} {be} {tale.any(('sold', 'lost', 'given away'))}")
    else:
        tale.event(tale.hero, f"{_verb(tale, tale.any(_LOST[tale.thing.family]))} {phrase}")
    tale.run("-", amount)


def _gain_groups(tale: Tale) -> None:
    start = tale.value.value
    count, each, _, words = grouped(tale, lambda product: start + product <= 99 and tale.accept(start + product))
    tale.event(tale.hero, f"{_verb(tale, tale.any(('buy', 'get', 'find')))} {words}")
    tale.run("+", tale.step(count, "*", each, tale.thing))


def _lose_groups(tale: Tale) -> None:
    start = tale.value.value
    if tale.chance(0.4):
        count, each, _, words = grouped(tale, lambda product: product <= start and tale.accept(start - product))
        tale.event(tale.hero, f"{_verb(tale, tale.any(('sell', 'give away')))} {words}")
    else:
        people, size = tale.factors(lambda product: product <= start and tale.accept(start - product))
        each, phrase = tale.count(size, tale.thing)
        group = tale.any(lexicon.GROUPS)
        count = tale.give(people)
        owned = tale.any(("", f"{tale.hero.poss} ")) if group.one not in ("child", "student") else ""
        tale.event(tale.hero, f"{_verb(tale, 'give')} {phrase} to each of {owned}{count} {group.many}")
    tale.run("-", tale.step(count, "*", each, tale.thing))


_PARTS = {2: ("half",), 3: ("a third", "one third"), 4: ("a quarter", "one quarter")}


def _lose_half(tale: Tale) -> None:
    if not tale.accept(tale.value.value // 2):
        raise DeadEndError
    half = tale.give(2, "half")
    receiver = tale.relative(tale.hero) if tale.chance(0.6) else tale.person().obj
    what = tale.any((f"of {them(tale)}", f"of the {tale.thing.many}", f"of {tale.hero.poss} {tale.thing.many}"))
    tale.event(tale.hero, f"{_verb(tale, 'give')} {half} {what} to {receiver}")
    tale.run("/", half)
    tale.lost = True


def _lose_part(tale: Tale) -> None:
    value = tale.value.value
    parts = [k for k in (3, 4) if k in divisors(value) and tale.accept(value - value // k)]
    if not parts:
        raise DeadEndError
    part = tale.any(parts)
    given = tale.give(part, tale.any(_PARTS[part]))
    verb = _verb(tale, tale.any(_LOST[tale.thing.family]))
    tale.event(tale.hero, f"{verb} {given} of {them(tale)}")
    tale.run("-", tale.step(tale.value, "/", given, tale.thing))


# --- closings --------------------------------------------------------------------------------------------------


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
    verb = _verb(tale, tale.any(("share", "divide", "split")))
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
    verb = _verb(tale, tale.any(("put", "pack", "place")))
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
    amount, phrase = tale.count(tale.pick(anything_up_to(99 - tale.value.value)), tale.thing)
    tale.fact(other, f"{tale.verb('have', other)} {phrase}")
    people = tale.any(("they", f"{other.name} and {tale.hero.name}")) if not tale.hero.first else "we"
    tail = tale.any((" together", " altogether", " in total", " in all"))
    tale.question(f"how many {tale.thing.many} {tale.aux(many=True)} {people} have{tail}", movable=people != "they")
    tale.run("+", amount)


def anything_up_to(limit: int) -> Accept:
    """Accepts the numbers from 1 to a limit."""
    return lambda number: 1 <= number <= limit


def _needs_more(tale: Tale) -> None:
    goal = tale.pick(lambda number: number > tale.value.value)
    amount, phrase = tale.count(goal, tale.thing)
    verb = _verb(tale, tale.any(("need", "want")))
    what = phrase if verb.startswith("need") else f"to have {phrase}"
    tale.fact(tale.hero, f"{verb} {what}{tale.any(('', ' in total', ' in all'))}")
    tale.question(f"how many more {tale.thing.many} {tale.aux(tale.hero)} {tale.hero} need", movable=False)
    tale.value = tale.step(amount, "-", tale.value, tale.thing)


def _sell_all(tale: Tale) -> None:
    price, phrase = tale.money(tale.rng.randint(2, 12))
    what = the_rest(tale)
    tale.event(tale.hero, f"{_verb(tale, 'sell')} {what} for {phrase} each")
    asked = tale.any(("how much money", "how many dollars"))
    tale.question(f"{asked} {tale.aux(tale.hero)} {tale.hero} {tale.any(('get', 'earn', 'make'))}")
    tale.value = tale.step(tale.value, "*", price, lexicon.DOLLAR)


def _other_has_times(tale: Tale) -> None:
    other = tale.person()
    times, words = tale.times(tale.rng.randint(2, 12))
    tale.fact(other, f"{tale.verb('have', other)} {words} as many {tale.thing.many} as {tale.hero.obj}")
    tale.question(f"how many {tale.thing.many} {tale.aux(other)} {other} have")
    tale.run("*", times)


OPENINGS = (
    Stage(0, 5, _has),
    Stage(1, 2, _has_groups),
    Stage(1, 1, _has_two_kinds),
    Stage(1, 1, _gets_on_two_days),
    Stage(1, 1, _has_in_relation),
    Stage(1, 0.5, _gets_a_share),
)
EVENTS = (
    Stage(1, 4, _gain, term),
    Stage(1, 4, _lose, losable),
    Stage(2, 1.5, _gain_groups, lambda value: 1 <= value <= 95),
    Stage(2, 1.5, _lose_groups, lambda value: 4 <= value <= 99),
    Stage(1, 0.5, _lose_half, lambda value: 2 in divisors(value)),
    Stage(2, 0.5, _lose_part, lambda value: 3 in divisors(value) or 4 in divisors(value)),
)
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
THEME = Theme("belongings", 4.0, staged(_prepare, OPENINGS, EVENTS, CLOSINGS))
