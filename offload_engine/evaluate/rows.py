"""Rows of a dataset file, JSON lines or parquet, each of which knows where it stands."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload_engine.config import brief
from offload_engine.errors import UsageError

_MAGIC = b"PAR1"
"""What every parquet file begins with."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row and its place, counted from 1: ``FILE:LINE``, or ``FILE, row N`` of a parquet file."""

    where: str
    number: int
    values: dict[str, Any]

    def error(self, complaint: str) -> UsageError:
        """A complaint about this row."""
        return UsageError(f"{self.where}: {complaint}")

    def value(self, field: str, wanted: str = "a value") -> Any:
        """The field's value; raises `UsageError` where it is absent or null."""
        if field in self.values and self.values[field] is None:
            raise self.error(f"field {field!r} is null; wanted {wanted}")
        if field not in self.values:
            raise self.error(f"no field {field!r}; found {', '.join(map(repr, self.values)) or 'none'}")
        return self.values[field]

    def text(self, field: str) -> str:
        """The field's text; raises `UsageError` for anything else, and for none."""
        value = self.value(field, "a text")
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"field {field!r} is {brief(value)}; wanted a text")
        return value

    def id(self, field: str | None = None) -> str:
        """The field's value as an id, or, without one, the row's number from 0."""
        value = None if field is None else self.values.get(field)
        return str(self.number - 1) if value is None else str(value)


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of `path`, read as they are asked for; empty lines are skipped.

    Raises `UsageError` that names the file, and the line, for what can't be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(_MAGIC))
    except OSError as error:
        raise UsageError(f"{path}: can't be read ({error.strerror or error}); wanted JSON lines or parquet") from None
    return _parquet_rows(path) if start == _MAGIC else _lines_of(path)


def json_rows(path: Path, lines: Iterable[bytes]) -> Iterator[Row]:
    """The rows of the `lines` of the file at `path`; raises `UsageError` for one that is no JSON object."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"{where}: not JSON ({reason}); wanted one JSON object per line") from None
        if not isinstance(values, dict):
            raise UsageError(f"{where}: found {brief(values)}; wanted a JSON object")
        yield Row(where, number, values)


def _lines_of(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        yield from json_rows(path, file)


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UsageError(
            f"{path}: reading parquet needs pyarrow, which isn't installed; pip install 'offload-engine[eval]', or "
            "give the data as JSON lines"
        ) from None
    try:
        with parquet.ParquetFile(path) as table:
            number = 0
            for batch in table.iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}, row {number}", number, values)
    except (ArrowException, OSError) as error:
        raise UsageError(f"{path}: can't be read as parquet ({' '.join(str(error).split())})") from None


def download(repository: str, file: str) -> Path:
    """A file of a dataset on the hub, in the hub's usual cache; raises `UsageError` when it can't be had."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise UsageError(
            f"fetching {repository} from the hub needs huggingface_hub; pip install 'offload-engine[hub]', or give a "
            "file with --data"
        ) from None
    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{repository}: {file} can't be had from the hub ({reason}); give a file with --data"
        ) from None
