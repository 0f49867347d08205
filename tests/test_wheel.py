"""A release: wheel and sdist are built, installed where there is no checkout, and used.

Installed means: in an environment of its own that holds the wheel and, of what this environment has, only what the
wheel says it depends on. Needs hatchling, which is fetched from the package index where it isn't installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import offload_engine

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
LEFT_OUT = (
    *(".git", ".venv", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", "__pycache__"),
    *("dist", "build", "runs", "checkpoints", "*.so", "*.egg-info"),
)
QUESTION = "Tom has 3 apples and buys 4 more. How many apples does Tom have?"

PROGRAM = """
from __future__ import annotations

from collections.abc import Callable, Sequence

from offload_engine import (
    AsyncEngine, Completion, Engine, EngineConfig, EngineStats, ExpertKey, ForwardInfo, MemoryPlan, Message,
    OffloadError, Outlook, SamplingParams, StepEvent,
)


class Oldest:
    name = "oldest"

    def begin(self, info: ForwardInfo) -> None: ...
    def on_route(self, layer: int, experts: Sequence[int], outlook: Outlook) -> None: ...
    def on_insert(self, key: ExpertKey) -> None: ...
    def on_use(self, key: ExpertKey, score: float) -> None: ...
    def on_remove(self, key: ExpertKey) -> None: ...
    def victim(self, evictable: Callable[[ExpertKey], bool]) -> ExpertKey | None: ...


def main() -> None:
    params = SamplingParams(max_new_tokens=8, stop=("x",))
    with Engine.from_pretrained("model", gpu_mem="8GB", eviction=Oldest, batch_size=2) as engine:
        one: Completion = engine.generate("How many?", params)
        several: list[Completion] = engine.generate(["How many?", "And now?"], params)
        turns = [Message(role="user", content="How many?")]
        event: StepEvent
        for event in engine.stream(turns, params, cancelled=lambda: False):
            print(event.text, event.accepted[0][2] + 0.5)
        plan: MemoryPlan = engine.resize(expert_mem="1GB")
        stats: EngineStats = one.stats
        rows: int = engine.logits([1, 2, 3]).shape[0] + engine.routing([1])[0].experts.shape[1]
        print(plan.slots + rows, stats.tokens_per_second, several[0].finish_reason == "eos")
    try:
        EngineConfig(gpu_mem=8)
    except OffloadError as error:
        print(error.exit_code + 1)


async def later() -> Completion:
    async with await AsyncEngine.from_pretrained(gpu_mem="8GB") as engine:
        async for event in engine.stream("How many?"):
            print(event.kind.upper())
        slots: int = (await engine.run(lambda held: held.plan)).slots
        print(slots)
        return await engine.generate("How many?")
"""

MISTAKES = {
    'Engine.from_pretrained(evictoin="lru")': "evictoin",
    "Engine.from_pretrained(gpu_mem=b'8GB')": "gpu_mem",
    "Engine.from_pretrained(eviction=dict)": "eviction",
    "Engine.from_pretrained().generate(3)": "generate",
    "Engine.from_pretrained().generate('a').txt": "txt",
    "Engine.from_pretrained().resize('1GB')": "resize",
}
"""Lines that a type checker must not let pass, and what it must name."""


def run(*command: object, where: Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """In a process that doesn't know of this checkout."""
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    return subprocess.run(
        [str(part) for part in command],
        cwd=where,
        env={**own, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which `python -m hatchling` works."""
    if importlib.util.find_spec("hatchling") is not None:
        return {}
    target = tmp_path_factory.mktemp("backend")
    done = run(sys.executable, "-m", "pip", "install", "-q", "--target", target, "hatchling>=1.25", where=target)
    if done.returncode:
        pytest.skip(f"hatchling (extra dev) is neither installed nor to be had: {done.stderr.strip().splitlines()[-1]}")
    return {"PYTHONPATH": str(target)}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout as a stranger gets it, nothing built."""
    copy = tmp_path_factory.mktemp("tree") / "checkout"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return copy


def build(tree: Path, out: Path, backend: dict[str, str], *kinds: str) -> list[Path]:
    targets = [word for kind in kinds for word in ("-t", kind)]
    succeeded(run(sys.executable, "-m", "hatchling", "build", "-d", out, *targets, where=tree, environment=backend))
    return sorted(out.iterdir())


@pytest.fixture(scope="module")
def wheel(tree: Path, backend: dict[str, str]) -> Path:
    (built,) = build(tree, tree / "dist-wheel", backend, "wheel")
    return built


@pytest.fixture(scope="module")
def sdist(tree: Path, backend: dict[str, str]) -> Path:
    (built,) = build(tree, tree / "dist-sdist", backend, "sdist")
    return built


def needed(wheel: Path) -> set[str]:
    """The wheel's dependencies and theirs, without extras."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    found: set[str] = set()
    waiting = re.findall(r"^Requires-Dist: (.*)$", text, re.MULTILINE)
    while waiting:
        wanted = Requirement(waiting.pop())
        if (wanted.marker is None or wanted.marker.evaluate({"extra": ""})) and wanted.name not in found:
            found.add(wanted.name)
            waiting += distribution(wanted.name).requires or []
    return found


def link(name: str, site: Path) -> None:
    """Make the installed distribution `name` one of `site` as well."""
    found = distribution(name)
    tops = {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}
    for top in tops:
        if not (site / top).exists():
            (site / top).symlink_to(str(found.locate_file(top)))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The programs' folder of an environment with the wheel in it."""
    home = tmp_path_factory.mktemp("home") / "venv"
    venv.create(home, symlinks=True)
    base = {"base": str(home), "platbase": str(home)}
    site, programs = (Path(sysconfig.get_path(name, "venv", base)) for name in ("purelib", "scripts"))
    for name in needed(wheel):
        link(name, site)
    pip = (sys.executable, "-m", "pip", "--python", programs / "python")
    succeeded(run(*pip, "install", "-q", "--no-deps", "--no-index", wheel, where=home))
    yield programs
    shutil.rmtree(home)


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path, tree: Path) -> None:
    package = {
        path.relative_to(tree).as_posix()
        for path in (tree / "offload_engine").rglob("*")
        if path.is_file() and path.suffix not in (".so", ".pyc")
    }
    presets = {f"offload_engine/configs/{path.name}" for path in (tree / "configs").iterdir()}
    found = {name for name in names(wheel) if ".dist-info/" not in name}
    assert {"offload_engine/py.typed", "offload_engine/assets/tiny/model.safetensors"} < package
    assert len(presets) == 8
    assert found - {"offload_engine/kernels/libexpert_ffn.so"} == package | presets
    information = f"offload_engine-{offload_engine.__version__}.dist-info"
    assert f"{information}/licenses/LICENSE" in names(wheel)
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"{information}/METADATA").decode()
    assert f"\nVersion: {offload_engine.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "\nRequires-Python: >=3.11\n" in metadata


@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler here")
def test_where_there_is_a_compiler_the_wheel_holds_the_kernels(wheel: Path, installed: Path, tmp_path: Path) -> None:
    assert "offload_engine/kernels/libexpert_ffn.so" in names(wheel)
    assert not wheel.name.endswith("-none-any.whl"), "it runs on this platform only"
    program = "from offload_engine import kernels; print(kernels.status().variant)"
    assert succeeded(run(installed / "python", "-c", program, where=tmp_path)).strip() != "None"


def test_the_sdist_holds_what_is_needed_to_test_and_build_the_same_wheel(
    sdist: Path, wheel: Path, backend: dict[str, str], tmp_path: Path
) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    for name in (
        "tests/test_wheel.py",
        "tools/train.py",
        "docs/command-line.md",
        "cuda/select.cu",
        "Makefile",
        "LICENSE",
    ):
        assert (unpacked / name).is_file(), name
    assert not list(unpacked.rglob("*.so"))
    (again,) = build(unpacked, tmp_path / "again", backend, "wheel")
    assert again.name == wheel.name
    with zipfile.ZipFile(again) as one, zipfile.ZipFile(wheel) as other:
        contents = [{file.filename: file.CRC for file in archive.infolist()} for archive in (one, other)]
    assert contents[0].keys() == contents[1].keys()
    differing = {name for name in contents[0] if contents[0][name] != contents[1][name]}
    assert all(name.endswith((".so", "/RECORD")) for name in differing), differing


def test_the_installed_program_answers_a_question(installed: Path, tmp_path: Path) -> None:
    answer = succeeded(run(installed / "dmoe-run", "--gpu-mem", "8GB", "-p", QUESTION, where=tmp_path))
    assert r"\boxed{7}" in answer
    (tmp_path / "prompt.txt").write_text(QUESTION, encoding="utf-8")
    told = succeeded(
        run(installed / "dmoe-run", "--config", "cpu-8gb", "--gpu-mem", "2GB", "--json", "prompt.txt", where=tmp_path)
    )
    assert json.loads(told)["plan"]["budget"] == 2 * 10**9


def test_the_installed_package_is_the_wheels_and_all_of_it_can_be_imported(installed: Path, tmp_path: Path) -> None:
    program = (
        "import offload_engine; print(offload_engine.__file__)\n"
        "for name in offload_engine.__all__: getattr(offload_engine, name)\n"
    )
    where = succeeded(run(installed / "python", "-c", program, where=tmp_path)).strip()
    assert Path(where).is_relative_to(installed.parent)
    version = succeeded(run(installed / "dmoe", "version", where=tmp_path))
    assert version == f"offload_engine {offload_engine.__version__}\n"
    listed = succeeded(run(installed / "dmoe", "--help", where=tmp_path))
    commands = re.findall(r"^  ([a-z]+)  ", listed, re.MULTILINE)
    assert {"run", "chat", "bench"} <= set(commands)
    for command in commands:
        succeeded(run(installed / "dmoe", command, "--help", where=tmp_path))


def test_what_needs_an_extra_says_which(installed: Path, tmp_path: Path) -> None:
    done = run(installed / "dmoe", "serve", "--gpu-mem", "8GB", where=tmp_path)
    assert done.returncode == 2
    assert "pip install 'offload-engine[serve]'" in done.stderr


def test_programs_of_users_are_type_checked_against_it(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    (tmp_path / "mistakes.py").write_text(
        "from offload_engine import Engine\n" + "".join(f"{line}\n" for line in MISTAKES), encoding="utf-8"
    )
    examples = sorted((ROOT / "examples").glob("*.py"))
    command = (sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--cache-dir", tmp_path / "cache")
    python = ("--python-executable", installed / "python")
    done = run(*command, *python, "program.py", "mistakes.py", *examples, where=tmp_path)
    lines = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert [line for line in lines if not line.startswith("mistakes.py:")] == [], done.stdout
    for number, (mistake, named) in enumerate(MISTAKES.items(), start=2):
        told = [line for line in lines if line.startswith(f"mistakes.py:{number}: ")]
        assert any(named in line for line in told), (mistake, told)
