"""Prompt sets: JSON lines with a field that holds the prompt, or plain text, one prompt a line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offload_engine.config import brief
from offload_engine.errors import PromptError

FIELDS = ("question", "prompt")
"""Where a JSON line's prompt is looked for when no field is named: the first of these that the line has."""
TEXT_SUFFIX = ".txt"
"""Files of this suffix hold one plain prompt a line; all others JSON lines."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of a prompt set."""

    id: int
    """Index among the set's lines that aren't blank, unusable ones counted, so that it says which line it was."""
    source: str
    """file:line, for messages."""
    text: str
    problem: str | None = None
    """Why the line is no prompt that can be answered; None for one that can."""


@dataclass(frozen=True, slots=True)
class PromptFile:
    """Where prompts came from."""

    name: str
    sha256: str
    prompts: int


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts of some files, in order."""

    prompts: list[Prompt] = field(default_factory=list)
    files: list[PromptFile] = field(default_factory=list)


def read_prompts(paths: Sequence[Path], *, name: str | None = None, limit: int | None = None) -> PromptSet:
    """Read the first `limit` prompts of `paths`; `name` is the JSON field that holds them, None: one of `FIELDS`.

    A line that holds no prompt is read as a `Prompt` with a `problem`. Raises `PromptError` for a file that can't be
    read, and where there is no prompt at all.
    """
    found = PromptSet()
    for path in paths:
        data = _read(path)
        before = len(found.prompts)
        for number, line in _lines(data):
            if limit is not None and len(found.prompts) >= limit:
                break
            found.prompts.append(_prompt(len(found.prompts), path, number, line, name))
        count = len(found.prompts) - before
        found.files.append(PromptFile(path.name, hashlib.sha256(data).hexdigest(), count))
    if not found.prompts:
        raise PromptError(f"{', '.join(map(str, paths))}: no prompt in it; wanted one a line")
    return found


def refuse_unusable(prompts: Iterable[Prompt]) -> None:
    """Raises `PromptError` for the first prompt that has a problem."""
    for prompt in prompts:
        if prompt.problem is not None:
            raise PromptError(f"{prompt.source}: {prompt.problem}; mend the line, or leave such lines out (--skip-bad)")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise PromptError(f"{path}: no such file; wanted JSON lines, or a {TEXT_SUFFIX} with a prompt a line") from None
    except IsADirectoryError:
        raise PromptError(f"{path}: is a directory; wanted a file of prompts") from None
    except OSError as error:
        raise PromptError(f"{path}: can't be read ({error.strerror})") from None


def _lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The lines that aren't blank, and their numbers from 1."""
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield number, line.removesuffix(b"\r")


def _prompt(index: int, path: Path, number: int, line: bytes, name: str | None) -> Prompt:
    source = f"{path}:{number}"
    try:
        text = line.decode()
        text = text if path.suffix.lower() == TEXT_SUFFIX else _field(text, name)
        text.encode()  # JSON can spell half a surrogate pair, which is no text
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        return Prompt(index, source, "", f"not UTF-8 text ({error.reason} at {error.start})")
    except _NoPromptError as error:
        return Prompt(index, source, "", str(error))
    return Prompt(index, source, text)


class _NoPromptError(Exception):
    """A JSON line without a prompt; says why."""


def _field(line: str, name: str | None) -> str:
    """What the JSON object `line` holds in the field `name`, or in the first of `FIELDS` that it has."""
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _NoPromptError(f"not JSON ({error}); plain prompts go into a {TEXT_SUFFIX} file") from None
    if not isinstance(row, dict):
        raise _NoPromptError(f"found {brief(row)}, wanted a JSON object")
    key = name or next((one for one in FIELDS if one in row), None)
    if key is None or key not in row:
        wanted = repr(name) if name else " or ".join(map(repr, FIELDS))
        raise _NoPromptError(f"no field {wanted} among {', '.join(map(brief, row)) or 'none'}; name it with --field")
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise _NoPromptError(f"field {key!r} is {brief(value)}, wanted text")
    return value
