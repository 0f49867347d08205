"""Files that are whole or not there."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a name beside `path` to write a file under; afterwards it is on the disk and takes `path`'s place.

    A reader finds the old file or the new one, whole. If the body raises, `path` is as it was. Lets `OSError` through.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        yield aside
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def write_aside(path: Path, content: bytes) -> None:
    """Put `content` at `path` as `replacing` does."""
    with replacing(path) as aside:
        aside.write_bytes(content)
