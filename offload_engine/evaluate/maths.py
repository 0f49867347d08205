"""Whether two pieces of LaTeX mean the same, as math-verify (extra `eval`) judges."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from offload_engine.errors import UsageError

BOX = "\\boxed{"

_SECONDS = 5
"""What parsing and comparing may take each; some pairs would keep sympy busy for hours."""


def boxed(content: str) -> str:
    r"""`content` in a ``\boxed{}``."""
    return f"{BOX}{content}}}"


def equal_maths(answer: str, gold: str) -> bool:
    """Whether the last expression that math-verify finds in `answer` equals the LaTeX expression `gold`.

    False for what it can't parse or compare in time. Raises `UsageError` where math-verify isn't installed.
    """
    parse, verify = _math_verify()
    if answer.strip() == boxed(gold).strip():
        return True
    # math-verify keeps time with SIGALRM, which only the main thread may use.
    seconds = _SECONDS if threading.current_thread() is threading.main_thread() else None
    wanted = parse(boxed(gold), parsing_timeout=seconds)
    found = parse(answer, parsing_timeout=seconds)
    return bool(verify(wanted, found, timeout_seconds=seconds))


def _math_verify() -> tuple[Callable[..., Any], Callable[..., Any]]:
    try:
        from math_verify import parse, verify
    except ImportError:
        raise UsageError(
            "grading MATH500 needs math-verify, which isn't installed; pip install 'offload-engine[eval]'"
        ) from None
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs what it can't parse; here that's just wrong
    return parse, verify
