"""The commands and programs that the documentation shows, as it shows them.

A code block is fenced or indented by four spaces. A line that begins with `$ ` is a command that a test runs, and what
follows is what it prints: lines in this order, `...` for those left out, and numbers may be others. `$ cat FILE` shows
a file that the commands after it find. A command without `$ ` is not run (it needs a GPU, a large model, a network),
but its options must exist.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
RECORDS = {"LOG.md", "PERFORMANCE.md"}
"""What was done on one day on one machine; it stays as it was."""
DOCUMENTS = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name not in RECORDS)]


@dataclass(slots=True)
class Shown:
    """One command of a document, and what it is said to print."""

    command: str
    output: list[str] = field(default_factory=list)

    @property
    def fails(self) -> bool:
        """Whether it is shown with an error."""
        return any(line.startswith("error: ") for line in self.output)


def blocks(text: str) -> Iterator[tuple[str, list[str]]]:
    """Language ("" if none is named) and lines of each code block."""
    fence: str | None = None
    lines: list[str] = []
    for line in [*text.splitlines(), "end"]:
        marker = re.match(r"```(\w*)", line)
        if fence is not None:
            if marker:
                yield fence, lines
                fence, lines = None, []
            else:
                lines.append(line)
        elif line.startswith("    "):
            lines.append(line[4:])
        else:
            if lines:
                yield "", lines
            lines = []
            fence = marker[1] if marker else None


def shown(path: Path) -> list[Shown]:
    """The commands of a document that can be run here, in its order."""
    found: list[Shown] = []
    for _language, lines in blocks(path.read_text(encoding="utf-8")):
        current: Shown | None = None
        for line in lines:
            if line.startswith("$ "):
                current = Shown(line[2:])
                found.append(current)
            elif current is not None:
                current.output.append(line)
    return found


def command_lines(path: Path) -> list[str]:
    """Every line of a code block that calls `dmoe`, `dmoe-run` or a tool, run here or not; but none shown to fail."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [one.command for one in shown(path) if not one.fails]
    for _language, block in blocks(text):
        if not any(line.startswith("$ ") for line in block):
            lines += [line.strip() for line in block]
    return [line for line in lines if re.match(r"(dmoe(-run)?|python -m (tools|offload_engine)[\w.]*)( |$)", line)]


def programs(path: Path) -> list[str]:
    """The Python programs of a document."""
    return ["\n".join(lines) for language, lines in blocks(path.read_text(encoding="utf-8")) if language == "python"]
