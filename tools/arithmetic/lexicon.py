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


def article(word: str) -> str:
    """The indefinite article before a word of this lexicon."""
    return "an" if word[0] in "aeiou" and not word.startswith("uni") else "a"


FEMALE = tuple(
    "Maria Ana Emma Olivia Sophia Mia Lily Grace Chloe Ella Zoe Nora Ruby Alice Clara Eva Hannah Julia Laura Lucy Nina "
    "Rosa Sara Tina Wendy Amy Betty Carla Diana Elena Fiona Gina Helen Irene Jane Kate Linda Mary Paula Rachel Sandra "
    "Vera Anna Leah Ivy Priya Aisha Mei Yuki Fatima".split()
)
MALE = tuple(
    "Tom Ben Jack Liam Noah Lucas Ethan Leo Max Sam Adam Peter Paul Mark David Daniel James John Henry Oscar Oliver "
    "Hugo Felix Victor Simon Martin Kevin Brian Carl Eric Frank George Ivan Jason Luke Nick Omar Pedro Ryan Steve Tim "
    "Tony Walter Alan Bob Raj Ali Chen Kenji Carlos".split()
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

COLOURS = tuple("red blue green yellow white black brown purple pink orange gray".split())
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

DAYS = tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())

_VERBS = """
have has had had|be is was been|do does did done|buy buys bought bought|give gives gave given|get gets got got
find finds found found|lose loses lost lost|sell sells sold sold|eat eats ate eaten|use uses used used
pick picks picked picked|bake bakes baked baked|make makes made made|collect collects collected collected
receive receives received received|lend lends lent lent|break breaks broke broken|throw throws threw thrown
put puts put put|take takes took taken|leave leaves left left|arrive arrives arrived arrived|come comes came come
go goes went gone|fly flies flew flown|swim swims swam swum|land lands landed landed|drive drives drove driven
share shares shared shared|pack packs packed packed|need needs needed needed|want wants wanted wanted
cost costs cost cost|pay pays paid paid|earn earns earned earned|save saves saved saved|spend spends spent spent
work works worked worked|read reads read read|run runs ran run|walk walks walked walked|ride rides rode ridden
solve solves solved solved|plant plants planted planted|write writes wrote written|paint paints painted painted
practice practices practiced practiced|cut cuts cut cut|hold holds held held|contain contains contained contained
add adds added added|pour pours poured poured|own owns owned owned|donate donates donated donated
carry carries carried carried|join joins joined joined|sit sits sat sat|sew sews sewed sewn|keep keeps kept kept
wash washes washed washed|fill fills filled filled|divide divides divided divided|split splits split split
double doubles doubled doubled|triple triples tripled tripled|deliver delivers delivered delivered
draw draws drew drawn|grow grows grew grown|drink drinks drank drunk|last lasts lasted lasted
learn learns learned learned|sleep sleeps slept slept|play plays played played|study studies studied studied
climb climbs climbed climbed|order orders ordered ordered|remove removes removed removed
weigh weighs weighed weighed|produce produces produced produced|jump jumps jumped jumped|live lives lived lived|open opens opened opened|borrow borrows borrowed borrowed
return returns returned returned|build builds built built|fold folds folded folded|start starts started started
win wins won won|like likes liked liked|move moves moved moved|park parks parked parked|print prints printed printed
bring brings brought brought|travel travels traveled traveled|visit visits visited visited
watch watches watched watched|send sends sent sent|say says said said|place places placed placed|tie ties tied tied
hide hides hid hidden|drop drops dropped dropped|wait waits waited waited|scatter scatters scattered scattered
"""


@dataclass(frozen=True)
class Verb:
    """The forms a story needs."""

    base: str
    third: str
    past: str
    participle: str


VERBS: dict[str, Verb] = {
    entry.split()[0]: Verb(*entry.split()) for line in _VERBS.strip().splitlines() for entry in line.split("|")
}
