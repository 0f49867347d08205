"""What the documentation names is there: files, modules, and what they define."""

from __future__ import annotations

import re
from importlib.util import find_spec

import pytest

from tests.docs.documents import DOCUMENTS, ROOT, quoted

BASES = [ROOT, ROOT / "offload_engine", ROOT / "tests"]
"""What paths are told from."""
FORMATS = {"offload_engine.routing_trace", "offload_engine.source"}
"""Names of formats and keys, which look like modules."""
EXPLAINED = [*DOCUMENTS, ROOT / "ARCHITECTURE.md", ROOT / "SECURITY.md"]


def is_there(path: str) -> bool:
    """Whether a source file is where it is said to be; its name alone will do within the context of a page."""
    if "/" not in path:
        return any(next(base.rglob(path), None) for base in BASES[1:]) or (ROOT / "tools" / path).exists()
    return any(next(base.glob(path), None) for base in BASES)


@pytest.mark.parametrize("path", EXPLAINED, ids=lambda path: path.name)
def test_source_files_are_where_they_are_said_to_be(path):
    named = [text for text in quoted(path) if re.fullmatch(r"[\w./-]+\.(py|c|cu|sh)", text)]
    assert [text for text in named if not is_there(text)] == []


@pytest.mark.parametrize("path", EXPLAINED, ids=lambda path: path.name)
def test_modules_are_there(path):
    named = {text for text in quoted(path) if re.fullmatch(r"(offload_engine|tools|tests)(\.\w+)+", text)} - FORMATS
    assert [name for name in named if find_spec(name) is None] == []


def test_what_is_not_there_is_noticed():
    assert is_there("engine/engine.py")
    assert is_there("engine.py")
    assert not is_there("engine/motor.py")
    assert not is_there("motor.py")
