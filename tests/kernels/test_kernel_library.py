"""Building, finding and choosing the kernels, and doing without."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import random_expert, random_hidden, relative_error

from offload_engine import kernels
from offload_engine.errors import UsageError
from offload_engine.kernels import build, ffn
from offload_engine.kernels.library import KernelStatus, Library, choose
from offload_engine.kernels.loading import UnavailableError
from offload_engine.model.moe import ExpertWeights, expert_ffn

OFF = KernelStatus(None, "off for this test")


def use(monkeypatch: pytest.MonkeyPatch, status: KernelStatus) -> None:
    monkeypatch.setattr(ffn, "status", lambda: status)


def test_auto_takes_the_first_that_the_cpu_can_run(library: Library) -> None:
    assert list(library.variants)[-1] == "generic"
    status = choose(library, "auto")
    assert status.variant == next(iter(library.variants))
    assert status.usable == tuple(library.variants)
    assert "fastest" in status.reason
    assert choose(library, "generic").variant == "generic"


def test_off_and_unknown_names(library: Library) -> None:
    status = choose(library, "off")
    assert status.variant is None
    assert "off" in status.reason
    with pytest.raises(ValueError, match="no kernel is in use"):
        _ = status.number
    with pytest.raises(UsageError, match=r"'mmx' is none of auto, off, .*generic"):
        choose(library, "mmx")
    with pytest.raises(UsageError, match="'generic': gone"):
        choose("gone", "generic")
    assert choose("gone", "auto").reason == "gone"


def test_an_absent_damaged_or_stale_library_says_how_to_build_it(
    tmp_path: Path, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnavailableError, match="not built: run `python -m"):
        Library(tmp_path / "absent.so")
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(b"\x7fELF nonsense")
    with pytest.raises(UnavailableError, match=r"can't be loaded .* run `python -m"):
        Library(damaged)
    monkeypatch.setattr(build, "fingerprint", lambda: "0123456789abcdef")
    with pytest.raises(UnavailableError, match=r"other sources .*, not 0123456789abcdef"):
        Library(library.path)


@pytest.mark.parametrize(("compiler", "told"), [("no-such-compiler -x", "no-such-compiler"), ("false", "exit code 1")])
def test_a_build_that_fails_says_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, told: str
) -> None:
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(build.BuildError, match=told):
        build.build(tmp_path / "library.so")
    assert list(tmp_path.iterdir()) == []


def test_no_compiler_at_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    assert build.main() == 1
    assert "no C compiler found" in capsys.readouterr().err


def test_the_build_needs_neither_torch_nor_the_package() -> None:
    code = f"import runpy, sys; runpy.run_path({str(build.HERE / 'build.py')!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "False"


def test_the_model_computes_bf16_experts_by_the_kernel_and_float32_by_torch(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, choose(library, "auto"))
    gate, up, down = random_expert("bf16", 160, 48)
    weights = ExpertWeights(gate.values, up.values, down.values)
    hidden = random_hidden(5, 160, torch.bfloat16)
    assert torch.equal(expert_ffn(hidden, weights), kernels.expert_ffn(hidden, gate, up, down))
    full = ExpertWeights(*(matrix.float() for matrix in weights))
    wanted = F.linear(F.silu(F.linear(hidden.float(), full.gate)) * F.linear(hidden.float(), full.up), full.down)
    assert torch.equal(expert_ffn(hidden.float(), weights), wanted)


def test_without_kernels_torch_computes_the_same_to_bf16(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = ExpertWeights(*(matrix.values for matrix in random_expert("bf16", 160, 48)))
    hidden = random_hidden(5, 160, torch.bfloat16)
    use(monkeypatch, choose(library, "auto"))
    ours = expert_ffn(hidden, weights)
    use(monkeypatch, OFF)
    assert relative_error(ours, expert_ffn(hidden, weights).double()) < 0.02


def test_what_the_kernels_leave_to_torch(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, choose(library, "auto"))
    gate, up, down = random_expert("bf16", 64, 32)
    assert kernels.fits(gate, up, down)
    assert not kernels.fits(gate, kernels.Matrix(up.values.float()), down)
    assert not kernels.fits(gate, kernels.Matrix(up.values.T), down)
    assert not kernels.fits(kernels.Matrix(gate.values.to("meta")), up, down)
    expert = kernels.Expert.of(gate, up, down)
    hidden = random_hidden(5, 64, torch.bfloat16)
    assert kernels.serves(hidden, expert)
    assert not kernels.serves(hidden.half(), expert)
    assert not kernels.serves(hidden.to("meta"), expert)
    learning = hidden.clone().requires_grad_()
    taught = kernels.Expert.of(gate, kernels.Matrix(up.values.clone().requires_grad_()), down)
    assert not kernels.serves(learning, expert)
    assert not kernels.serves(hidden, taught)
    with torch.no_grad():
        assert kernels.serves(learning, expert)
        assert kernels.serves(hidden, taught)
    use(monkeypatch, OFF)
    assert not kernels.serves(hidden, expert)
