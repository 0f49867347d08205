"""RoutingTrace: which experts every forward wanted, layer by layer; what simulations and analyses run on.

The format, version 2, is JSON Lines in UTF-8. Line 1 is a `TraceHeader`, each line after it one `TraceRecord`, in the
order in which the layers ran. A line counts only with its newline: what follows the last newline is the rest of a
write that was cut off, which readers ignore and `TraceWriter` removes before it appends. Keys a reader doesn't know
are refused, so every change of the format is a new version; version 1, still read, has no `runners_up`. A trace may be
kept gzipped, under a name ending in .gz.
"""

from __future__ import annotations

import gzip
import json
import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Annotated, Final, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from offload_engine.core import ForwardInfo, Phase
from offload_engine.errors import TraceError, TraceWriteError

FORMAT: Final = "offload_engine.routing_trace"
VERSION: Final = 2

_MAX_LINE = 16 << 20
"""No line of a trace comes near this many bytes; a longer one is some other file."""

Index = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class TraceHeader(BaseModel):
    """What a trace was recorded from: enough to replay it without the model."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal["offload_engine.routing_trace"] = FORMAT
    version: Literal[1, 2] = VERSION
    layers: Annotated[tuple[Index, ...], Field(min_length=1)]
    """Indices of the MoE layers, in the order they run."""
    num_experts: Count
    """Experts per MoE layer."""
    top_k: Count
    """Experts per token."""
    expert_bytes: Count
    """Bytes of one expert as it is moved."""
    routing: str
    """The policy with its parameters, in words."""
    block_length: Count
    model: str = ""
    """Name of the checkpoint."""

    def line(self) -> bytes:
        """The header as it stands in the file."""
        return self.model_dump_json().encode() + b"\n"


class TraceRecord(BaseModel):
    """What one MoE layer wanted in one forward."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    phase: Phase
    sequence: Index
    """Counts the prompts of the trace."""
    block: Index
    step: Index
    layer: Index
    experts: tuple[Index, ...]
    """By falling score; ties by rising index."""
    scores: tuple[Annotated[float, Field(allow_inf_nan=False)], ...]
    """The block score of each expert, to six significant digits."""
    runners_up: tuple[Index, ...] = ()
    """Experts that some token voted for but none chose, by falling score (`experts.scheduling.outlook`)."""


class TraceWriter:
    """Appends records to a trace, whole lines only, from one thread.

    A new path, or an empty file, gets the header; an existing trace is continued if its header is the same.
    Records are buffered and written at the end of each forward. When the system refuses a write (disk full), that
    write raises `TraceWriteError` and the trace ends with its last whole line; from then on the writer drops what it is
    given, so that a run can go on without its trace.
    """

    def __init__(self, path: Path, header: TraceHeader) -> None:
        """Open `path` for appending; raises `TraceError` if it holds anything but a trace with this header."""
        if path.name.endswith(".gz"):
            raise TraceError(f"{path}: a trace is recorded uncompressed; drop the .gz here and gzip it afterwards")
        self.path = path
        self.header = header
        self.sequence = 0
        """The prompt that records belong to; the caller counts it up. A continued trace starts with the next one."""
        self.records_written = 0
        """Records of this writer that are in the file."""
        self._pending: list[bytes] = []
        self._last: tuple[ForwardInfo, int] | None = None
        try:
            self._file: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise TraceError(f"{path}: can't be opened for a trace ({error.strerror}); name another file") from None
        try:
            self._continue_or_begin()
        except BaseException:
            self._drop_file()
            raise

    def record(
        self,
        info: ForwardInfo,
        layer: int,
        experts: Sequence[int],
        scores: Sequence[float],
        runners_up: Sequence[int] = (),
    ) -> None:
        """Note what `layer` wanted in the forward `info`: `experts` by falling score, and the `scores` beside them, and
        who was close to being wanted.

        Raises `TraceError` once, when the file can't be written; `ValueError` when the two differ in length.
        """
        if len(experts) != len(scores):
            raise ValueError(f"{len(experts)} experts with {len(scores)} scores")
        if self._file is None:
            return
        if self._last is not None and (info != self._last[0] or layer <= self._last[1]):
            self.flush()
        self._last = (info, layer)
        line = {
            "phase": str(info.phase),
            "sequence": self.sequence,
            "block": info.block,
            "step": info.step,
            "layer": layer,
            "experts": [int(expert) for expert in experts],
            "scores": [float(f"{score:.6g}") for score in scores],
            "runners_up": [int(expert) for expert in runners_up],
        }
        self._pending.append(json.dumps(line, separators=(",", ":"), allow_nan=False).encode() + b"\n")
        if layer == self.header.layers[-1]:
            self.flush()

    def flush(self) -> None:
        """Hand all records so far to the system; raises `TraceError` once, when it doesn't take them."""
        pending, self._pending = self._pending, []
        if pending and self._file is not None:
            self._write(pending)

    def close(self) -> None:
        """Flush and close; harmless when closed already."""
        try:
            self.flush()
        finally:
            self._drop_file()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _drop_file(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _continue_or_begin(self) -> None:
        assert self._file is not None
        end = os.fstat(self._file).st_size
        if end == 0:
            self._write([self.header.line()], records=False)
            return
        first = os.pread(self._file, min(end, _MAX_LINE), 0)
        if b"\n" not in first and self.header.line().startswith(first):
            os.ftruncate(self._file, 0)  # its writer died over the header
            self._write([self.header.line()], records=False)
            return
        _require_same(self.path, _parse_header(self.path, _first_line(self.path, first)), self.header)
        end = _after_newline(self._file, end)
        os.ftruncate(self._file, end)
        start = _after_newline(self._file, end - 1)
        if start:  # 0 is the header
            last = _parse_record(self.path, None, os.pread(self._file, end - start, start), self.header)
            self.sequence = last.sequence + 1

    def _write(self, lines: list[bytes], *, records: bool = True) -> None:
        assert self._file is not None
        data = b"".join(lines)
        done = 0
        try:
            while done < len(data):
                done += os.write(self._file, memoryview(data)[done:])
        except OSError as error:
            whole = data.rfind(b"\n", 0, done) + 1
            self.records_written += data.count(b"\n", 0, whole) if records else 0
            self._cut(done - whole)
            self._drop_file()
            raise TraceWriteError(
                f"{self.path}: the trace can't be written ({error.strerror}); {self.records_written} records of this "
                "run are in it; free some space, record to another file, or run without a trace"
            ) from None
        self.records_written += len(lines) if records else 0

    def _cut(self, count: int) -> None:
        """Remove the last `count` bytes; where that fails too, readers ignore them."""
        assert self._file is not None
        status = os.fstat(self._file)
        if count and stat.S_ISREG(status.st_mode):
            try:
                os.ftruncate(self._file, status.st_size - count)
            except OSError:
                return


def read_trace(path: Path) -> tuple[TraceHeader, Iterator[TraceRecord]]:
    """The header of the trace at `path`, and its records, read as they are asked for.

    Raises `TraceError`, at once for what is no trace or a newer one, and while reading for a line that makes no sense.
    """
    try:
        with _open(path) as file:
            first = file.readline(_MAX_LINE)
    except (OSError, EOFError, zlib.error) as error:
        raise TraceError(f"{path}: can't be read as a routing trace ({error})") from None
    header = _parse_header(path, _first_line(path, first))
    return header, _records(path, header)


def _records(path: Path, header: TraceHeader) -> Iterator[TraceRecord]:
    try:
        with _open(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE), b""), start=1):
                if not line.endswith(b"\n"):
                    if len(line) == _MAX_LINE:
                        raise TraceError(f"{path}, line {number}: longer than {_MAX_LINE} bytes, which no record is")
                    return
                if number > 1:
                    yield _parse_record(path, number, line, header)
    except EOFError:
        return  # a gzip stream that was cut off
    except (OSError, zlib.error) as error:
        raise TraceError(f"{path}: can't be read further ({error})") from None


def _parse_record(path: Path, number: int | None, line: bytes, header: TraceHeader) -> TraceRecord:
    """The record in line `number` (None: the last one)."""
    where = f"{path}, last line" if number is None else f"{path}, line {number}"
    try:
        record = TraceRecord.model_validate_json(line)
    except ValidationError as error:
        raise TraceError(f"{where}: no trace record ({_complaint(error)})") from None
    wrong = ""
    if record.layer not in header.layers:
        wrong = f"layer {record.layer} is none of the header's MoE layers"
    elif len(record.experts) != len(record.scores):
        wrong = f"{len(record.experts)} experts with {len(record.scores)} scores"
    named = record.experts + record.runners_up
    if not wrong and named and max(named) >= header.num_experts:
        wrong = f"expert {max(named)}, but the header says {header.num_experts} experts"
    elif not wrong and len(set(named)) != len(named):
        wrong = "an expert appears twice"
    if wrong:
        raise TraceError(f"{where}: no trace record ({wrong})")
    return record


def _first_line(path: Path, start: bytes) -> bytes:
    line, newline, _ = start.partition(b"\n")
    if not newline:
        raise TraceError(f"{path}: no routing trace (its first line, the header, is missing or cut off)")
    return line


def _parse_header(path: Path, line: bytes) -> TraceHeader:
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError):
        raw = None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise TraceError(f"{path}: no routing trace (its first line should hold a JSON object with format {FORMAT!r})")
    if raw.get("version") not in range(1, VERSION + 1):
        raise TraceError(
            f"{path}: routing trace of version {raw.get('version')!r}, but this engine reads versions 1 to {VERSION}; "
            "use the engine that wrote it, or record it anew"
        )
    try:
        return TraceHeader.model_validate_json(line)
    except ValidationError as error:
        raise TraceError(f"{path}, line 1: damaged header ({_complaint(error)})") from None


def _require_same(path: Path, found: TraceHeader, wanted: TraceHeader) -> None:
    for name in TraceHeader.model_fields:
        there, here = getattr(found, name), getattr(wanted, name)
        if there != here:
            raise TraceError(
                f"{path}: holds a trace recorded with {name} {there!r}, but this run has {here!r}; "
                "record to another file, or remove this one"
            )


def _after_newline(file: int, end: int) -> int:
    """Offset behind the last newline in the first `end` bytes; 0 if there is none."""
    size = 1 << 16
    while end > 0:
        start = max(0, end - size)
        at = os.pread(file, end - start, start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.name.endswith(".gz") else path.open("rb")


def _complaint(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    reason = first["msg"][0].lower() + first["msg"][1:]
    return f"{where}: {reason}" if where else reason
