"""Cards and drivers of other machines, through a stand-in for NVML."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest

from offload_engine.doctor.finding import Level
from offload_engine.doctor.graphics import (
    Card,
    Graphics,
    check_card,
    check_device,
    check_driver,
    check_torch,
    read_graphics,
)

GB = 10**9
CARD = Card("RTX 4060", 8 * GB, 7 * GB, (8, 9), 8, 8, 4)
PRESENT = Graphics(driver="570.1", cuda=(12, 8), cards=(CARD,))


def levels(card: Card) -> dict[str, Level]:
    return {finding.check: finding.level for finding in check_card(0, card)}


def test_a_card_that_is_fine() -> None:
    assert levels(CARD) == {"GPU 0": Level.OK, "GPU 0 memory": Level.OK, "GPU 0 PCIe": Level.OK}


def test_what_may_be_wrong_with_a_card() -> None:
    assert levels(replace(CARD, capability=(7, 0)))["GPU 0"] is Level.PROBLEM
    assert levels(replace(CARD, free=5 * GB))["GPU 0 memory"] is Level.WARNING
    assert levels(replace(CARD, most_lanes=16))["GPU 0 PCIe"] is Level.WARNING
    assert "GPU 0 PCIe" not in levels(replace(CARD, lanes=None)), "virtual cards don't say"
    assert "float16" in check_card(0, replace(CARD, capability=(7, 5)))[0].found


def test_no_driver_is_a_problem_only_for_who_wants_a_gpu() -> None:
    assert check_driver(Graphics(absent="no NVIDIA driver"), wanted=False).level is Level.OK
    assert check_driver(Graphics(absent="no NVIDIA driver"), wanted=True).level is Level.PROBLEM
    assert check_driver(Graphics(driver="570.1"), wanted=True).found == "driver 570.1 shows no card"
    assert check_driver(PRESENT, wanted=True).level is Level.OK


def test_torch_beside_the_card_and_its_driver() -> None:
    assert check_torch("2.9", None, Graphics(absent="none")).level is Level.OK
    assert check_torch("2.9", None, PRESENT).level is Level.WARNING
    assert check_torch("2.9", "12.8", PRESENT).level is Level.OK
    newer = check_torch("2.9", "13.0", PRESENT)
    assert newer.level is Level.PROBLEM
    assert "runs CUDA 12.8 at most" in newer.found


@pytest.mark.parametrize(
    ("wanted", "count", "level"),
    [("cuda", 0, Level.PROBLEM), ("cuda", 1, Level.OK), ("cuda:1", 1, Level.PROBLEM), ("cuda:1", 2, Level.OK)],
)
def test_the_device_asked_for(wanted: str, count: int, level: Level) -> None:
    assert check_device(wanted, count).level is level
    assert bool(check_device(wanted, count).way_out) is (level is Level.PROBLEM)


def nvml(monkeypatch: pytest.MonkeyPatch, *, driver: bool = True, lanes: bool = True) -> ModuleType:
    class NVMLError(Exception):
        pass

    def link(width: int):
        def ask(_handle):
            if not lanes:
                raise NVMLError("Not Supported")
            return width

        return ask

    def start():
        if not driver:
            raise NVMLError("Driver Not Loaded")

    fake = ModuleType("pynvml")
    answers = {
        "NVMLError": NVMLError,
        "nvmlInit": start,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetCudaDriverVersion_v2": lambda: 12080,
        "nvmlSystemGetDriverVersion": lambda: b"570.1",
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(total=8 * GB, free=7 * GB),
        "nvmlDeviceGetCudaComputeCapability": lambda _: (8, 9),
        "nvmlDeviceGetName": lambda _: "RTX 4060",
        "nvmlDeviceGetCurrPcieLinkWidth": link(8),
        "nvmlDeviceGetMaxPcieLinkWidth": link(8),
        "nvmlDeviceGetMaxPcieLinkGeneration": link(4),
    }
    for name, answer in answers.items():
        setattr(fake, name, answer)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


def test_nvml_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml(monkeypatch)
    assert read_graphics() == PRESENT


def test_what_nvml_leaves_unanswered_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml(monkeypatch, lanes=False)
    assert read_graphics().cards == (replace(CARD, lanes=None, most_lanes=None, generation=None),)


def test_no_driver_or_a_hidden_card(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml(monkeypatch, driver=False)
    assert "Driver Not Loaded" in read_graphics().absent
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert "hides every GPU" in read_graphics().absent
