"""The commands and programs that the documentation shows, as it shows them.

A code block is fenced, with a language, or indented by four spaces. An indented one is either a transcript or marked:

- A transcript begins with a line `$ COMMAND`. A test runs every such line, and what follows it is what it prints: lines
  in this order, `...` for those left out, and numbers may be others. A command may go on behind a backslash.
  `$ cat FILE` shows a file that the commands after it find; of `dmoe chat`, lines that begin with `> ` are typed;
  `dmoe serve` stays until the document ends, or the next `dmoe serve` begins.
- A marked block begins with a comment that says, in words of `REASONS`, why no test runs its commands: all other lines.
  Their options must exist.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent
RECORDS = {"LOG.md", "PERFORMANCE.md"}
"""What was done on one day on one machine; it stays as it was."""
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name not in RECORDS),
]
REASONS = (
    "installs packages",
    "needs a checkpoint of full size",
    "downloads from the hub",
    "needs the history of this repository",
    "takes minutes",
    "takes hours",
)
"""Why a command isn't run by a test; the comment may go on behind a colon."""
PROMPT, TYPED = "$ ", "> "


class Block(NamedTuple):
    """A code block."""

    language: str
    """Empty for an indented one."""
    lines: list[str]

    @property
    def is_transcript(self) -> bool:
        """Whether its commands are run."""
        return not self.language and self.lines[0].startswith(PROMPT)

    @property
    def reason(self) -> str | None:
        """Why its commands aren't run, if it says so."""
        said = re.match(r"# ([^:]+)", self.lines[0])
        return said[1] if not self.language and said and said[1] in REASONS else None

    @property
    def marked_commands(self) -> list[str]:
        """Of a marked block, without continuation lines."""
        return [line.strip() for line in joined(self.lines[1:]) if line.strip()]


@dataclass(slots=True)
class Shown:
    """One command of a document, and what it is said to print."""

    command: str
    output: list[str] = field(default_factory=list)

    @property
    def fails(self) -> bool:
        """Whether it is shown with an error."""
        return any(line.startswith("error: ") for line in self.output)


def joined(lines: list[str]) -> list[str]:
    """`lines`, those that end with a backslash in one with the next."""
    return re.sub(r"\\\n\s*", "", "\n".join(lines)).split("\n")


def blocks(text: str) -> Iterator[Block]:
    """The code blocks. Blank lines within an indented one belong to it."""
    fence: str | None = None
    lines: list[str] = []
    for line in [*text.splitlines(), "end"]:
        marker = re.match(r"```(\w*)", line)
        if fence is not None:
            if marker:
                yield Block(fence or "none", lines)
                fence, lines = None, []
            else:
                lines.append(line)
        elif line.startswith("    "):
            lines.append(line[4:])
        elif lines and not line.strip():
            lines.append("")
        else:
            if lines:
                yield Block("", lines)
            lines = []
            fence = marker[1] if marker else None


def blocks_of(path: Path) -> list[Block]:
    """The code blocks of a document."""
    return list(blocks(path.read_text(encoding="utf-8")))


def shown(path: Path) -> list[Shown]:
    """The commands of a document's transcripts, in its order."""
    found: list[Shown] = []
    for block in blocks_of(path):
        for line in joined(block.lines) if block.is_transcript else []:
            if line.startswith(PROMPT):
                found.append(Shown(line.removeprefix(PROMPT)))
            else:
                found[-1].output.append(line)
    return found


def command_lines(path: Path) -> list[str]:
    """Every command of a document, run here or not; but none shown to fail."""
    lines = [one.command for one in shown(path) if not one.fails]
    for block in blocks_of(path):
        if block.reason is not None:
            lines += block.marked_commands
    return lines


def quoted(path: Path) -> list[str]:
    """What a document's prose has between backticks."""
    prose = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`]+)`", re.sub(r"^    .*$", "", prose, flags=re.MULTILINE))


def programs(path: Path) -> list[str]:
    """The Python programs of a document."""
    return ["\n".join(block.lines) for block in blocks_of(path) if block.language == "python"]
