"""A run's folder, which survives being killed at any moment.

`run.json` holds the settings, `records.jsonl` one line per answered sample in the order of answering, `summary.json`
what they come to. A record is written before the next sample is asked; a last line that was cut off is removed when
the run is taken up again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self

from offload_engine.config import brief
from offload_engine.errors import OffloadError, UsageError
from offload_engine.evaluate.rows import Row, json_rows
from offload_engine.files import write_aside

RUN, RECORDS, SUMMARY = "run.json", "records.jsonl", "summary.json"
FORMAT: Final = 1
REQUIRED = ("id", "gold", "generation", "strict", "soft")
"""Fields without which a line is no record."""
_NUMBER: Final = (int, float)
_TYPES: Final[dict[str, tuple[tuple[type, ...], str]]] = {
    **dict.fromkeys(("id", "gold", "generation", "prompt", "finish_reason"), ((str,), "a text")),
    **dict.fromkeys(("strict", "soft"), ((bool,), "true or false")),
    "unique_experts": ((*_NUMBER, type(None)), "a number or null"),
    **dict.fromkeys(("tokens", "steps", "seconds", "bytes_moved", "stall_seconds", "blocks"), (_NUMBER, "a number")),
    **dict.fromkeys(("hits", "late", "misses", "peak_bytes"), (_NUMBER, "a number")),
    **dict.fromkeys(("forwards", "unique_by_layer"), ((dict,), "an object of numbers")),
    **dict.fromkeys(("unique_by_forward", "unique_mid_by_forward"), ((list,), "a list of numbers")),
}
"""What is computed with, as Python reads it, and as a person would say it."""

Record = dict[str, Any]


class Recorder(Protocol):
    """Where records go: a `RunFolder`, or `Memory`."""

    done: dict[str, bool]
    """The samples answered, by id, and whether strictly right."""

    def append(self, record: Record) -> None:
        """Keep one more."""

    def records(self) -> list[Record]:
        """All that were kept, in the order of answering."""


class Memory:
    """Records that nobody wants to keep."""

    def __init__(self) -> None:
        self.done: dict[str, bool] = {}
        self._records: list[Record] = []

    def append(self, record: Record) -> None:
        """See `Recorder`."""
        self._records.append(record)
        self.done[record["id"]] = bool(record["strict"])

    def records(self) -> list[Record]:
        """See `Recorder`."""
        return self._records


@dataclass(frozen=True, slots=True)
class SavedRun:
    """What a folder holds."""

    directory: Path
    settings: dict[str, Any]
    about: dict[str, Any]
    """Facts of the run that decide nothing: the plan, versions."""
    records: list[Record]


class RunFolder:
    """The folder of one run, open for appending. Close it, or use it as a context manager."""

    def __init__(self, directory: Path, settings: dict[str, Any], about: dict[str, Any] | None = None) -> None:
        """Begin a run in `directory`, or take it up again where it holds one with the same `settings`.

        Raises `UsageError` where it holds a run with other settings, naming the first that differs, or a damaged one;
        `OffloadError` where it can't be written.
        """
        self.directory = directory
        settings = json.loads(json.dumps(settings))  # as they will be read back: tuples are lists
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if (directory / RUN).exists():
                _require_same(directory, _read_settings(directory)["settings"], settings)
            elif (directory / RECORDS).exists():
                raise UsageError(f"{directory}: holds {RECORDS} but no {RUN}, so it is no run; choose another folder")
            else:
                write_json(directory / RUN, {"format": FORMAT, "settings": settings, "about": about or {}})
            self._file = (directory / RECORDS).open("ab+", buffering=0)
        except OSError as error:
            raise OffloadError(f"{directory}: can't be used as a run's folder ({error.strerror or error})") from None
        try:
            self._lock()
            self._file.truncate(sum(map(len, _whole_lines(directory / RECORDS))))
            # Not the records themselves: thousands of them would count against the engine's memory budget.
            self.done = {record["id"]: bool(record["strict"]) for record in _records(directory / RECORDS)}
        except BaseException:
            self._file.close()
            raise

    def append(self, record: Record) -> None:
        """Add a record. Raises `OffloadError` when it can't be written; what was there before stays whole."""
        line, done = json.dumps(record).encode() + b"\n", 0
        end = os.fstat(self._file.fileno()).st_size
        try:
            while done < len(line):
                done += self._file.write(line[done:])
        except OSError as error:
            with suppress(OSError):  # where this fails too, the next run cuts the torn line off
                self._file.truncate(end)
            raise OffloadError(
                f"{self.directory / RECORDS}: can't be written ({error.strerror}); {len(self.done)} answers are in "
                "it; free some space and run the same command again to go on"
            ) from None
        self.done[record["id"]] = bool(record["strict"])

    def records(self) -> list[Record]:
        """See `Recorder`. Raises `UsageError` that names the line of a record that can't be summed up."""
        return list(_records(self.directory / RECORDS, tuple(_TYPES)))

    def summarise(self, summary: dict[str, Any]) -> None:
        """Write `summary.json`, and make sure that all records are on the disk."""
        try:
            os.fsync(self._file.fileno())
            write_json(self.directory / SUMMARY, summary)
        except OSError as error:
            raise OffloadError(f"{self.directory / SUMMARY}: can't be written ({error.strerror})") from None

    def close(self) -> None:
        """Idempotent."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _lock(self) -> None:
        """Keep other processes from appending to the same run."""
        try:
            import fcntl
        except ImportError:  # Windows opens without sharing the danger of a shell's second command
            return
        try:
            fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{self.directory}: another process is at work on this run; wait for it") from None
        except OSError:
            return  # a file system without locks


def read_run(directory: Path) -> SavedRun:
    """The run in `directory`, finished or not; raises `UsageError` where there is none or it is damaged."""
    if not (directory / RUN).is_file():
        raise UsageError(f"{directory}: holds no {RUN}, so it is no evaluation's folder")
    saved = _read_settings(directory)
    path = directory / RECORDS
    records = list(_records(path)) if path.exists() else []
    return SavedRun(directory, saved["settings"], saved.get("about", {}), records)


def write_json(path: Path, value: Any) -> None:
    """Write `value` beside `path` and put it in its place whole."""
    write_aside(path, f"{json.dumps(value, indent=2)}\n".encode())


def _read_settings(directory: Path) -> dict[str, Any]:
    path = directory / RUN
    try:
        saved = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: can't be read ({' '.join(str(error).split())}); choose another folder") from None
    if not isinstance(saved, dict) or not isinstance(saved.get("settings"), dict):
        raise UsageError(f"{path}: holds no settings of a run; choose another folder")
    if saved.get("format") != FORMAT:
        raise UsageError(f"{path}: a run of format {brief(saved.get('format'))}, but this version reads {FORMAT}")
    return saved


def _records(path: Path, required: Sequence[str] = REQUIRED) -> Iterator[Record]:
    """Whole lines; a last one that its writer didn't finish is left out."""
    seen: set[str] = set()
    try:
        for row in json_rows(path, _whole_lines(path)):
            for field in required:
                if field not in row.values:
                    row.value(field)
            _check_types(row)
            if row.values["id"] in seen:
                raise row.error(f"sample {row.values['id']!r} was answered before")
            seen.add(row.values["id"])
            yield row.values
    except UsageError as error:
        raise UsageError(f"{error}; the file is damaged: remove that line, and the same run asks again") from None


def _check_types(row: Row) -> None:
    for field, (kinds, wanted) in _TYPES.items():
        if field not in row.values:
            continue
        value = row.values[field]
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if not _is_of(value, kinds) or not all(_is_of(one, _NUMBER) for one in inner):
            raise row.error(f"field {field!r} is {brief(value)}; wanted {wanted}")


def _is_of(value: object, kinds: tuple[type, ...]) -> bool:
    """As JSON has it: true is no number."""
    return isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)


def _whole_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from (line for line in file if line.endswith(b"\n"))


def _require_same(directory: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    before, now = flatten(there), flatten(here)
    for name in (*now, *(name for name in before if name not in now)):
        if before.get(name) != now.get(name):
            raise UsageError(
                f"{directory}: holds a run with {name} {brief(before.get(name))}, but now {name} is "
                f"{brief(now.get(name))}; choose another folder, or the same settings to go on with it"
            )


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return flat
