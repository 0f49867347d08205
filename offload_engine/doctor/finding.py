"""One line of a diagnosis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


class Level(IntEnum):
    """How bad it is."""

    OK = 0
    WARNING = 1
    """It runs, slower or with less than the machine could give."""
    PROBLEM = 2
    """It doesn't run as asked."""

    @property
    def word(self) -> str:
        """As it is shown."""
        return self.name.lower()


EXIT_CODES = {Level.OK: 0, Level.WARNING: 5, Level.PROBLEM: 6}
"""By the worst finding; none of the codes that errors have."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found."""

    check: str
    found: str
    level: Level = Level.OK
    way_out: str = ""
    """What to do about it; empty where there is nothing to do."""

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return {"check": self.check, "level": self.level.word, "found": self.found, "way_out": self.way_out}


def worst(findings: Sequence[Finding]) -> Level:
    """The highest level there is; `OK` where there are no findings."""
    return max((finding.level for finding in findings), default=Level.OK)


def table(findings: Sequence[Finding]) -> str:
    """Aligned plain text: level, check, what was found, the way out on a line of its own; a sum at the end."""
    levels = max(len(level.word) for level in Level)
    checks = max((len(finding.check) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{finding.level.word:<{levels}}  {finding.check:<{checks}}  {finding.found}")
        if finding.way_out:
            lines.append(f"{'':{levels + checks + 2}}  -> {finding.way_out}")
    return "\n".join([*lines, "", _sum(findings)])


def _sum(findings: Sequence[Finding]) -> str:
    counts = {level: sum(finding.level is level for finding in findings) for level in (Level.PROBLEM, Level.WARNING)}
    told = [f"{count} {level.word}{'s' if count > 1 else ''}" for level, count in counts.items() if count]
    return f"{', '.join(told)} in {len(findings)} checks" if told else f"all {len(findings)} checks are ok"


def refused(check: str, error: Exception) -> Finding:
    """What an error of ours says, which ends its first line with the way out."""
    found, separator, way_out = str(error).partition("\n")[0].rpartition("; ")
    return Finding(check, found, Level.PROBLEM, way_out) if separator else Finding(check, way_out, Level.PROBLEM)
