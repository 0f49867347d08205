"""Opens a library of kernels that one of the builds has left, if it is the one that belongs to these sources."""

from __future__ import annotations

import ctypes
from pathlib import Path


class UnavailableError(Exception):
    """The kernels can't be used; the message says why and what to do."""


def load(path: Path, told_by: str, fingerprint: str | None, rebuild: str) -> ctypes.CDLL:
    """The library at `path`, whose function `told_by` names the sources that it was built from: those with this
    `fingerprint`, unless it is None. Raises UnavailableError, which ends with how to `rebuild` it.
    """
    if not path.exists():
        raise UnavailableError(f"{path.name} is not built: {rebuild}")
    try:
        library = ctypes.CDLL(str(path))
        sources = getattr(library, told_by)
        sources.restype = ctypes.c_char_p
        built_from = sources().decode()
    except (OSError, AttributeError) as error:
        raise UnavailableError(f"{path.name} can't be loaded ({error}): {rebuild}") from error
    if fingerprint not in (None, built_from):
        raise UnavailableError(f"{path.name} was built from other sources ({built_from}, not {fingerprint}): {rebuild}")
    return library
