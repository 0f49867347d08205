"""Tables as data, written as HTML and as Markdown, and numbers as people read them."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

NOTHING = "–"
"""Where there is no number."""


@dataclass(frozen=True)
class Table:
    """A table; its first column names the row, the others are numbers."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    ours: frozenset[int] = frozenset()
    """Rows to be set off: those of dMoE."""
    paper_from: int | None = None
    """From this column on the numbers are the paper's."""
    notes: Sequence[str] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"row {row} has {len(row)} cells; the table has {len(self.columns)} columns")

    def as_markdown(self) -> str:
        """GitHub's tables; the caption stands before it in bold."""
        lines = [f"**{self.caption}**", "", _line(self.columns), "|---|" + "---:|" * (len(self.columns) - 1)]
        for number, row in enumerate(self.rows):
            lines.append(_line([f"**{row[0]}**", *row[1:]] if number in self.ours else row))
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)])

    def as_html(self) -> str:
        """A `<figure>` that scrolls sideways where the screen is narrow."""
        head = "".join(self._cell("th", place, name, ' scope="col"') for place, name in enumerate(self.columns))
        body = []
        for number, row in enumerate(self.rows):
            mark = ' class="ours"' if number in self.ours else ""
            first = f'<th scope="row">{unbroken(row[0])}</th>'
            rest = "".join(self._cell("td", place, text) for place, text in enumerate(row[1:], start=1))
            body.append(f"<tr{mark}>{first}{rest}</tr>")
        notes = "".join(f'<p class="note">{unbroken(note)}</p>' for note in self.notes)
        caption = html.escape(self.caption)
        return (
            f'<div class="table"><p class="caption">{caption}</p>'
            f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}">'
            f'<table aria-label="{caption}"><thead><tr>{head}</tr></thead>'
            f"<tbody>{''.join(body)}</tbody></table></div>{notes}</div>"
        )

    def as_dict(self) -> dict[str, Any]:
        """For the report's JSON, as it is printed."""
        return {"caption": self.caption, "columns": list(self.columns), "rows": [list(row) for row in self.rows]}

    def _cell(self, tag: str, place: int, text: str, more: str = "") -> str:
        paper = ' class="paper"' if self.paper_from is not None and place >= self.paper_from else ""
        return f"<{tag}{more}{paper}>{html.escape(text)}</{tag}>"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def unbroken(text: str) -> str:
    """Escaped for HTML, with no line break before a unit or beside an equals sign."""
    return html.escape(text).replace(" = ", "\u00a0=\u00a0").replace(" %", "\u00a0%")


def number(value: float | None, places: int = 1) -> str:
    """A number with so many decimal places."""
    return NOTHING if value is None else f"{value:.{places}f}"


def percent(share: float | None, places: int = 1) -> str:
    """A share of 1 as percent."""
    return NOTHING if share is None else f"{100 * share:.{places}f} %"


def interval(low: float, high: float, places: int = 1) -> str:
    """The bounds of a share of 1, in percent."""
    return f"{100 * low:.{places}f} to {100 * high:.{places}f}"


def change(now: float, before: float, places: int = 1) -> str:
    """How much less or more `now` is than `before`, in percent."""
    return f"{100 * (now / before - 1):+.{places}f} %".replace("-", "−")
