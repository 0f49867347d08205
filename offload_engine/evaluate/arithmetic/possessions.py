"""The words in which stories of belongings speak of things: verbs, containers, groups, what is left of them."""

from offload_engine.evaluate.arithmetic import lexicon
from offload_engine.evaluate.arithmetic.lexicon import Noun
from offload_engine.evaluate.arithmetic.tale import Accept, Amount, Tale

GAINED = {
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
LOST = {
    "fruit": ("eat", "sell", "use", "give away", "throw away"),
    "baked": ("eat", "sell", "give away", "drop"),
    "snack": ("eat", "give away", "sell"),
    "vegetable": ("use", "eat", "sell", "throw away"),
    "supplies": ("lose", "give away", "use", "lend out"),
    "toy": ("lose", "give away", "break", "sell"),
    "collected": ("lose", "give away", "sell"),
    "reading": ("lend out", "give away", "sell", "return"),
    "flower": ("give away", "sell", "throw away", "use"),
    "fragile": ("break", "sell", "give away", "drop"),
    "clothes": ("give away", "donate", "sell", "lose"),
    "hardware": ("use", "lose", "sell", "give away"),
}


def container(tale: Tale) -> Noun:
    """Something that holds the things of the story."""
    special = lexicon.SPECIAL_CONTAINERS.get(tale.thing.family)
    return tale.any(special if special and tale.chance(0.6) else lexicon.CONTAINERS)


def hero_does(tale: Tale, phrase: str) -> str:
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


def two_kinds(tale: Tale) -> tuple[str, str]:
    """Two adjectives that tell things of a family apart."""
    if tale.thing.family in lexicon.COLOURED and tale.chance(0.7):
        one, other = tale.rng.sample(lexicon.COLOURS, 2)
        return one, other
    return tale.any(lexicon.CONTRASTS)
