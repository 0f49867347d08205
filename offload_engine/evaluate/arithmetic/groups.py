"""Equal groups told in general: a box holds 12 pencils; how many are in 7 boxes, how many boxes for 84."""

from offload_engine.evaluate.arithmetic import lexicon
from offload_engine.evaluate.arithmetic.lexicon import Noun, article, noun, nouns
from offload_engine.evaluate.arithmetic.possessions import container
from offload_engine.evaluate.arithmetic.stages import Theme, anything
from offload_engine.evaluate.arithmetic.tale import Amount, Clause, DeadEndError, Tale

_WHOLES: tuple[tuple[Noun, tuple[Noun, ...]], ...] = (
    (noun("car"), nouns("wheel seat door")),
    (noun("table"), nouns("chair leg plate")),
    (noun("flower"), nouns("petal leaf|leaves")),
    (noun("spider"), nouns("leg")),
    (noun("team"), nouns("player ball shirt")),
    (noun("room"), nouns("window lamp chair bed")),
    (noun("house"), nouns("window door room")),
    (noun("bus|buses"), nouns("seat passenger window")),
    (noun("tree"), nouns("bird apple nest branch|branches")),
    (noun("shirt"), nouns("button pocket")),
    (noun("page"), nouns("picture word photo")),
    (noun("class|classes"), nouns("student boy girl")),
    (noun("boat"), nouns("person|people sail")),
    (noun("cake"), nouns("candle egg cherry")),
    (noun("row"), nouns("seat chair tree plant")),
    (noun("building"), nouns("floor door room")),
    (noun("garden"), nouns("tree bench|benches rose")),
)


def _pair(tale: Tale) -> tuple[Noun, Noun]:
    """A whole and the parts it has."""
    if tale.chance(0.5):
        whole, parts = tale.any(_WHOLES)
        return whole, tale.any(parts)
    tale.thing = tale.any(lexicon.THINGS)
    return container(tale), tale.thing


def _holding(tale: Tale, whole: Noun, phrase: str) -> str:
    """One whole's contents as a clause."""
    kinds = (f"{article(whole.one)} {whole.one}", f"each {whole.one}", f"every {whole.one}", f"one {whole.one}")
    boxes = lexicon.CONTAINERS + tuple(noun for nouns in lexicon.SPECIAL_CONTAINERS.values() for noun in nouns)
    verb = tale.any(("hold", "contain", "have")) if whole in boxes else "have"
    there = f"there {tale.verb('be', many=True)} {phrase} {'in' if whole in boxes else 'for'} each {whole.one}"
    return there if whole in boxes and tale.chance(0.25) else f"{tale.any(kinds)} {tale.verb(verb)} {phrase}"


def _asks_total(tale: Tale, whole: Noun, part: Noun, phrase: str) -> str:
    be = tale.verb("be", many=True)
    have = f"how many {part.many} {tale.aux(many=True)} {phrase} have{tale.any(('', ' in total', ' altogether'))}"
    return tale.any((f"how many {part.many} {be} in {phrase}", have)) if _contains(whole) else have


def _contains(whole: Noun) -> bool:
    return whole in lexicon.CONTAINERS or whole.one in ("jar", "tin", "vase", "drawer", "album")


def _total(tale: Tale) -> Amount:
    whole, part = _pair(tale)
    number, size = tale.factors(anything)
    each, contents = tale.count(size, part)
    clause = Clause(None, _holding(tale, whole, contents))
    count, phrase = tale.count(number, whole)
    tale.clauses.append(clause)
    tale.question(_asks_total(tale, whole, part, phrase))
    return tale.step(each, "*", count, part)


def _number_of_groups(tale: Tale) -> None:
    whole, part = _pair(tale)
    number, size = tale.factors(anything)
    each, contents = tale.count(size, part)
    tale.fact(None, _holding(tale, whole, contents))
    total, phrase = tale.count(number * size, part)
    if _contains(whole):
        tale.question(tale.any((f"how many {whole.many} {tale.verb('be', many=True)} needed for {phrase}",)))
    else:
        tale.question(
            f"how many {whole.many} have {phrase} altogether"
            if not tale.past
            else f"how many {whole.many} had {phrase} altogether"
        )
    tale.step(total, "/", each, whole)


def _size_of_groups(tale: Tale) -> None:
    whole, part = _pair(tale)
    number, size = tale.factors(anything)
    total, all_parts = tale.count(number * size, part)
    count, phrase = tale.count(number, whole)
    be, have = tale.verb("be", many=True), tale.verb("have", many=True)
    if _contains(whole):
        tale.fact(
            None,
            tale.any(
                (
                    f"{all_parts} {be} packed equally into {phrase}",
                    f"there {be} {all_parts} in {phrase}, the same number in each",
                    f"{phrase} {have} {all_parts} in total, the same number in each",
                )
            ),
        )
        tale.question(f"how many {part.many} {be} in each {whole.one}")
    else:
        tale.fact(
            None, f"{phrase} {have} {all_parts} in total, and each {whole.one} {tale.verb('have')} the same number"
        )
        tale.question(f"how many {part.many} {tale.aux()} each {whole.one} have", movable=False)
    tale.step(total, "/", count, part)


def _two_sizes(tale: Tale, steps: int) -> None:
    """Wholes of one kind and single parts (2 steps), or wholes of two sizes (3 steps)."""
    holder = tale.any(lexicon.CONTAINERS)
    tale.thing = tale.any(lexicon.THINGS)
    number, size = tale.factors(lambda product: product <= 80)
    be, many = tale.verb("be", many=True), tale.thing.many
    count, phrase = tale.count(number, holder)
    each, contents = tale.count(size, tale.thing)
    if steps == 2:
        single, loose = tale.count(tale.rng.randint(1, 99 - number * size), tale.thing)
        extra = tale.any(
            (
                f"{loose} on the table",
                f"{loose} without a {holder.one}",
                f"{single} more {tale.thing.form(single.value)}",
            )
        )
        tale.fact(None, f"there {be} {phrase} of {contents} each and {extra}")
        tale.step(tale.step(count, "*", each, tale.thing), "+", single, tale.thing)
    else:
        left = 99 - number * size
        more, size2 = tale.factors(lambda product: product <= left)
        count2, phrase2 = tale.count(more, holder)
        each2, contents2 = tale.count(size2, tale.thing)
        tale.fact(None, f"there {be} {phrase} with {contents} in each and {phrase2} with {contents2} in each")
        first = tale.step(count, "*", each, tale.thing)
        tale.step(first, "+", tale.step(count2, "*", each2, tale.thing), tale.thing)
    tale.question(f"how many {many} {be} there{tale.any(('', ' in total', ' altogether', ' in all'))}")


def _nested(tale: Tale) -> None:
    """Boxes of bags of things: two products."""
    outer, inner = tale.rng.sample(lexicon.CONTAINERS, 2)
    thing = tale.any(lexicon.THINGS)
    first, second = tale.factors(lambda product: product <= 12)
    third = tale.rng.randint(2, 12)
    a, outer_phrase = tale.count(first, outer)
    b, inner_phrase = tale.count(second, inner)
    c, contents = tale.count(third, thing)
    be, hold = tale.verb("be", many=True), tale.verb(tale.any(("hold", "contain")))
    tale.fact(None, f"there {be} {outer_phrase}")
    tale.fact(None, f"each {outer.one} {hold} {inner_phrase}")
    tale.fact(None, f"each {inner.one} {hold} {contents}")
    tale.question(
        f"how many {thing.many} {be} there{tale.any(('', ' in total', ' altogether', ' in all'))}", movable=False
    )
    tale.step(tale.step(a, "*", b, inner), "*", c, thing)


def _build(tale: Tale, steps: int) -> None:
    if steps == 1:
        tale.any((_total, _total, _number_of_groups, _size_of_groups))(tale)
    elif steps == 2 and tale.chance(0.5):
        _nested(tale)
    elif steps in (2, 3):
        _two_sizes(tale, steps)
    else:
        raise DeadEndError


THEME = Theme("groups", 1.5, _build, (1, 2, 3))
