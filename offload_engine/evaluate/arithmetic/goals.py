"""Stories of a task of known size: what is done, what is left and how long the rest takes."""

from offload_engine.evaluate.arithmetic.lexicon import DOLLAR, MINUTE, noun, nouns
from offload_engine.evaluate.arithmetic.settings import TASKS
from offload_engine.evaluate.arithmetic.stages import Stage, Theme, divisible, divisors, losable, staged
from offload_engine.evaluate.arithmetic.tale import Tale
from offload_engine.evaluate.arithmetic.work import does, in_tense, phrase_of, rate_of

_PARTS = {
    "page": nouns("chapter"),
    "problem": nouns("part sheet"),
    "word": nouns("list lesson"),
    "puzzle": nouns("part"),
}
_GOALS = tuple(task for task in TASKS if task.unit is not DOLLAR and task.extra == "" and task.unit != MINUTE)


def _prepare(tale: Tale) -> None:
    tale.task = tale.any(_GOALS)
    tale.thing = tale.task.unit
    tale.hero = tale.person()


def _whole(tale: Tale) -> None:
    tale.value, phrase = tale.count(tale.pick(tale.accept, 2, 99), tale.thing)
    if tale.chance(0.5):
        has_to = f"{tale.verb('have', tale.hero)} to {tale.task.verb}"
        wants_to = f"{tale.verb('want', tale.hero)} to {tale.task.verb}"
        tale.fact(tale.hero, f"{tale.any((has_to, wants_to))} {phrase}")
    else:
        tale.fact(None, f"{in_tense(tale)} {phrase}")


def _whole_in_parts(tale: Tale) -> None:
    number, size = tale.factors(tale.accept)
    part = tale.any(_PARTS.get(tale.thing.one, nouns("set round part")))
    count, phrase = tale.count(number, part)
    each, in_each = tale.count(size, tale.thing)
    has_to = f"{tale.verb(tale.any(('have', 'want', 'need')), tale.hero)} to {tale.task.verb}"
    tale.fact(tale.hero, f"{has_to} {phrase} {tale.any((f'of {in_each} each', f'with {in_each} in each'))}")
    tale.value = tale.step(count, "*", each, tale.thing)


def _done(tale: Tale) -> None:
    start = tale.value.value
    amount, phrase = phrase_of(tale, tale.pick(lambda number: tale.accept(start - number), 1, start - 1))
    when = tale.any(("", "", " on the first day", " in the morning", " on Monday"))
    tale.event(tale.hero, f"{does(tale)} {phrase}{when if not tale.moved else ''}")
    tale.run("-", amount)


def _done_at_a_rate(tale: Tale) -> None:
    start = tale.value.value
    rate, spans = tale.factors(lambda product: product < start and tale.accept(start - product))
    each, count, words = rate_of(tale, rate, spans)
    tale.event(tale.hero, f"{does(tale)} {words}")
    tale.run("-", tale.step(each, "*", count, tale.thing))


def _left(tale: Tale) -> None:
    be, do = tale.verb("be", many=True), f"{tale.aux(tale.hero)} {tale.hero}"
    if not tale.moved:
        tale.question(
            f"how many {tale.thing.many} {do} have to {tale.task.verb}{tale.any((' in total', ' in all', ''))}",
            movable=False,
        )
        return
    left = tale.any((f"{do} still have to {tale.task.verb}", f"{be} left", f"{be} left to {tale.task.verb}"))
    tale.question(f"how many {tale.thing.many} {left}", movable=False)


def _rest_at_a_rate(tale: Tale) -> None:
    """How many days at a rate: the rest divided by it."""
    per = noun(tale.any(tale.task.per))
    each, phrase = phrase_of(tale, tale.any(divisors(tale.value.value)))
    every = tale.any((f"each {per.one}", f"every {per.one}"))
    after = " after that" if tale.moved else ""
    tale.fact(tale.hero, f"{does(tale)} {phrase} {every}{after}")
    last = f"{'will' if not tale.past else 'did'} {'the rest' if tale.moved else 'it'} take"
    need = f"{tale.aux(tale.hero)} {tale.hero} need{' for the rest' if tale.moved else ''}"
    tale.question(f"how many {per.many} {tale.any((need, need, last))}", movable=tale.moved)
    tale.value = tale.step(tale.value, "/", each, per)


def _rest_in_equal_parts(tale: Tale) -> None:
    per = noun(tale.any(tale.task.per))
    count, phrase = tale.count(tale.any(divisors(tale.value.value)), per)
    what = tale.any(("the rest", f"the remaining {tale.thing.many}")) if tale.moved else f"the {tale.thing.many}"
    tale.event(None, f"{tale.hero} {does(tale)} {what} in {phrase}, the same number each {per.one}")
    tale.question(
        f"how many {tale.thing.many} {tale.aux(tale.hero)} {tale.hero} {tale.task.verb} each {per.one}", movable=False
    )
    tale.run("/", count)


OPENINGS = (Stage(0, 3, _whole), Stage(1, 1, _whole_in_parts))
EVENTS = (Stage(1, 3, _done, losable), Stage(2, 1.5, _done_at_a_rate, lambda value: 6 <= value <= 99))
CLOSINGS = (Stage(0, 3, _left), Stage(1, 1.5, _rest_at_a_rate, divisible), Stage(1, 1, _rest_in_equal_parts, divisible))
THEME = Theme("goals", 1.2, staged(_prepare, OPENINGS, EVENTS, CLOSINGS))
