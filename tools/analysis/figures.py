"""Figures for a page that is light or dark: drawn by matplotlib, inlined as SVG whose ink is the page's own colour."""

from __future__ import annotations

import html
import importlib.util
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload_engine.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"
"""Stands for the page's text colour."""
BLUE, ORANGE, GREEN, PURPLE, GREY = "#3a86c8", "#d9702a", "#2a9d6f", "#b0669f", "#8a8f98"
"""Colours that are legible on white and on black, and told apart by the colour-blind."""

_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GREY,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
_PREAMBLE = re.compile(r"^.*?(?=<svg)", re.DOTALL)
_METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)
_NAMESPACES = re.compile(r'\s+xmlns(:\w+)?="[^"]*"')
_IDS = re.compile(r'(\bid="|url\(#|href="#)')
_SIZE = re.compile(
    r'(<svg\b[^>]*?)\s+height="[^"]*"([^>]*?)\s+width="[^"]*"|(<svg\b[^>]*?)\s+width="[^"]*"([^>]*?)\s+height="[^"]*"'
)


@dataclass(frozen=True)
class Drawn:
    """A finished figure."""

    name: str
    caption: str
    alt: str
    """What is to be seen, for those who can't see it."""
    svg: str = field(repr=False)
    """As matplotlib wrote it."""
    png: bytes = field(repr=False)

    def as_html(self) -> str:
        """A `<figure>` with the drawing inlined."""
        svg = _NAMESPACES.sub("", _METADATA.sub("", _PREAMBLE.sub("", self.svg)))
        svg = _IDS.sub(lambda found: f"{found[1]}{self.name}-", svg).replace(INK, "currentColor")
        svg = _SIZE.sub(lambda found: "".join(part for part in found.groups() if part), svg, count=1)
        label = html.escape(self.alt, quote=True)
        svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
        return f"<figure>{svg}<figcaption>{html.escape(self.caption)}</figcaption></figure>"

    def save(self, directory: Path) -> None:
        """Write it as SVG and as PNG."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{self.name}.svg").write_text(self.svg, encoding="utf-8")
        (directory / f"{self.name}.png").write_bytes(self.png)


def require_matplotlib() -> None:
    """Raises `UsageError` where it isn't installed: better now than after hours of evaluations."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("figures need matplotlib, which isn't installed; pip install 'offload-engine[eval]'")


@contextmanager
def panels(count: int, *, height: float = 3.2, width: float = 7.2) -> Iterator[tuple[Figure, Sequence[Axes]]]:
    """A figure of `count` panels side by side, `width` x `height` inches."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height))  # without pyplot there is no window system to ask for, nor to close
        yield figure, list(figure.subplots(1, count, squeeze=False)[0])


def finish(figure: Figure, name: str, caption: str, alt: str) -> Drawn:
    """Draw it, the same bytes for the same data."""
    import matplotlib as mpl

    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        figure.savefig(png, format="png", dpi=150, facecolor="white")
    return Drawn(name, caption, alt, svg.getvalue(), png.getvalue())
