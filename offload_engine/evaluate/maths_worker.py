"""The program that judges maths, in a process of its own: it imports nothing of this package, so that it stays small.

Reads lines ``[answer, gold]`` of JSON from standard input, and writes one line each, ``true`` or ``false``, after a
first one that says whether math-verify could be imported: ``null``, or why it couldn't. Ends with its input.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
from contextlib import suppress

MEMORY = 2**30
"""Bytes of address space; some numbers would take all there is."""
SECONDS = 5
"""What parsing and comparing may take each, as math-verify keeps time."""
HARD_SECONDS = 20
"""Of a core, for one answer: the end of what doesn't heed math-verify's alarm, such as one long multiplication."""


def main() -> None:
    """Judge until standard input ends."""
    with suppress(ImportError, ValueError, OSError):  # Windows has no such limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        from math_verify import parse, verify
    except Exception as error:
        _say(" ".join(f"{type(error).__name__}: {error}".split()))
        return
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs what it can't parse; here that's just wrong
    _say(None)
    for line in sys.stdin:
        answer, gold = json.loads(line)
        _allow(HARD_SECONDS)
        try:
            wanted = parse(gold, parsing_timeout=SECONDS)
            right = bool(verify(wanted, parse(answer, parsing_timeout=SECONDS), timeout_seconds=SECONDS))
        except Exception:  # whatever sympy makes of a strange expression; it is no answer then
            right = False
        _allow(0)
        _say(right)


def _allow(seconds: int) -> None:
    """Let the system end this process after that much more work; 0: never."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _say(value: object) -> None:
    print(json.dumps(value), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
