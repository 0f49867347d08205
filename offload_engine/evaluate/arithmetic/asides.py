"""Facts that do not matter: now and then a remark, or a number that the answer must leave alone."""

from offload_engine.evaluate.arithmetic.tale import Clause, Tale, Who

DISTRACTOR_SHARE = 0.05
REMARK_SHARE = 0.05


def add_aside(tale: Tale, kind: str) -> None:
    """Adds at most one aside before or after the facts of a story."""
    draw = tale.rng.random()
    if not tale.clauses or draw >= DISTRACTOR_SHARE + REMARK_SHARE:
        return
    aside = _distractor(tale, kind) if draw < DISTRACTOR_SHARE else _remark(tale)
    first = draw >= DISTRACTOR_SHARE or tale.chance(0.6)
    tale.clauses.insert(0 if first else len(tale.clauses), aside)
    tale.ask = type(tale.ask)(tale.ask.core, tale.ask.tail, movable=False)


def _alone(subject: Who | None, text: str) -> Clause:
    return Clause(subject, text, alone=True)


def _distractor(tale: Tale, kind: str) -> Clause:
    number = tale.give(tale.rng.randint(5, 12))
    impersonal = (
        f"the shop {tale.verb('open')} at {number} o'clock",
        f"it {tale.verb('be')} {number} degrees outside",
        f"the trip to school {tale.verb('take')} {number} minutes",
    )
    if not tale.cast or kind in ("ages", "time") or tale.chance(0.3):
        return _alone(None, tale.any(impersonal[: 2 if kind == "time" else 3]))
    hero = Who(0, tale.cast[0].gender == "1")
    personal = (
        f"{tale.verb('live', hero)} {number} miles from the school",
        f"{tale.verb('be', hero)} {number} years old",
        f"{tale.verb('live', hero)} at number {number}",
        f"{tale.verb('go', hero)} to bed at {number} o'clock",
    )
    miles_mislead = kind in ("work", "goals", "measures")
    return _alone(hero, tale.any(personal[1:] if miles_mislead else personal))


def _remark(tale: Tale) -> Clause:
    if not tale.cast or tale.chance(0.3):
        be = tale.verb("be")
        return _alone(
            None, tale.any((f"it {be} a sunny day", f"it {be} raining", f"today {be} a holiday", f"it {be} Saturday"))
        )
    hero = Who(0, tale.cast[0].gender == "1")
    home = tale.any(("a small town", "the city", "a big house", "a village"))
    remarks = (
        f"{tale.verb('live', hero)} in {home}",
        f"{tale.verb('be', hero)} very happy today",
        f"{tale.verb('like', hero)} to help",
        f"{tale.verb('like', hero)} numbers",
        f"{tale.verb('go', hero)} to school by bus",
    )
    return _alone(hero, tale.any(remarks))
