"""One question of a task."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Sample:
    """A question, what the model is asked, and the answer that is right."""

    id: str
    """Unlike any other's of its task."""
    question: str
    prompt: str
    """The user's turn, the question in it."""
    gold: str
    """As the dataset publishes it, or as its grader reads it."""
    tags: dict[str, str | int] = field(default_factory=dict)
    """What answers may be grouped by, such as a kind or a level of difficulty."""
    labels: tuple[str, ...] = ()
    """Of a multiple choice: what the choices are called."""
    where: str | None = None
    """The place in a dataset, ``FILE:LINE``; None: it was generated."""
