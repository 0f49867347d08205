"""Lower rooms never import higher ones (DESIGN §2)."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "offload_engine"

FLOORS: list[tuple[str, ...]] = [
    ("errors", "core", "disk_file", "files", "pages"),
    ("config", "metrics", "trace", "text", "kernels"),
    ("routing",),
    ("model",),
    ("memory",),
    ("experts",),
    ("decode", "simulate"),
    ("engine",),
    ("server", "evaluate", "bench", "doctor", "tune"),
    ("cli",),
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
TORCH_FREE = ["core", "errors", "metrics", "trace", "config", "memory", "simulate", "experts.scheduling"]
TORCH_FREE += ["experts.hot_set", "decode.grouping", "decode.reuse", "decode.turns"]
SIMULATED = {"core", "metrics", "trace", "errors"}
SCHEDULING = "offload_engine.experts.scheduling"


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path, *, at_run_time: bool = False) -> set[str]:
    """Absolute names of the modules that `path` imports; type-checking imports left out if `at_run_time`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if at_run_time and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms_of(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("offload_engine.")}


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_no_module_imports_a_higher_room(path: Path) -> None:
    name = dotted(path)
    if not name:  # the package itself re-exports the public names
        return
    here = name.split(".")[0]
    assert here in FLOOR, f"{name}: room {here!r} has no floor"
    for room in rooms_of(imports(path, at_run_time=True)) - {here}:
        assert FLOOR[room] <= FLOOR[here], f"{name} imports {room}, which is above it"


@pytest.mark.parametrize("name", TORCH_FREE)
def test_the_pure_half_needs_no_torch(name: str) -> None:
    path = PACKAGE / name.replace(".", "/")
    for file in path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
        assert not {found for found in imports(file, at_run_time=True) if found.split(".")[0] == "torch"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "experts/scheduling").glob("*.py")), ids=dotted)
def test_scheduling_sees_only_the_ground_floor(path: Path) -> None:
    found = imports(path, at_run_time=True)
    assert rooms_of({name for name in found if not name.startswith(SCHEDULING)}) <= SIMULATED


@pytest.mark.parametrize("path", sorted((PACKAGE / "simulate").glob("*.py")), ids=dotted)
def test_the_simulator_sees_of_the_experts_their_scheduling_alone(path: Path) -> None:
    found = imports(path)
    assert rooms_of({name for name in found if not name.startswith(SCHEDULING)}) <= SIMULATED | {"simulate"}
    assert not {item for item in found if item.split(".")[0] == "torch"}


def test_kernels_see_only_errors_and_torch() -> None:
    for path in (PACKAGE / "kernels").glob("*.py"):
        found = imports(path)
        assert rooms_of(found) <= {"errors", "kernels"}, path
        others = {name.split(".")[0] for name in found} - set(sys.stdlib_module_names)
        assert others <= {"torch", "offload_engine"} | ({"triton"} if path.name == "triton_experts.py" else set()), path


def test_nothing_in_the_package_imports_tools_or_transformers() -> None:
    for path in modules():
        tops = {name.split(".")[0] for name in imports(path)}
        assert not tops & {"tools", "tests", "transformers"}, dotted(path)
