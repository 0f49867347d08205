"""Stories of two or three people whose amounts are told by comparison."""

from dataclasses import dataclass

from offload_engine.evaluate.arithmetic import lexicon
from offload_engine.evaluate.arithmetic.relations import relate
from offload_engine.evaluate.arithmetic.stages import Theme, divisors
from offload_engine.evaluate.arithmetic.tale import Amount, Clause, DeadEndError, Tale, Who

_ENDINGS = {
    1: ("last",),
    2: ("total", "total", "difference", "last"),
    3: ("total", "difference", "last", "share"),
    4: ("total", "share"),
}
"""What may be asked, by the number of steps."""


@dataclass
class _Chain:
    """The people told so far, each compared with the one before, and what each has."""

    people: list[Who]
    amounts: list[Amount]
    operators: str = ""


def _build(tale: Tale, steps: int) -> None:
    ending = tale.any(_ENDINGS[steps])
    relations = {"last": steps, "difference": steps - 1, "total": (steps + 1) // 2, "share": steps - 2}[ending]
    if ending == "total" and steps % 2 == 1 and steps > 1:
        relations = steps - 1  # the total of the first and the last only
    if not 1 <= relations <= 3:
        raise DeadEndError
    tale.thing = tale.any(lexicon.THINGS + lexicon.PETS)
    chain = _tell_relations(tale, relations)
    _ENDERS[ending](tale, chain)
    if len(tale.steps) != steps:
        raise DeadEndError


def _tell_relations(tale: Tale, relations: int) -> _Chain:
    first = tale.person()
    value = tale.rng.randint(2, 12) if tale.chance(0.6) else tale.rng.randint(2, 99)
    amount, phrase = tale.count(value, tale.thing)
    clauses = [Clause(first, f"{tale.verb('have', first)} {phrase}")]
    chain = _Chain([first], [amount])
    for _ in range(relations):
        person, than = tale.person(), chain.people[-1]
        relation = relate(tale, tale.thing, than.obj, lambda result: result > 0, chain.amounts[-1])
        clauses.append(Clause(person, f"{tale.verb('have', person)} {relation.words}"))
        amount = tale.step(chain.amounts[-1], relation.operator, relation.by, tale.thing, fixed=True)
        chain.people.append(person)
        chain.amounts.append(amount)
        chain.operators += relation.operator
    tale.clauses = clauses[::-1] if tale.chance(0.4) else clauses
    return chain


def _last(tale: Tale, chain: _Chain) -> None:
    person = chain.people[-1]
    tale.question(f"how many {tale.thing.many} {tale.aux(person)} {person} have")


def _total(tale: Tale, chain: _Chain) -> None:
    """The total of everybody, or of the first and the last where a third stands between and it costs one step."""
    people, amounts = chain.people, chain.amounts
    if len(people) == 3 and len(tale.steps) == 2 and tale.chance(0.5):
        people, amounts = [people[0], people[2]], [amounts[0], amounts[2]]
    total = amounts[0]
    for amount in amounts[1:]:
        total = tale.step(total, "+", amount, tale.thing)
    everybody = len(people) == len(chain.people)
    names = [person.name for person in people]
    if people[0].first:
        names.append(names.pop(0))
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    who = "they" if everybody and not people[0].first and tale.chance(0.6) else listed
    if everybody and people[0].first:
        who = "we"
    tail = tale.any((" together", " altogether", " in total", " in all"))
    tale.question(f"how many {tale.thing.many} {tale.aux(many=True)} {who} have{tail}", movable=who != "they")


def _difference(tale: Tale, chain: _Chain) -> None:
    """The difference of the first and the last, unless a sum or difference has just said it."""
    if len(chain.people) == 2 and chain.operators in "+-":
        raise DeadEndError
    pairs = sorted(
        ((chain.amounts[0], chain.people[0]), (chain.amounts[-1], chain.people[-1])), key=lambda p: p[0].value
    )
    (less, fewer), (most, more) = pairs
    if less.value == most.value:
        raise DeadEndError
    things = tale.thing.many
    if tale.chance(0.7):
        tale.question(f"how many more {things} {tale.aux(more)} {more} have than {fewer.obj}")
    else:
        tale.question(f"how many fewer {things} {tale.aux(fewer)} {fewer} have than {more.obj}")
    tale.step(most, "-", less, tale.thing)


def _share(tale: Tale, chain: _Chain) -> None:
    """Two people put their things together and share them out."""
    if len(chain.people) != 2 or chain.people[0].first:
        raise DeadEndError
    total = tale.step(chain.amounts[0], "+", chain.amounts[1], tale.thing)
    numbers = divisors(total.value)
    if not numbers:
        raise DeadEndError
    group = tale.any(lexicon.GROUPS)
    number = tale.any(numbers)
    count, phrase = tale.count(number, group)
    verb = tale.verb(tale.any(("share", "divide", "split")), many=True)
    tale.event(None, f"they {verb} all the {tale.thing.many} equally among {phrase}")
    tale.question(
        f"how many {tale.thing.many} {tale.aux()} each {group.one} {tale.any(('get', 'receive'))}", movable=False
    )
    tale.step(total, "/", count, tale.thing)


_ENDERS = {"last": _last, "total": _total, "difference": _difference, "share": _share}
THEME = Theme("comparison", 1.6, _build)
