"""Ctrl-C: the first stops after the current step, the second at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_NOTICE = b"\nstopping after this step; Ctrl-C again stops at once\n"


@contextmanager
def interruptible(notice: bytes = _NOTICE) -> Iterator[Callable[[], bool]]:
    """While open, the first SIGINT is only remembered, with a `notice` on stderr, and the second is a
    `KeyboardInterrupt`.

    Yields a function that says whether there was one. A SIGINT that this process was started to ignore stays ignored.
    """
    interrupts = 0

    def on_interrupt(_signal: int, _frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += 1
        if interrupts > 1:
            raise KeyboardInterrupt
        with suppress(OSError, ValueError, AttributeError):  # past Python's buffers, which a handler mustn't enter
            os.write(sys.stderr.fileno(), notice)

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: interrupts > 0
    finally:
        signal.signal(signal.SIGINT, before)
