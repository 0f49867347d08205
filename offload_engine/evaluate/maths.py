"""Whether two pieces of LaTeX mean the same, as math-verify (extra `eval`) judges, in a process of its own.

What sympy takes is then no part of the engine's memory, and an expression that it can't cope with ends that process
and not the run.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

from offload_engine.errors import UsageError

BOX = "\\boxed{"

_PROGRAM = Path(__file__).with_name("maths_worker.py")


def boxed(content: str) -> str:
    r"""`content` in a ``\boxed{}``."""
    return f"{BOX}{content}}}"


def require_math_verify() -> None:
    """Raises `UsageError` where math-verify isn't installed."""
    if find_spec("math_verify") is None:
        raise UsageError("grading MATH500 needs math-verify, which isn't installed; pip install 'offload-engine[eval]'")


def equal_maths(answer: str, gold: str) -> bool:
    """Whether the last expression that math-verify finds in `answer` equals the LaTeX expression `gold`.

    False for what it can't parse or compare within its time and memory. Raises `UsageError` where math-verify isn't
    installed.
    """
    require_math_verify()
    if answer.strip() == boxed(gold).strip():
        return True
    return _worker.judge(answer, boxed(gold))


class _Worker:
    """One `maths_worker` process, started when it is first needed and whenever the last one is gone."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def judge(self, answer: str, gold: str) -> bool:
        """What the process says; False where it dies of the question."""
        with self._lock:
            process = self._process or self._start()
            try:
                said = _exchange(process, [answer, gold])
            except BaseException:  # an interruption: the next question must not get this one's answer
                self._stop()
                raise
            if said is None:
                self._stop()
            return said is True

    def close(self) -> None:
        """End the process, if there is one."""
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[bytes]:
        self._process = process = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a terminal's Ctrl-C is this process's to handle
        )
        assert process.stdout is not None
        first = process.stdout.readline()
        if first.strip() != b"null":
            self._stop()
            reason = json.loads(first) if first else "the process that grades died as it started"
            raise UsageError(f"math-verify can't be used ({reason}); pip install 'offload-engine[eval]' again")
        return process

    def _stop(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        process.kill()
        process.communicate()


def _exchange(process: subprocess.Popen[bytes], question: list[str]) -> bool | None:
    """The answer to `question`; None from a process that is dead."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(question).encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    said = process.stdout.readline()
    return bool(json.loads(said)) if said else None


_worker = _Worker()
atexit.register(_worker.close)
