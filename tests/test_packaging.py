"""What the project says of itself agrees with what it is."""

from __future__ import annotations

import ast
import importlib
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import offload_engine

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "offload_engine"
PEERS = {"mlx", "mlx_vlm"}
"""Measured against by `dmoe bench` where somebody has installed them; no part of this project needs them."""
BROUGHT_BY = {"pydantic_core": "pydantic", "starlette": "fastapi", "h11": "uvicorn", "tqdm": "lm-eval"}
"""Halves of a declared package, in versions that go with it."""


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> set[str]:
    """Every distribution that is named as a dependency, of the package or of an extra."""
    table = project()["project"]
    wanted = [*table["dependencies"], *(one for extra in table["optional-dependencies"].values() for one in extra)]
    return {normal(re.split(r"[^\w.-]", one)[0]) for one in wanted}


def imported() -> set[str]:
    """Top-level names of every import of the package that is neither its own nor the standard library's."""
    names = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"offload_engine"}


def test_every_package_that_is_imported_is_declared() -> None:
    homes = packages_distributions()
    found = {BROUGHT_BY.get(name, name) for name in imported() - PEERS}
    undeclared = {name for name in found if not {normal(home) for home in homes.get(name, [name])} & declared()}
    assert not undeclared


def test_the_version_stands_once_and_the_changelog_begins_with_it() -> None:
    assert project()["project"]["dynamic"] == ["version"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == offload_engine.__version__


def test_every_public_name_can_be_had_and_is_known_to_type_checkers() -> None:
    for name in offload_engine.__all__:
        assert getattr(offload_engine, name) is not None
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == set(offload_engine.__all__) - {"__version__"}


def test_every_error_is_public() -> None:
    errors = importlib.import_module("offload_engine.errors")
    found = {name for name, one in vars(errors).items() if isinstance(one, type) and issubclass(one, Exception)}
    assert found <= set(offload_engine.__all__)


def test_programs_and_files_that_are_named_exist() -> None:
    table = project()
    for program in table["project"]["scripts"].values():
        module, _, function = program.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
    for name in table["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]:
        assert (ROOT / name.removeprefix("/")).exists(), name
    for name in (table["project"]["readme"], *table["project"]["license-files"]):
        assert (ROOT / name).is_file()
