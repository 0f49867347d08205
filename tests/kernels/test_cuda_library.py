"""Building, finding and choosing the CUDA kernels, and doing without. No GPU is needed; nvcc only for what compiles."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from offload_engine.errors import DeviceError
from offload_engine.kernels import cuda, cuda_build
from offload_engine.kernels.build import BuildError
from offload_engine.kernels.cuda import CudaLibrary, SelectionCall
from offload_engine.kernels.loading import UnavailableError


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> CudaLibrary:
    """By nvcc, for every card."""
    try:
        cuda_build.nvcc()
    except BuildError as error:
        pytest.skip(f"THE CUDA KERNELS ARE NOT COMPILE-CHECKED HERE: {error}")
    return CudaLibrary(cuda_build.build(tmp_path_factory.mktemp("nvcc") / "libdmoe_cuda.so"))


def test_nvcc_compiles_the_kernels_for_every_card(compiled: CudaLibrary) -> None:
    assert compiled.device_type == "cuda"
    code = compiled.path.read_bytes()
    assert [number for number in cuda_build.ARCHITECTURES if b"sm_%d" % number not in code] == []
    assert cuda_build.ARCHITECTURES[0] == cuda.OLDEST[0] * 10 + cuda.OLDEST[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_a_launch_without_a_gpu_says_so(compiled: CudaLibrary) -> None:
    call = SelectionCall(tokens=0, experts=1, blocks=1, choices=1, groups=1, kept_groups=1)
    with pytest.raises(DeviceError, match=r"the CUDA kernel for expert selection failed with error \d+: "):
        compiled.select(call, None)
    with pytest.raises(ValueError, match="513 experts"):
        compiled.select(SelectionCall(experts=513, blocks=1, choices=1, groups=1, kept_groups=1), None)


def test_an_absent_damaged_or_stale_library_says_how_to_build_it(
    tmp_path: Path, emulated: CudaLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnavailableError, match=r"absent\.so is not built: run `make cuda`"):
        CudaLibrary(tmp_path / "absent.so")
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(b"\x7fELF nonsense")
    with pytest.raises(UnavailableError, match=r"can't be loaded .* run `make cuda`"):
        CudaLibrary(damaged)
    monkeypatch.setattr(cuda_build, "fingerprint", lambda: "0123456789abcdef")
    with pytest.raises(UnavailableError, match=r"other sources .*, not 0123456789abcdef\): run `make cuda`"):
        CudaLibrary(emulated.path)
    monkeypatch.setattr(cuda_build, "fingerprint", lambda: None)  # installed without the sources
    assert CudaLibrary(emulated.path).path == emulated.path


def test_why_torch_selects_instead(emulated: CudaLibrary) -> None:
    assert cuda.choose(emulated, "auto", (7, 5)).library is emulated
    assert cuda.choose(emulated, "avx2", (12, 0)).reason == "built for compute capability 12.0"
    for library, choice, capability, reason in (
        (emulated, "off", (8, 9), "OFFLOAD_ENGINE_KERNEL is off"),
        ("libdmoe_cuda.so is gone", "auto", (8, 9), "libdmoe_cuda.so is gone"),
        (emulated, "auto", None, "torch finds no CUDA device"),
        (emulated, "auto", (7, 0), "the device has compute capability 7.0, the CUDA kernels want 7.5 or newer"),
    ):
        assert cuda.choose(library, choice, capability) == cuda.CudaStatus(None, reason)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_the_status_says_why_in_one_line() -> None:
    status = cuda.status()
    assert status.library is None
    assert status.reason
    assert "\n" not in status.reason


@pytest.mark.parametrize(("compiler", "told"), [("no-such-nvcc -x", "no-such-nvcc"), ("false", "exit code 1")])
def test_a_build_that_fails_says_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, told: str
) -> None:
    monkeypatch.setenv("NVCC", compiler)
    with pytest.raises(BuildError, match=told):
        cuda_build.build(tmp_path / "library.so")
    assert list(tmp_path.iterdir()) == []


def test_no_nvcc_or_no_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("NVCC", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    assert cuda_build.main() == 1
    assert "CUDA kernels not built: no nvcc found; install the CUDA toolkit" in capsys.readouterr().err
    monkeypatch.setattr(cuda_build, "SOURCES", tmp_path)
    assert cuda_build.fingerprint() is None
    with pytest.raises(BuildError, match="in a checkout of the repository"):
        cuda_build.build(tmp_path / "library.so")


def test_nvcc_is_found_under_cuda_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVCC", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "nvcc"
    program.touch(mode=0o755)
    assert cuda_build.nvcc() == [str(program)]
