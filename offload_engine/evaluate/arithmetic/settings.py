"""Settings of stories: places with what is found in them, tasks that take days, stuff by measure."""

from dataclasses import dataclass

from offload_engine.evaluate.arithmetic.lexicon import ANIMALS, DOLLAR, Noun, noun, nouns

_PEOPLE = "child|children student person|people visitor girl boy"


@dataclass(frozen=True)
class Place:
    """`where` things are; `come` and `go` say, verb first, how they get there and away."""

    where: str
    things: tuple[Noun, ...]
    come: tuple[str, ...]
    go: tuple[str, ...]
    beings: str = "people"
    """people, animals or things: which words tell them apart and group them."""


_PUT = ("be put there", "be added", "be placed there")
_TAKEN = ("be taken away", "be removed", "be taken out", "be taken")
_SOLD = ("be sold", "be sold", "be returned")
PLACES = (
    Place("on the bus", nouns(f"{_PEOPLE} passenger"), ("get on", "come on board"), ("get off", "leave")),
    Place("on the train", nouns(f"{_PEOPLE} passenger"), ("get on",), ("get off", "leave")),
    Place("in the park", nouns(f"{_PEOPLE} dog pigeon"), ("come", "arrive", "join them"), ("leave", "go home")),
    Place("in the library", nouns(_PEOPLE), ("come in", "arrive"), ("leave", "go home", "go out")),
    Place("in the classroom", nouns("child|children student girl boy"), ("come in", "join them"), ("leave", "go out")),
    Place("at the party", nouns("guest child|children friend person|people"), ("arrive", "come"), ("leave", "go home")),
    Place("in the museum", nouns(_PEOPLE), ("come in", "arrive"), ("leave", "go out")),
    Place("in the pool", nouns("child|children swimmer person|people"), ("jump in", "join them"), ("leave", "get out")),
    Place("on the playground", nouns("child|children boy girl"), ("come", "join them"), ("leave", "go home")),
    Place("in the tree", nouns("bird squirrel crow"), ("come", "arrive"), ("leave", "go away"), "animals"),
    Place("on the fence", nouns("bird sparrow cat"), ("land on it", "come"), ("fly away", "leave"), "animals"),
    Place(
        "in the pond",
        nouns("duck frog fish|fish goose|geese"),
        ("swim in", "arrive"),
        ("swim away", "leave"),
        "animals",
    ),
    Place(
        "on the farm", ANIMALS, ("be bought", "be born", "arrive"), ("be sold", "run away", "be given away"), "animals"
    ),
    Place("in the field", ANIMALS, ("come", "arrive"), ("leave", "run away"), "animals"),
    Place(
        "in the parking lot", nouns("car truck bike motorcycle"), ("arrive", "come"), ("leave", "drive away"), "things"
    ),
    Place("in the harbor", nouns("boat ship"), ("arrive", "come in"), ("leave", "go out"), "things"),
    Place("in the basket", nouns("apple egg pear potato|potatoes"), _PUT, _TAKEN, "things"),
    Place("in the box", nouns("pencil toy ball crayon candle"), _PUT, _TAKEN, "things"),
    Place("on the shelf", nouns("book cup jar doll vase"), _PUT, _TAKEN, "things"),
    Place("on the table", nouns("plate glass card spoon"), _PUT, _TAKEN, "things"),
    Place("in the jar", nouns("cookie coin candy marble button"), _PUT, _TAKEN, "things"),
    Place("in the drawer", nouns("sock shirt pen key"), _PUT, _TAKEN, "things"),
    Place("in the fridge", nouns("egg tomato|tomatoes bottle carrot"), _PUT, ("be taken out", "be eaten"), "things"),
    Place("in the shop", nouns("shirt lamp toy book bike cake"), ("be delivered", "be added"), _SOLD),
    Place("in the garden", nouns("rose tulip tree bush plant"), ("be planted",), ("be cut", "be removed"), "things"),
)


@dataclass(frozen=True)
class Task:
    """What is done: verb and unit; `whole` is the goal, `per` the spans it is counted by."""

    verb: str
    unit: Noun
    extra: str = ""
    whole: str = ""
    per: tuple[str, ...] = ("day", "hour", "week")


TASKS = (
    Task("read", noun("page"), "", "the book has"),
    Task("run", noun("lap"), "", "the race has", ("day",)),
    Task("swim", noun("lap"), "", "the plan is for", ("day",)),
    Task("run", noun("mile"), "", "the goal is", ("day", "week")),
    Task("walk", noun("kilometer"), "", "the path has a length of", ("day",)),
    Task("ride", noun("mile"), "", "the trip has a length of", ("day", "hour")),
    Task("solve", noun("problem"), "", "the homework has"),
    Task("solve", noun("puzzle"), "", "the book has"),
    Task("learn", noun("word"), "", "the list has"),
    Task("write", noun("page"), "", "the story has"),
    Task("write", noun("letter"), "", "the goal is", ("day",)),
    Task("paint", noun("picture"), "", "the goal is", ("day", "week")),
    Task("plant", noun("tree"), "", "the goal is", ("day", "hour")),
    Task("make", noun("toy"), "", "the order is for", ("day", "hour")),
    Task("bake", noun("cake"), "", "the order is for", ("day", "hour")),
    Task("fold", noun("paper_plane"), "", "the goal is", ("hour", "day")),
    Task("wash", noun("car"), "", "the goal is", ("hour", "day")),
    Task("practice", noun("minute"), "", "the goal is", ("day",)),
    Task("drink", noun("glass"), " of water", "the goal is", ("day",)),
    Task("earn", DOLLAR, "", "the goal is", ("hour", "day", "week")),
    Task("save", DOLLAR, "", "the goal is", ("day", "week", "month")),
    Task("collect", noun("can"), "", "the goal is", ("day", "hour", "week")),
    Task("deliver", noun("parcel"), "", "the plan is for", ("day", "hour")),
    Task("pick", noun("basket"), " of apples", "the goal is", ("day", "hour")),
    Task("build", noun("chair"), "", "the order is for", ("day", "week")),
    Task("sew", noun("dress"), "", "the order is for", ("week", "month")),
)


@dataclass(frozen=True)
class Stuff:
    """What is measured: its unit, the way its size is told, its parts and the participles of taking and adding."""

    name: str
    units: tuple[str, ...]
    size: str
    part: str
    taken: tuple[str, ...]
    added: tuple[str, ...]


_LENGTH = ("meter", "foot|feet", "inch")
_VOLUME = ("liter", "cup")
_WEIGHT = ("kilogram", "pound")
_LENGTH_GONE, _LENGTH_COME = ("cut off", "used", "taken"), ("added", "tied to it")
_VOLUME_GONE, _VOLUME_COME = ("poured out", "used", "drunk"), ("added", "poured in")
_WEIGHT_GONE, _WEIGHT_COME = ("used", "sold", "taken out"), ("added", "put in")
STUFF = (
    *(
        Stuff(name, _LENGTH, "is {} long", "piece", _LENGTH_GONE, _LENGTH_COME)
        for name in ("rope", "ribbon", "string", "cable", "wire")
    ),
    *(
        Stuff(name, _LENGTH, "is {} long", "piece", _LENGTH_GONE, ("added",))
        for name in ("fence", "pipe", "board", "cloth")
    ),
    *(
        Stuff(name, _VOLUME, "holds {} of water", "bottle", _VOLUME_GONE, _VOLUME_COME)
        for name in ("tank", "bucket", "barrel")
    ),
    *(Stuff(name, _VOLUME, "holds {} of juice", "bottle", _VOLUME_GONE, _VOLUME_COME) for name in ("jug", "pot")),
    *(Stuff(name, _WEIGHT, "holds {} of rice", "bag", _WEIGHT_GONE, _WEIGHT_COME) for name in ("sack", "bin")),
    *(Stuff(name, _WEIGHT, "holds {} of flour", "bag", _WEIGHT_GONE, _WEIGHT_COME) for name in ("sack", "box")),
)
