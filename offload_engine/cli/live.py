"""The live view of `--watch` on a terminal. Model text enters it as plain `Text`, never as markup."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from offload_engine.cli.terminal import visible
from offload_engine.cli.watch import END, OPEN, Board, Frame, Token, percent
from offload_engine.config import format_bytes

if TYPE_CHECKING:
    from types import TracebackType

    from offload_engine.core import StepEvent
    from offload_engine.experts.scheduling.cache import Occupancy

TAIL = 500
"""Characters of the answer before the block that stay in view."""
BAR = 28
"""Width of the occupancy bar."""
SIDE = BAR + 4
NARROW = 70
"""Below this many columns the two panels stand above each other."""
HALF = 0.5
SURE, LIKELY, DOUBTFUL = "bold green", "bold yellow", "bold red"


class LiveWatch:
    """Redraws one view with every step, and leaves nothing behind."""

    live = True

    def __init__(self, board: Board, threshold: float, console: Console) -> None:
        self._board = board
        self._threshold = threshold
        self._console = console
        # Not redirecting stdout: it is the answer's, and this view is on stderr.
        self._live = Live(
            console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
        )

    def show(self, event: StepEvent) -> None:
        """See `Viewer`."""
        frame = self._board.take(event)
        if frame is not None:
            self._live.update(render(frame, self._threshold, self._console.width), refresh=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._live.stop()


def render(frame: Frame, threshold: float, width: int) -> RenderableType:
    """A frame as two panels: the text, and the cache."""
    title = Text(f"block {frame.block}, step {frame.step}, {frame.undecided} of {len(frame.tokens)} masked")
    text = Panel(Group(_words(frame, threshold), Text(), _legend(threshold)), title=title, title_align="left")
    cache = Panel(_facts(frame), title=Text("expert cache"), title_align="left", width=min(SIDE, width))
    if width < NARROW:
        return Group(text, cache)
    grid = Table.grid(expand=True)
    grid.add_column(ratio=1)
    grid.add_column(width=SIDE)
    grid.add_row(text, cache)
    return grid


def _words(frame: Frame, threshold: float) -> Text:
    """The answer's tail, then the block, what is new in it by how sure it is."""
    return Text(visible(frame.answer[-TAIL:]), style="dim").append_text(block_text(frame.tokens, threshold))


def block_text(tokens: Sequence[Token], threshold: float) -> Text:
    """A block, what is new in it by how sure it is."""
    text = Text(style="dim")
    for token in tokens:
        if token.open:
            text.append(token.text, style="dim not bold")
        elif token.confidence is None:
            text.append(token.text, style="not dim")
        else:
            text.append(token.text, style=f"not dim {_style(token.confidence, threshold)}")
    return text


def _style(confidence: float, threshold: float) -> str:
    if confidence > threshold:
        return SURE
    return LIKELY if confidence > HALF else DOUBTFUL


def _legend(threshold: float) -> Text:
    return Text.assemble(
        ("new: ", "dim"),
        (f"surer than {threshold:g} ", SURE),
        (f"than {HALF:g} ", LIKELY),
        ("less ", DOUBTFUL),
        (f" {OPEN.strip()} masked  {END} end", "dim"),
    )


def _facts(frame: Frame) -> Text:
    slots, stats = frame.occupancy, frame.stats
    unique = "n/a" if stats.unique_experts is None else f"{stats.unique_experts:.1f}"
    text = occupancy_bar(slots)
    for name, value, style in (
        ("resident", str(slots.resident), "green"),
        ("on probation", str(slots.probation), "cyan"),
        ("loading", str(slots.loading), "yellow"),
        ("free", str(slots.free), "dim"),
        ("hit rate", percent(stats.hit_rate), ""),
        ("moved", format_bytes(stats.bytes_moved), ""),
        ("unique experts", unique, ""),
        ("steps", str(stats.denoise_steps), ""),
        ("tokens/s", f"{frame.tokens_per_second:.1f}", ""),
    ):
        text.append(f"\n{name:<15}", style=style)
        text.append(f"{value:>{BAR - 15}}")
    return text


def occupancy_bar(slots: Occupancy, width: int = BAR) -> Text:
    """All slots as one bar of `width` characters: resident, on probation, loading, free."""
    probation = min(slots.probation, slots.resident)  # some of them may still be loading
    parts = (
        (slots.resident - probation, "█", "green"),
        (probation, "▓", "cyan"),
        (slots.loading, "▒", "yellow"),
        (slots.free, "░", "dim"),
    )
    total, reached, bar = max(1, sum(count for count, _, _ in parts)), 0, Text()
    for count, sign, style in parts:
        start = reached * width // total
        reached += count
        bar.append(sign * (reached * width // total - start), style=style)
    return bar
