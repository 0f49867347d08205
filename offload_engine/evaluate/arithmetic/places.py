"""Stories of what is in a place, what comes and goes, is put in or taken out."""

from offload_engine.evaluate.arithmetic.lexicon import noun, nouns
from offload_engine.evaluate.arithmetic.settings import PLACES
from offload_engine.evaluate.arithmetic.stages import Stage, Theme, divisible, divisors, losable, staged, term
from offload_engine.evaluate.arithmetic.tale import DeadEndError, Tale

_CONTRASTS = {
    "people": (("young", "old"), ("tall", "short"), ("happy", "sad"), ("hungry", "thirsty")),
    "animals": (("young", "old"), ("big", "small"), ("white", "black"), ("brown", "white")),
    "things": (("old", "new"), ("big", "small"), ("red", "blue"), ("large", "small"), ("green", "white")),
}
_GROUPS = {"people": nouns("group team row line"), "animals": nouns("group"), "things": nouns("group row set pile")}


def _prepare(tale: Tale) -> None:
    tale.place = tale.any(PLACES)
    tale.thing = tale.any(tale.place.things)


def _there(tale: Tale, phrase: str, many: bool) -> str:
    be = tale.verb("be", many=many)
    return tale.any(
        (
            f"there {be} {phrase} {tale.place.where}",
            f"there {be} {phrase} {tale.place.where}",
            f"{phrase} {be} {tale.place.where}",
        )
    )


def _action(tale: Tale, verbs: tuple[str, ...], many: bool) -> str:
    base, _, rest = tale.any(verbs).partition(" ")
    return tale.verb(base, many=many) + (f" {rest}" if rest else "")


# --- openings --------------------------------------------------------------------------------------------------


def _holds(tale: Tale) -> None:
    value = tale.pick(tale.accept)
    tale.value, phrase = tale.count(value, tale.thing)
    tale.fact(None, _there(tale, phrase, value != 1))


def _two_kinds(tale: Tale) -> None:
    total = tale.pick(lambda number: number >= 2 and tale.accept(number), 2)
    first = tale.rng.randint(1, total - 1)
    one, other = tale.any(_CONTRASTS[tale.place.beings])
    left, right = tale.give(first), tale.give(total - first)
    phrase = f"{left} {one} {tale.thing.form(first)} and {right} {other} {tale.thing.form(total - first)}"
    tale.fact(None, _there(tale, phrase, True))
    tale.value = tale.step(left, "+", right, tale.thing)


def _in_rows(tale: Tale) -> None:
    groups, size = tale.factors(tale.accept)
    holder = tale.any(_GROUPS[tale.place.beings])
    count, phrase = tale.count(groups, holder)
    each, in_each = tale.count(size, tale.thing)
    be = tale.verb("be", many=True)
    tale.fact(
        None,
        tale.any(
            (
                f"there {be} {phrase} of {in_each} each {tale.place.where}",
                f"{tale.place.where} there {be} {phrase} with {in_each} in each {holder.one}",
            )
        ),
    )
    tale.value = tale.step(count, "*", each, tale.thing)


# --- events ----------------------------------------------------------------------------------------------------


def _come(tale: Tale) -> None:
    start = tale.value.value
    value = tale.pick(lambda number: tale.accept(start + number), 1, 99 - start)
    if tale.chance(0.3):
        amount = tale.give(value)
        phrase = f"{amount} more"
    else:
        amount, phrase = tale.count(value, tale.thing, "more")
    tale.event(None, f"{phrase} {_action(tale, tale.place.come, value != 1)}")
    tale.run("+", amount)


def _go(tale: Tale) -> None:
    start = tale.value.value
    value = tale.pick(lambda number: tale.accept(start - number), 1, start)
    if tale.chance(0.35) and start > 1:
        amount = tale.give(value)
        plain = f"the {tale.thing.many}"
        phrase = f"{amount} of {plain if tale.moved else tale.any(('them', plain))}"
    else:
        amount, phrase = tale.count(value, tale.thing)
    tale.event(None, f"{phrase} {_action(tale, tale.place.go, value != 1)}")
    tale.run("-", amount)


def _half_go(tale: Tale) -> None:
    if not tale.accept(tale.value.value // 2):
        raise DeadEndError
    half = tale.give(2, "half")
    tale.event(None, f"{half} of the {tale.thing.many} {_action(tale, tale.place.go, True)}")
    tale.run("/", half)
    tale.lost = True


def _groups_come(tale: Tale) -> None:
    start = tale.value.value
    groups, size = tale.factors(lambda product: start + product <= 99 and tale.accept(start + product))
    holder = noun("set" if tale.place.beings == "things" else "group")
    count, phrase = tale.count(groups, holder)
    each, in_each = tale.count(size, tale.thing)
    tale.event(None, f"{phrase} of {in_each} each {_action(tale, tale.place.come, True)}")
    tale.run("+", tale.step(count, "*", each, tale.thing))


def _groups_go(tale: Tale) -> None:
    start = tale.value.value
    groups, size = tale.factors(lambda product: product <= start and tale.accept(start - product))
    count, phrase = tale.count(groups, (noun("set" if tale.place.beings == "things" else "group")))
    each, in_each = tale.count(size, tale.thing)
    tale.event(None, f"{phrase} of {in_each} each {_action(tale, tale.place.go, True)}")
    tale.run("-", tale.step(count, "*", each, tale.thing))


# --- closings --------------------------------------------------------------------------------------------------


def _now(tale: Tale) -> None:
    be = tale.verb("be", many=True)
    tail = tale.any((" left", " left", " now")) if tale.lost else tale.any((" now", " now", " in total", ""))
    where = tale.any((tale.place.where, tale.place.where, "there"))
    if tail == " left":
        tale.question(f"how many {tale.thing.many} {be} {tale.any(('left', f'left {where}', 'still there'))}")
    else:
        tale.question(f"how many {tale.thing.many} {be} {where}", tail)


def _split(tale: Tale) -> None:
    number = tale.any(divisors(tale.value.value))
    holder = tale.any(_GROUPS[tale.place.beings])
    be = tale.verb("be", many=True)
    verb = tale.any(("split", "divided", "put"))
    if tale.chance(0.5):
        count, phrase = tale.count(number, holder)
        tale.event(None, f"the {tale.thing.many} {be} {verb} into {phrase} of the same size")
        tale.question(f"how many {tale.thing.many} {be} in each {holder.one}")
        tale.run("/", count)
    else:
        count, phrase = tale.count(number, tale.thing)
        tale.event(None, f"the {tale.thing.many} {be} {verb} into {holder.many} of {count}")
        tale.question(f"how many {holder.many} {be} there")
        tale.value = tale.step(tale.value, "/", count, holder)


_STATES = ("old", "young", "small", "big", "white", "brown", "new")
_STATES_OF_PEOPLE = ("wearing a hat", "from this town", "hungry", "tired", "wearing a red shirt", "wearing glasses")


def _part(tale: Tale) -> None:
    start = tale.value.value
    part = tale.give(tale.pick(bool, 2, start - 1))
    be, many = tale.verb("be", many=True), tale.thing.many
    of = tale.any((f"of the {many}", "of them" if not tale.moved else f"of these {many}"))
    if tale.thing.one in ("child", "student") and tale.chance(0.6):
        one, other = tale.any((("girls", "boys"), ("boys", "girls")))
        tale.fact(None, tale.any((f"{part} {of} {be} {one}", f"{part} {of} {be} {one} and the rest {be} {other}")))
        tale.question(tale.any((f"how many {other} {be} there", f"how many of the {many} {be} {other}")))
    else:
        if any(f" {word} " in clause.text for clause in tale.clauses for word in _STATES):
            raise DeadEndError  # told apart already: a second time would contradict the first
        people = tale.place.beings == "people" and tale.thing.one not in ("dog", "pigeon")
        state = tale.any(_STATES_OF_PEOPLE if people else _STATES)
        tale.fact(None, f"{part} {of} {be} {state}")
        tale.question(f"how many {tale.any((f'{many}', f'of the {many}'))} {be} not {state}")
    tale.run("-", part)


OPENINGS = (Stage(0, 4, _holds), Stage(1, 1, _two_kinds), Stage(1, 1.5, _in_rows))
EVENTS = (
    Stage(1, 4, _come, term),
    Stage(1, 4, _go, losable),
    Stage(1, 0.6, _half_go, lambda value: 2 in divisors(value)),
    Stage(2, 1.2, _groups_come, lambda value: 1 <= value <= 95),
    Stage(2, 1.2, _groups_go, lambda value: 4 <= value <= 99),
)
CLOSINGS = (Stage(0, 5, _now), Stage(1, 1.5, _split, divisible), Stage(1, 1.2, _part, lambda value: 3 <= value <= 99))
THEME = Theme("places", 1.6, staged(_prepare, OPENINGS, EVENTS, CLOSINGS))
