"""NVIDIA cards as the driver's management library (NVML) describes them, and whether this torch can use them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from offload_engine.config import format_bytes
from offload_engine.doctor.finding import Finding, Level

OLDEST = (7, 5)
"""Compute capability that our kernels are built from (Turing)."""
BFLOAT16 = (8, 0)
"""Compute capability from which a card has bfloat16 (Ampere)."""
CROWDED = 0.75
"""Share of a card's memory that should be free."""


@dataclass(frozen=True, slots=True)
class Card:
    """One GPU; sizes in bytes."""

    name: str
    total: int
    free: int
    capability: tuple[int, int]
    lanes: int | None = None
    """Of PCIe, in use; None where the driver doesn't say."""
    most_lanes: int | None = None
    """Of PCIe, that the card has."""
    generation: int | None = None
    """Of PCIe, the highest that card and slot share."""


@dataclass(frozen=True, slots=True)
class Graphics:
    """What NVML says."""

    absent: str = ""
    """Why there is nothing to say; empty where there is."""
    driver: str = ""
    cuda: tuple[int, int] = (0, 0)
    """Newest version of CUDA the driver runs."""
    cards: tuple[Card, ...] = ()


def check_driver(graphics: Graphics, wanted: bool) -> Finding:
    """`wanted`: the device asked for is a GPU."""
    if not graphics.absent and graphics.cards:
        return Finding("driver", f"{graphics.driver}, CUDA up to {_dotted(graphics.cuda)}, NVML answers")
    found = graphics.absent or f"driver {graphics.driver} shows no card"
    if wanted:
        return Finding(
            "driver",
            found,
            Level.PROBLEM,
            "install NVIDIA's driver and see that nvidia-smi lists the card (containers: --gpus all), or use "
            "--device cpu",
        )
    return Finding("driver", f"{found}: models run on the CPU")


def check_card(index: int, card: Card) -> list[Finding]:
    """Its memory, its age, and its way to the host."""
    check = f"GPU {index}"
    about = f"{card.name}, compute capability {_dotted(card.capability)}"
    findings = [_age(check, about, card.capability)]
    memory = f"{format_bytes(card.free)} free of {format_bytes(card.total)}"
    if card.free < CROWDED * card.total:
        way_out = "other programs hold the rest: nvidia-smi lists them; end them, or lower --gpu-mem"
        findings.append(Finding(f"{check} memory", memory, Level.WARNING, way_out))
    else:
        findings.append(Finding(f"{check} memory", memory))
    if card.lanes is not None and card.most_lanes is not None:
        findings.append(_link(f"{check} PCIe", card.lanes, card.most_lanes, card.generation))
    return findings


def check_torch(version: str, built_for: str | None, graphics: Graphics) -> Finding:
    """`built_for`: the version of CUDA that torch was built for, None for a build for the CPU alone."""
    found = f"{version}, {'for the CPU alone' if built_for is None else f'for CUDA {built_for}'}"
    if not graphics.cards:
        return Finding("torch", found)
    if built_for is None:
        return Finding(
            "torch",
            f"{found}, but there is a GPU",
            Level.WARNING,
            "install a build of torch for CUDA (pytorch.org, Get started)",
        )
    if int(built_for.partition(".")[0]) > graphics.cuda[0]:
        return Finding(
            "torch",
            f"{found}, but driver {graphics.driver} runs CUDA {_dotted(graphics.cuda)} at most",
            Level.PROBLEM,
            "install a newer driver, or a build of torch for an older CUDA",
        )
    return Finding("torch", found)


def check_device(wanted: str, count: int) -> Finding:
    """`wanted`: cuda or cuda:N; `count`: GPUs that torch can use."""
    if not count:
        way_out = "see the lines above, or use --device cpu"
        return Finding("device", f"{wanted}, but torch finds no GPU", Level.PROBLEM, way_out)
    if int(wanted.partition(":")[2] or 0) >= count:
        way_out = f"use one of cuda:0 to cuda:{count - 1}" if count > 1 else "use cuda:0"
        return Finding("device", f"{wanted}, but torch finds {count}", Level.PROBLEM, way_out)
    return Finding("device", f"{wanted}: torch finds it")


def read_graphics() -> Graphics:
    """Ask NVML. Never raises for what the machine lacks."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden in ("", "-1"):
        return Graphics(absent=f"CUDA_VISIBLE_DEVICES={hidden!r} hides every GPU")
    import pynvml

    try:
        with _nvml(pynvml):
            version = pynvml.nvmlSystemGetCudaDriverVersion_v2()
            cards = tuple(_card(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount()))
            driver = _text(pynvml.nvmlSystemGetDriverVersion())
            return Graphics(driver=driver, cuda=(version // 1000, version % 1000 // 10), cards=cards)
    except pynvml.NVMLError as error:
        return Graphics(absent=f"no NVIDIA driver ({error})")


def _age(check: str, about: str, capability: tuple[int, int]) -> Finding:
    if capability < OLDEST:
        way_out = f"our kernels need {_dotted(OLDEST)} or newer: use --device cpu"
        return Finding(check, about, Level.PROBLEM, way_out)
    if capability < BFLOAT16:
        return Finding(check, f"{about}: no bfloat16, models run in float16")
    return Finding(check, about)


def _link(check: str, lanes: int, most: int, generation: int | None) -> Finding:
    found = f"x{lanes}{f', generation {generation}' if generation else ''}"
    if lanes < most:
        return Finding(
            check,
            f"{found}; the card has x{most}",
            Level.WARNING,
            f"experts arrive at {lanes / most:.0%} of the speed: use a slot with all lanes, if there is one",
        )
    return Finding(check, found)


def _card(pynvml: Any, index: int) -> Card:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)

    def maybe(ask: Callable[[Any], int]) -> int | None:
        with suppress(pynvml.NVMLError):  # laptops and virtual cards leave some unanswered
            return int(ask(handle))
        return None

    return Card(
        name=_text(pynvml.nvmlDeviceGetName(handle)),
        total=int(memory.total),
        free=int(memory.free),
        capability=(int(major), int(minor)),
        lanes=maybe(pynvml.nvmlDeviceGetCurrPcieLinkWidth),
        most_lanes=maybe(pynvml.nvmlDeviceGetMaxPcieLinkWidth),
        generation=maybe(pynvml.nvmlDeviceGetMaxPcieLinkGeneration),
    )


@contextmanager
def _nvml(pynvml: Any) -> Iterator[None]:
    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def _text(name: str | bytes) -> str:
    """Older versions of pynvml give bytes."""
    return name.decode(errors="replace") if isinstance(name, bytes) else name


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
