"""A new directory of a model, written under another name until all of it is on the disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from offload_engine.errors import OffloadError, UsageError
from offload_engine.model.resident_files import settle

MARKER = ".offload_engine.partial"
"""Empty file in a directory that is not finished: what a killed run left, which the next one may remove."""


@contextmanager
def partial_directory(out: Path, source: Path | None = None) -> Iterator[Path]:
    """Yields the new directory `OUT.partial` to write to, which becomes `out` at the end, or is gone if that fails.

    An `OUT.partial` that a killed run left is removed first. Raises `UsageError` when there is one of anybody
    else's, or `source`, which is read meanwhile, lies in it; `OffloadError` for any `OSError`, of the caller's too.
    """
    partial = out.with_name(out.name + ".partial")
    try:
        _make_way(partial, out, source)
        partial.mkdir(parents=True)
        try:
            (partial / MARKER).touch()
            yield partial
            (partial / MARKER).unlink()
            partial.rename(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        settle(out.parent)
    except OSError as error:
        raise OffloadError(f"--out {out}: can't be written ({error.strerror or error})") from None


def _make_way(partial: Path, out: Path, source: Path | None) -> None:
    if source is not None and source.resolve().is_relative_to(partial.resolve()):
        raise UsageError(f"--out {out}: is written as {partial} first, but {source} is read; choose another --out")
    if not partial.exists() and not partial.is_symlink():
        return
    ours = partial.is_dir() and not partial.is_symlink()
    if not ours or not ((partial / MARKER).is_file() or not any(partial.iterdir())):
        raise UsageError(
            f"--out {out}: is written as {partial} first, which is there already and not left by a run like this one; "
            "rename or remove it, or choose another --out"
        )
    shutil.rmtree(partial)
