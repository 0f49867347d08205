"""From a told story to its text: the order of the sentences, merged clauses, pronouns, numbers, operands."""

import re

from offload_engine.evaluate.arithmetic import lexicon
from offload_engine.evaluate.arithmetic.lexicon import Person
from offload_engine.evaluate.arithmetic.tale import (
    FORMS_PER_PERSON,
    NAME,
    NUMBER_MARKS,
    PERSON_MARKS,
    POSSESSIVE,
    Clause,
    Tale,
)

_LINKS = ("Then ", "Then ", "Later, ", "After that, ", "Next, ")
_MARK = re.compile(f"[{chr(NUMBER_MARKS)}-{chr(PERSON_MARKS + 0xFF)}]")
_END = re.compile(r"[.?] ")
_PRONOUNS = {"m": ("he", "him", "his"), "f": ("she", "her", "her")}
_FIRST = ("I", "me", "my", "I")


def write(tale: Tale) -> str:
    """The question's text with its marks resolved to names, but numbers still marked (see `answer`)."""
    clauses, ask = tale.clauses, tale.ask
    asked = ask.core + ask.tail
    if not clauses:
        ending = "" if asked.endswith(("?", ".")) else "?"
        return _capital(_resolve_people(tale, asked + ending))
    if ask.movable and len(clauses) <= 3 and tale.chance(0.3):
        joined = _joined(clauses)
        form = tale.rng.random()
        if form < 0.35:
            text = f"If {joined}, {asked}?"
        elif form < 0.7 or len(clauses) == 1:
            text = f"{_capital(ask.core)} if {joined}?"
        else:
            text = f"{_sentences(tale, clauses[:-1])} If {clauses[-1].full()}, {asked}?"
    else:
        text = f"{_sentences(tale, clauses)} {_capital(asked)}?"
    return _capital(_resolve_people(tale, text))


def answer(tale: Tale, text: str) -> str:
    """The worked answer; where + or * joins two given numbers they stand in the order of the text."""
    lines = []
    for step in tale.steps:
        left, right = step.left, step.right
        both_given = bool(left.mark and right.mark)
        if both_given and step.operator in "+*" and not step.fixed and text.index(right.mark) < text.index(left.mark):
            left, right = right, left
        unit = f" {step.unit.form(step.result.value)}" if step.unit else ""
        lines.append(f"{left.value}{step.operator}{right.value}={step.result.value}{unit}.")
    return f"{' '.join(lines)} \\boxed{{{tale.steps[-1].result.value}}}"


def fill_numbers(tale: Tale, text: str) -> str:
    """The text with its numbers spelled as each was given."""
    filled = re.sub(_MARK, lambda mark: tale.given_texts[ord(mark.group()) - NUMBER_MARKS], text)
    return re.sub(r"(^|[.?] )([a-z])", lambda found: found.group(1) + found.group(2).upper(), filled)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _joined(clauses: list[Clause]) -> str:
    """Clauses as one conditional: subjects are not repeated, the last is joined by "and"."""
    text = clauses[0].full()
    for index, clause in enumerate(clauses[1:], start=1):
        same = clause.subject is not None and clause.subject == clauses[index - 1].subject
        link = " and " if index == len(clauses) - 1 else ", "
        text += link + (clause.text if same and link else clause.full())
    return text


def _sentences(tale: Tale, clauses: list[Clause]) -> str:
    """Clauses as sentences, some merged with the one before when they share a subject."""
    sentences: list[str] = []
    previous: Clause | None = None
    merged = False
    for clause in clauses:
        merged = merged or clause.alone or previous is None or previous.alone
        same = previous is not None and clause.subject is not None and clause.subject == previous.subject
        if same and not merged and tale.chance(0.45):
            link = tale.any((" and ", " and then ", ", then ")) if clause.event else " and "
            sentences[-1] += link + clause.text
            merged = True
        elif not same and not merged and not clause.event and tale.chance(0.15):
            sentences[-1] += f" and {clause.full()}"
            merged = True
        else:
            link = tale.any(_LINKS) if clause.event and sentences and tale.chance(0.2) else ""
            sentences.append(link + clause.full() if link else _capital(clause.full()))
            merged = False
        previous = clause
    return " ".join(f"{sentence}." for sentence in sentences)


def _resolve_people(tale: Tale, text: str) -> str:
    """Replaces each mention of a person by a name or, where no other person of that gender was named, a pronoun."""
    sentence = 0
    last_seen: dict[int, int] = {}
    out: list[str] = []
    for position, character in enumerate(text):
        if _END.match(text, position):
            sentence += 1
        code = ord(character) - PERSON_MARKS
        if not 0 <= code < FORMS_PER_PERSON * len(tale.cast):
            out.append(character)
            continue
        index, form = divmod(code, FORMS_PER_PERSON)
        person = tale.cast[index]
        rivals = any(tale.cast[other].gender == person.gender for other in last_seen if other != index)
        near = index in last_seen and not rivals and sentence - last_seen[index] <= 1
        owns = form == POSSESSIVE and last_seen.get(index) == sentence
        word = _mention(person, form, form != NAME and near and (owns or tale.chance(0.75)), index in last_seen)
        begins = not out or "".join(out[-2:]) in (". ", "? ")
        out.append(_capital(word) if begins else word)
        last_seen[index] = sentence
    return "".join(out)


def _mention(person: Person, form: int, pronoun: bool, known: bool) -> str:
    if person.gender == "1":
        return _FIRST[form]
    if pronoun:
        return _PRONOUNS[person.gender][form]
    name = person.name
    if person.role:
        name = f"the {name}" if known else f"{lexicon.article(name)} {name}"
    return f"{name}'s" if form == POSSESSIVE else name
