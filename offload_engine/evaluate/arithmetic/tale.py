"""A story under construction: its numbers, people, clauses and steps.

While a story is told its text holds one private-use character per number and per mention of a person. `surface.py`
replaces them at the end, when the order of the sentences is known: a mention becomes a name or a pronoun, and the
places of the numbers fix the order of the operands of + and *.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from offload_engine.evaluate.arithmetic import lexicon
from offload_engine.evaluate.arithmetic.lexicon import Noun, Person
from offload_engine.evaluate.arithmetic.numerals import LARGEST_WORD, spell
from offload_engine.evaluate.arithmetic.ranges import LARGEST_TERM, result_of
from offload_engine.evaluate.arithmetic.settings import PLACES, STUFF, TASKS, Place, Stuff, Task

NUMBER_MARKS = 0xE000
PERSON_MARKS = 0xE400
FORMS_PER_PERSON = 4
SUBJECT, OBJECT, POSSESSIVE, NAME = range(FORMS_PER_PERSON)

SMALL = 20
SMALL_SHARE = 0.3
"""Share of draws that keep to numbers up to SMALL, as everyday problems do; the others are uniform."""

Accept = Callable[[int], bool]
T = TypeVar("T")


class DeadEndError(Exception):
    """The draws so far admit no legal number or no fluent text: the story is told anew."""


@dataclass(frozen=True)
class Amount:
    """A number of the story: given in its text (`mark` stands there) or the result of a step."""

    value: int
    mark: str = ""

    def __str__(self) -> str:
        return self.mark


@dataclass(frozen=True)
class Step:
    """One line of the answer before its operands are ordered."""

    left: Amount
    operator: str
    right: Amount
    result: Amount
    unit: Noun | None
    fixed: bool = False
    """Whether the operands stand as told; otherwise two given numbers follow their order in the text."""


@dataclass(frozen=True)
class Who:
    """A person of the story, to be used in text in one of four forms."""

    index: int
    first: bool

    def _form(self, form: int) -> str:
        return chr(PERSON_MARKS + FORMS_PER_PERSON * self.index + form)

    def __str__(self) -> str:
        return self._form(SUBJECT)

    @property
    def obj(self) -> str:
        """The person as an object: him, her, a name."""
        return self._form(OBJECT)

    @property
    def poss(self) -> str:
        """The person's: his, her, a name with its apostrophe."""
        return self._form(POSSESSIVE)

    @property
    def name(self) -> str:
        """The name even where a pronoun would do, as in lists of people."""
        return self._form(NAME)


@dataclass(frozen=True)
class Clause:
    """A fact. With a subject, `text` is the predicate alone and may share the subject of the clause before."""

    subject: Who | None
    text: str
    event: bool = False
    """An event may be introduced by "then" or "later"."""
    alone: bool = False
    """Whether it must be a sentence of its own."""

    def full(self) -> str:
        """The clause with its subject."""
        return f"{self.subject} {self.text}" if self.subject else self.text


@dataclass(frozen=True)
class Ask:
    """The question without its mark; `tail` (now, left) is dropped when the question comes before the facts."""

    core: str
    tail: str = ""
    movable: bool = True
    """Whether "If ..., core?" and "core if ...?" read well."""


@dataclass
class Tale:
    """The state every part of a story reads and adds to."""

    rng: random.Random
    past: bool = False
    words: float = 0.0
    """Probability that a number up to twenty is spelled out."""
    dollar_sign: bool = False
    cast: list[Person] = field(default_factory=list)
    given_texts: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    clauses: list[Clause] = field(default_factory=list)
    ask: Ask = Ask("")
    value: Amount = Amount(0)
    thing: Noun = lexicon.DOLLAR
    place: Place = PLACES[0]
    task: Task = TASKS[0]
    stuff: Stuff = STUFF[0]
    unnamed: list[Noun] = field(default_factory=list)
    """Goods the story has not named yet."""
    hero: Who = Who(0, False)
    accept: Accept = bool
    """Set for each stage: the values from which the stage after it can go on."""
    moved: bool = False
    """Whether the running value has changed since the opening."""
    lost: bool = False
    """Whether the last event took something away, so that "left" fits the question."""

    # --- draws -------------------------------------------------------------------------------------------------

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.rng.random() < probability

    def any(self, choices: Sequence[T]) -> T:
        """One of the choices, each as likely."""
        return choices[int(self.rng.random() * len(choices))]

    def pick(self, accept: Accept, low: int = 1, high: int = LARGEST_TERM) -> int:
        """An acceptable number of low..high."""
        if high > SMALL and self.chance(SMALL_SHARE):
            fitting = [number for number in range(low, SMALL + 1) if accept(number)]
            if fitting:
                return self.any(fitting)
        fitting = [number for number in range(low, high + 1) if accept(number)]
        if not fitting:
            raise DeadEndError
        return self.any(fitting)

    def factors(self, accept: Accept, low: int = 2) -> tuple[int, int]:
        """Two factors within the table whose product is acceptable."""
        pairs = [(k, m) for k in range(low, 13) for m in range(low, 13) if accept(k * m)]
        if not pairs:
            raise DeadEndError
        return self.any(pairs)

    # --- numbers -----------------------------------------------------------------------------------------------

    def give(self, value: int, text: str | None = None) -> Amount:
        """A number for the text; `text` replaces its plain spelling (twice, half, a week)."""
        if text is None:
            spelled = self.words if value <= SMALL else self.words / 6
            text = spell(value) if value <= LARGEST_WORD and spelled and self.chance(spelled) else str(value)
        self.given_texts.append(text)
        index = len(self.given_texts) - 1
        return Amount(value, chr(NUMBER_MARKS + index))

    def step(self, left: Amount, operator: str, right: Amount, unit: Noun | None, fixed: bool = False) -> Amount:
        """Adds a step to the answer; a story that leaves the ranges is told anew."""
        value = result_of(left.value, operator, right.value)
        if value is None:
            raise DeadEndError
        result = Amount(value)
        self.steps.append(Step(left, operator, right, result, unit, fixed))
        return result

    def run(self, operator: str, amount: Amount) -> None:
        """Applies a step to the running value, which stands first."""
        self.value = self.step(self.value, operator, amount, self.thing, fixed=True)
        self.moved = True
        if operator in "+-":
            self.lost = operator == "-"

    # --- phrases -----------------------------------------------------------------------------------------------

    def count(self, value: int, thing: Noun, extra: str = "") -> tuple[Amount, str]:
        """A number and its phrase: `9 more apples`, `a dozen eggs`."""
        dozen = value == 12 and self.chance(0.15)
        amount = self.give(value, "a dozen" if dozen else None)
        return amount, f"{amount} {extra}{' ' if extra else ''}{thing.form(value)}"

    def money(self, value: int) -> tuple[Amount, str]:
        """A price, as `7 dollars` or `$7` throughout one story."""
        if self.dollar_sign:
            amount = self.give(value, str(value))
            return amount, f"${amount}"
        return self.count(value, lexicon.DOLLAR)

    def times(self, value: int) -> tuple[Amount, str]:
        """A multiplier: `twice`, `3 times`, `three times`."""
        if value == 2 and self.chance(0.8):
            amount = self.give(2, "twice")
            return amount, str(amount)
        amount = self.give(value, spell(value) if self.chance(0.4) else None)
        return amount, f"{amount} times"

    def verb(self, base: str, subject: Who | None = None, many: bool = False) -> str:
        """The verb in the tense of the story, agreeing with its subject (third person without one)."""
        first = subject is not None and subject.first
        if base == "be":
            singular = "was" if self.past else "am" if first else "is"
            return ("were" if self.past else "are") if many else singular
        forms = lexicon.VERBS[base]
        if self.past:
            return forms.past
        return forms.base if many or first else forms.third

    # --- people ------------------------------------------------------------------------------------------------

    def person(self, family: str = "") -> Who:
        """Somebody new; the first of a story may be the teller or, with a family of things, bear a role."""
        first = not self.cast
        if first and self.chance(0.06):
            person = Person("I", "1")
        elif first and family and self.chance(0.12):
            roles = [name for name, families in lexicon.ROLES if family in families]
            person = Person(self.any(roles), self.any("mf"), True) if roles else self._named()
        else:
            person = self._named()
        self.cast.append(person)
        return Who(len(self.cast) - 1, person.gender == "1")

    def _named(self) -> Person:
        taken = {person.name for person in self.cast}
        while True:
            gender = self.any("mf")
            name = self.any(lexicon.FEMALE if gender == "f" else lexicon.MALE)
            if name not in taken:
                return Person(name, gender)

    def relative(self, who: Who) -> str:
        """A relative or friend of somebody, of the other gender so that pronouns stay clear."""
        gender = self.cast[who.index].gender
        kind = self.any(lexicon.RELATIVES["m" if gender == "f" else "f" if gender == "m" else self.any("mf")])
        return self.any((f"{who.poss} {kind}", f"{who.poss} {kind}", "a friend", "a neighbor"))

    # --- text --------------------------------------------------------------------------------------------------

    def fact(self, subject: Who | None, text: str) -> None:
        """Adds a clause that says how things are."""
        self.clauses.append(Clause(subject, text))

    def event(self, subject: Who | None, text: str) -> None:
        """Adds a clause that says what happens."""
        self.clauses.append(Clause(subject, text, event=True))

    def aux(self, subject: Who | None = None, many: bool = False) -> str:
        """The auxiliary of a question about the state in the tense of the story."""
        return self.verb("do", subject, many)

    def question(self, core: str, tail: str = "", movable: bool = True, present: bool = False) -> None:
        """Sets the question; `present` says that it is in the present tense even in a story of the past."""
        if tail == " now" and self.past and not present:
            tail = self.any(("", " then", " in the end"))
        self.ask = Ask(core, tail, movable)
