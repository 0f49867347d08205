"""Writing to stdout and stderr so that nothing a model, a file or a user wrote can steer the terminal."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

from offload_engine.errors import OffloadError

if TYPE_CHECKING:
    from rich.console import Console

_KEPT = "\n\t"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_STAND_INS = (
    {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in _KEPT}  # Unicode's control pictures
    | {0x7F: "\N{SYMBOL FOR DELETE}"}
    | dict.fromkeys(range(0x80, 0xA0), _REPLACEMENT)  # terminals read some of these as escape sequences
    | dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), _REPLACEMENT)  # reorder what is shown
)


def visible(text: str) -> str:
    """`text` with every control character but newline and tab replaced by something to look at."""
    return text.translate(_STAND_INS)


def note(text: str) -> None:
    """Tell the user something on stderr; several lines are taken as they are."""
    if sys.stderr is not None:
        sys.stderr.write(f"{visible(text)}\n")
        sys.stderr.flush()


def stderr_console() -> Console:
    """A console on stderr that takes text literally: no markup, no emoji codes, no highlighting."""
    from rich.console import Console

    return Console(stderr=True, markup=False, emoji=False, highlight=False)


def stderr_is_live() -> bool:
    """Whether stderr is a terminal that can redraw what it shows."""
    return _is_live(sys.stderr)


def stdout_is_live() -> bool:
    """Likewise."""
    return _is_live(sys.stdout)


def _is_live(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


class Output:
    """Standard output: pieces of text, out at once, in UTF-8; harmless where a terminal reads them.

    Raises `OffloadError` when it can't be written; a reader that went away stays a `BrokenPipeError`.
    """

    def __init__(self) -> None:
        if sys.stdout is None:
            raise OffloadError("standard output is closed, so there is nowhere to write the answer")
        self._stream: TextIO = sys.stdout
        self._terminal = self._stream.isatty()
        self._open_line = False
        reconfigure = getattr(self._stream, "reconfigure", None)
        if reconfigure is not None and self._terminal:
            reconfigure(errors="replace")
        elif reconfigure is not None:
            reconfigure(encoding="utf-8")

    @property
    def terminal(self) -> bool:
        """Whether a person is looking."""
        return self._terminal

    def write(self, text: str) -> None:
        """Append `text`."""
        if not text:
            return
        self._open_line = not text.endswith("\n")
        try:
            self._stream.write(visible(text) if self._terminal else text)
            self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            _give_up(self._stream)
            raise OffloadError(f"standard output can't be written ({error.strerror}); the answer is cut off") from None

    def line(self, text: str) -> None:
        """Append `text` and end its line, unless it does so itself."""
        self.write(text if text.endswith("\n") else f"{text}\n")

    def end_line(self) -> None:
        """End the line that was begun, if any."""
        if self._open_line:
            self.write("\n")


def _give_up(stream: TextIO) -> None:
    """Send what `stream` still holds to nowhere: Python would try to write it again, and complain, as it exits."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
