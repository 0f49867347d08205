"""What the documentation names is there: files, modules, and what they define."""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec

import pytest

from tests.docs.documents import DOCUMENTS, ROOT, quoted

BASES = [ROOT, ROOT / "offload_engine", ROOT / "tests"]
"""What paths are told from."""
FORMATS = {"offload_engine.routing_trace", "offload_engine.source"}
"""Names of formats and keys, which look like modules."""
CLICKS = {"No such option"}
"""Messages that click makes."""
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


def messages() -> set[str]:
    """Every string in the package's sources, with `…` for what is filled in."""
    found = set()
    for path in (ROOT / "offload_engine").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.add("".join(str(one.value) if isinstance(one, ast.Constant) else "…" for one in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def test_messages_that_are_explained_are_ours():
    """The headings of troubleshooting.md quote what the package may say, `…` standing for anything."""
    page, known = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), "\n".join(messages())
    explained = [text for line in re.findall(r"^### .*", page, re.MULTILINE) for text in re.findall('"([^"]+)"', line)]
    assert len(explained) > 20
    for text in set(explained) - CLICKS:
        pieces = [re.escape(piece.strip(" .;,")) for piece in text.split("…")]
        assert re.search(".*".join(filter(None, pieces)), known), f"nothing says {text!r}"
