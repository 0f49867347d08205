"""Stories of what somebody has, gets, gives away, shares, packs or compares: openings and events."""

from offload_engine.evaluate.arithmetic import lexicon
from offload_engine.evaluate.arithmetic.belongings_endings import CLOSINGS
from offload_engine.evaluate.arithmetic.possessions import GAINED, LOST, container, grouped, hero_does, them, two_kinds
from offload_engine.evaluate.arithmetic.relations import relate
from offload_engine.evaluate.arithmetic.stages import Stage, Theme, anything, divisors, losable, staged, term
from offload_engine.evaluate.arithmetic.tale import Clause, DeadEndError, Tale


def _prepare(tale: Tale) -> None:
    tale.thing = tale.any(lexicon.THINGS)
    tale.hero = tale.person(tale.thing.family)


# --- openings --------------------------------------------------------------------------------------------------


def _has(tale: Tale) -> None:
    value = tale.pick(tale.accept)
    tale.value, phrase = tale.count(value, tale.thing)
    verb = "have" if tale.chance(0.75) else tale.any(GAINED[tale.thing.family])
    tale.fact(tale.hero, f"{hero_does(tale, verb)} {phrase}")


def _has_groups(tale: Tale) -> None:
    verb = hero_does(tale, tale.any(("have", "have", "buy")))
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
    have = hero_does(tale, "have")
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


def _gets_on_two_days(tale: Tale) -> None:
    total = tale.pick(lambda number: number >= 2 and tale.accept(number), 2)
    first = tale.rng.randint(1, total - 1)
    days = tale.rng.sample(lexicon.DAYS, 2)
    verb = hero_does(tale, tale.any(GAINED[tale.thing.family]))
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
        tale.event(tale.hero, f"{hero_does(tale, tale.any(GAINED[tale.thing.family]))} {phrase}")
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
        verb = hero_does(tale, tale.any(("give", "give", "give", "sell", "send")))
        tale.event(tale.hero, f"{verb} {phrase} to {receiver}")
    elif tale.chance(0.12) and tale.thing.family not in ("fragile", "flower"):
        be = tale.verb("be", many=value > 1)
        tale.event(None, f"{phrase} {be} {tale.any(('sold', 'lost', 'given away'))}")
    else:
        tale.event(tale.hero, f"{hero_does(tale, tale.any(LOST[tale.thing.family]))} {phrase}")
    tale.run("-", amount)


def _gain_groups(tale: Tale) -> None:
    start = tale.value.value
    count, each, _, words = grouped(tale, lambda product: start + product <= 99 and tale.accept(start + product))
    tale.event(tale.hero, f"{hero_does(tale, tale.any(('buy', 'get', 'find')))} {words}")
    tale.run("+", tale.step(count, "*", each, tale.thing))


def _lose_groups(tale: Tale) -> None:
    start = tale.value.value
    if tale.chance(0.4):
        count, each, _, words = grouped(tale, lambda product: product <= start and tale.accept(start - product))
        tale.event(tale.hero, f"{hero_does(tale, tale.any(('sell', 'give away')))} {words}")
    else:
        people, size = tale.factors(lambda product: product <= start and tale.accept(start - product))
        each, phrase = tale.count(size, tale.thing)
        group = tale.any(lexicon.GROUPS)
        count = tale.give(people)
        owned = tale.any(("", f"{tale.hero.poss} ")) if group.one not in ("child", "student") else ""
        tale.event(tale.hero, f"{hero_does(tale, 'give')} {phrase} to each of {owned}{count} {group.many}")
    tale.run("-", tale.step(count, "*", each, tale.thing))


_PARTS = {2: ("half",), 3: ("a third", "one third"), 4: ("a quarter", "one quarter")}


def _lose_half(tale: Tale) -> None:
    if not tale.accept(tale.value.value // 2):
        raise DeadEndError
    half = tale.give(2, "half")
    receiver = tale.relative(tale.hero) if tale.chance(0.6) else tale.person().obj
    what = tale.any((f"of {them(tale)}", f"of the {tale.thing.many}", f"of {tale.hero.poss} {tale.thing.many}"))
    tale.event(tale.hero, f"{hero_does(tale, 'give')} {half} {what} to {receiver}")
    tale.run("/", half)
    tale.lost = True


def _lose_part(tale: Tale) -> None:
    value = tale.value.value
    parts = [k for k in (3, 4) if k in divisors(value) and tale.accept(value - value // k)]
    if not parts:
        raise DeadEndError
    part = tale.any(parts)
    given = tale.give(part, tale.any(_PARTS[part]))
    verb = hero_does(tale, tale.any(LOST[tale.thing.family]))
    tale.event(tale.hero, f"{verb} {given} of {them(tale)}")
    tale.run("-", tale.step(tale.value, "/", given, tale.thing))


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
THEME = Theme("belongings", 4.0, staged(_prepare, OPENINGS, EVENTS, CLOSINGS))
