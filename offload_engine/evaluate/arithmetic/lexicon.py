"""The words of the problems: names, things, containers, places and verbs.

Tables are written compactly: `one|many` where the plural is irregular, the regular ending otherwise.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Noun:
    """A countable noun with its two forms and the family of things it belongs to."""

    one: str
    many: str
    family: str = ""

    def form(self, count: int) -> str:
        """The form that agrees with a count: 1 apple, 0 apples, 2 apples."""
        return self.one if count == 1 else self.many


@dataclass(frozen=True)
class Person:
    """Somebody in a story: gender is m, f, or 1 for the first person; a role is named with an article."""

    name: str
    gender: str
    role: bool = False


def _regular_plural(one: str) -> str:
    if one.endswith(("s", "x", "ch", "sh")):
        return one + "es"
    if one.endswith("y") and one[-2] not in "aeiou":
        return one[:-1] + "ies"
    return one + "s"


def noun(entry: str, family: str = "") -> Noun:
    """A noun from `one` or `one|many`; an underscore stands for a space."""
    one, _, many = entry.replace("_", " ").partition("|")
    return Noun(one, many or _regular_plural(one), family)


def nouns(table: str, family: str = "") -> tuple[Noun, ...]:
    """The nouns of a blank-separated table."""
    return tuple(noun(entry, family) for entry in table.split())


def _words(table: str) -> tuple[str, ...]:
    return tuple(table.split())


def article(word: str) -> str:
    """The indefinite article before a word of this lexicon."""
    return "an" if word[0] in "aeiou" and not word.startswith("uni") else "a"


FEMALE = _words(
    "Maria Ana Emma Olivia Sophia Mia Lily Grace Chloe Ella Zoe Nora Ruby Alice Clara Eva Hannah Julia Laura Lucy "
    "Nina Rosa Sara Tina Wendy Amy Betty Carla Diana Elena Fiona Gina Helen Irene Jane Kate Linda Mary Paula "
    "Rachel Sandra Vera Anna Leah Ivy Priya Aisha Mei Yuki Fatima"
)
MALE = _words(
    "Tom Ben Jack Liam Noah Lucas Ethan Leo Max Sam Adam Peter Paul Mark David Daniel James John Henry Oscar "
    "Oliver Hugo Felix Victor Simon Martin Kevin Brian Carl Eric Frank George Ivan Jason Luke Nick Omar Pedro "
    "Ryan Steve Tim Tony Walter Alan Bob Raj Ali Chen Kenji Carlos"
)

THINGS: tuple[Noun, ...] = (
    *nouns("apple orange pear peach|peaches plum banana lemon mango|mangoes cherry strawberry melon apricot", "fruit"),
    *nouns("cookie muffin cupcake pie bun pancake waffle bagel roll tart loaf|loaves biscuit", "baked"),
    *nouns("candy lollipop cracker nut sweet sandwich chocolate_bar", "snack"),
    *nouns("carrot potato|potatoes tomato|tomatoes onion pepper cucumber pumpkin cabbage|cabbages", "vegetable"),
    *nouns("pencil pen eraser crayon marker notebook ruler folder paintbrush", "supplies"),
    *nouns("marble doll ball balloon kite puzzle block robot toy_car toy_train whistle game", "toy"),
    *nouns("stamp coin shell sticker card postcard button badge magnet bead feather photo poster stone", "collected"),
    *nouns("book comic magazine newspaper story_book", "reading"),
    *nouns("rose tulip daisy lily sunflower flower", "flower"),
    *nouns("cup plate glass bowl vase mug candle egg", "fragile"),
    *nouns("shirt hat scarf|scarves sock glove coat cap belt", "clothes"),
    *nouns("nail screw brick ribbon key rope lamp", "hardware"),
)
ANIMALS = nouns("hen duck cow goat horse rabbit sheep|sheep pig goose|geese pony", "animal")
PETS = nouns("dog cat rabbit fish|fish parrot mouse|mice turtle", "animal")

CONTAINERS = nouns("box bag basket pack crate tray carton case sack bucket bin packet")
SPECIAL_CONTAINERS: dict[str, tuple[Noun, ...]] = {
    "flower": nouns("vase bunch|bunches pot bouquet"),
    "reading": nouns("shelf|shelves box bag pile"),
    "collected": nouns("album jar box tin page"),
    "baked": nouns("tray box bag tin plate"),
    "snack": nouns("jar bag pack bowl packet"),
    "fragile": nouns("box tray shelf|shelves carton crate"),
    "clothes": nouns("drawer box bag pack suitcase"),
}

COLOURS = _words("red blue green yellow white black brown purple pink orange gray")
COLOURED = frozenset({"supplies", "toy", "flower", "clothes"})
"""Families whose things come in colours; the others are told apart by a contrast."""
CONTRASTS = (("big", "small"), ("large", "small"), ("new", "old"), ("small", "big"), ("old", "new"), ("long", "short"))

ROLES: tuple[tuple[str, frozenset[str]], ...] = (
    ("farmer", frozenset({"fruit", "vegetable", "flower"})),
    ("baker", frozenset({"baked"})),
    ("teacher", frozenset({"supplies", "reading", "baked"})),
    ("gardener", frozenset({"flower", "vegetable", "fruit"})),
    ("florist", frozenset({"flower"})),
    ("librarian", frozenset({"reading"})),
    ("shopkeeper", frozenset({"fruit", "supplies", "toy", "clothes", "hardware", "fragile", "snack", "reading"})),
    ("collector", frozenset({"collected"})),
    ("builder", frozenset({"hardware"})),
    ("cook", frozenset({"vegetable", "fruit", "fragile"})),
    ("tailor", frozenset({"clothes"})),
    ("painter", frozenset({"supplies"})),
)

RELATIVES = {"m": ("brother", "father", "uncle", "grandfather"), "f": ("sister", "mother", "aunt", "grandmother")}
GROUPS = nouns("friend classmate neighbor child|children student cousin")

DOLLAR = noun("dollar")
YEAR = noun("year")
MINUTE = noun("minute")
HOUR = noun("hour")
DAY = noun("day")
WEEK = noun("week")
MONTH = noun("month")

DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

_VERBS = """
arrive arrives arrived|bake bakes baked|be is was|borrow borrows borrowed|break breaks broke|bring brings brought
build builds built|buy buys bought|collect collects collected|come comes came|contain contains contained
cost costs cost|cut cuts cut|deliver delivers delivered|divide divides divided|do does did|donate donates donated
drink drinks drank|drive drives drove|drop drops dropped|earn earns earned|eat eats ate|find finds found
fly flies flew|fold folds folded|get gets got|give gives gave|go goes went|grow grows grew|have has had
hold holds held|join joins joined|jump jumps jumped|land lands landed|last lasts lasted|lay lays laid
learn learns learned|leave leaves left|lend lends lent|like likes liked|live lives lived|lose loses lost
make makes made|need needs needed|open opens opened|order orders ordered|pack packs packed|paint paints painted
pay pays paid|pick picks picked|place places placed|plant plants planted|play plays played
practice practices practiced|print prints printed|put puts put|read reads read|receive receives received
return returns returned|ride rides rode|run runs ran|save saves saved|sell sells sold|send sends sent|sew sews sewed
share shares shared|sleep sleeps slept|solve solves solved|spend spends spent|split splits split
study studies studied|swim swims swam|take takes took|throw throws threw|travel travels traveled|use uses used
wait waits waited|walk walks walked|want wants wanted|wash washes washed|win wins won|work works worked
write writes wrote
"""


@dataclass(frozen=True)
class Verb:
    """The forms a story needs."""

    base: str
    third: str
    past: str


VERBS: dict[str, Verb] = {
    entry.split()[0]: Verb(*entry.split()) for line in _VERBS.strip().splitlines() for entry in line.split("|")
}
