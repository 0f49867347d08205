"""The cases catch bugs: each one planted in the CUDA kernels is shown by the case that is there for it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cuda_cases import Case, adversarial, disagreement
from cuda_emulation import emulate
from cuda_mutations import MUTATIONS, Mutation

from offload_engine.errors import DeviceError
from offload_engine.kernels.cuda_build import SOURCES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {case.name: case for case in adversarial()}


def planted(mutation: Mutation, folder: Path) -> Path:
    """`folder`, with the sources and the bug in the one that has its place."""
    shutil.copytree(SOURCES, folder, ignore=shutil.ignore_patterns("emulation"))
    text = (folder / "select.cu").read_text(encoding="utf-8")
    # One text, so that an edit needn't say in which file.
    text = text.replace('#include "ranking.cuh"\n', (folder / "ranking.cuh").read_text(encoding="utf-8"))
    for edit in mutation.edits:
        text = edit(text)
    (folder / "select.cu").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.bug)
@pytest.mark.usefixtures("emulated")  # skips where nothing can be compiled
def test_a_planted_bug_shows(mutation: Mutation, cases: dict[str, Case], tmp_path: Path) -> None:
    broken = emulate(tmp_path / "broken.so", planted(mutation, tmp_path / "cuda"))
    try:
        shown = disagreement(broken, cases[mutation.shown_by])
    except DeviceError as error:
        shown = str(error)
    assert shown
