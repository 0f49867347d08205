"""An interrupt wherever Python would let one in, in code of our choice."""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

LETTING = ("RESUME", "JUMP_BACKWARD")
"""Instructions at which CPython looks for signals; it does so after every call as well."""

_points: dict[CodeType, frozenset[int]] = {}


def points(code: CodeType) -> frozenset[int]:
    """Offsets of the instructions before which a signal handler may run."""
    if code not in _points:
        found, before = set(), None
        for instruction in dis.get_instructions(code):
            called = before is not None and before.opname.startswith("CALL")
            # an interrupt is raised by the call, and handled where the call's own exceptions are
            alike = called and _handler(code, instruction) == _handler(code, before)
            if instruction.opname.startswith(LETTING) or alike:
                found.add(instruction.offset)
            before = instruction
        _points[code] = frozenset(found)
    return _points[code]


def _handler(code: CodeType, instruction: dis.Instruction) -> int | None:
    """Where an exception of this instruction is handled."""
    table = dis._parse_exception_table(code)  # type: ignore[attr-defined]
    return next((one.target for one in table if one.start <= instruction.offset < one.end), None)


class Interrupt:
    """Counts the points passed in this thread, in files whose path `wanted` accepts; raises at the `at`-th."""

    def __init__(self, wanted: Callable[[str], bool], at: int | None = None) -> None:
        self.wanted, self.at = wanted, at
        self.passed = 0
        self.place = ""

    def __call__(self, frame: FrameType, event: str, _argument: Any) -> Any:
        """A trace function (`sys.settrace`)."""
        if event == "call":
            if not self.wanted(frame.f_code.co_filename):
                return None
            frame.f_trace_opcodes = True
            frame.f_trace_lines = False
        elif event == "opcode" and frame.f_lasti in points(frame.f_code):
            self.passed += 1
            if self.passed - 1 == self.at:
                self.place = f"{frame.f_code.co_qualname}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self

    @contextmanager
    def armed(self) -> Iterator[None]:
        """While open."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            yield
        finally:
            sys.settrace(before)
