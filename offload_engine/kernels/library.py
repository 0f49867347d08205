"""Finds and loads the compiled kernels, picks the variant for this CPU, and tells what came of it."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from offload_engine.errors import UsageError
from offload_engine.kernels.loading import UnavailableError, load

CHOICE = "OFFLOAD_ENGINE_KERNEL"
"""Environment variable: auto (the default), off, or the name of a variant."""

REBUILD = "run `python -m offload_engine.kernels.build`"
NO_MEMORY = 1
"""A kernel could not allocate its workspace."""

_INT, _INT64, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_FLOAT, _DOUBLE = ctypes.c_float, ctypes.c_double


class Library:
    """A loaded library of kernels.

    Calls release the GIL. Raises UnavailableError if `path` (default: where the build leaves it) is absent, can't be
    loaded, or was built from other sources than those beside this module.
    """

    def __init__(self, path: Path | None = None) -> None:
        from offload_engine.kernels.build import LIBRARY, fingerprint  # here, for `python -m` runs that module afresh

        path = path or LIBRARY
        library = load(path, "dmoe_sources", fingerprint(), REBUILD)
        library.dmoe_variant.restype = ctypes.c_char_p
        self.path = path
        self.parallel = _parallel()
        self._experts = library.dmoe_experts
        self._experts.argtypes = [*(_INT,) * 4, _POINTER, *(_INT64,) * 6, *(_POINTER,) * 5]
        self._linear = library.dmoe_linear
        self._linear.argtypes = [*(_INT,) * 3, _POINTER, *(_INT64,) * 3, *(_POINTER,) * 4]
        self._attention = library.dmoe_attention
        self._attention.argtypes = [*(_INT,) * 2, _POINTER, *(_INT64,) * 5, _FLOAT, *(_POINTER,) * 4]
        self._attention_half = library.dmoe_attention_half
        self._attention_half.argtypes = [
            *(_INT,) * 2,
            _POINTER,
            _POINTER,
            _INT64,
            _POINTER,
            *(_INT64,) * 3,
            *(_POINTER,) * 6,
        ]
        self._weighted_sum = library.dmoe_weighted_sum
        self._weighted_sum.argtypes = [*(_INT,) * 2, _POINTER, *(_INT64,) * 3, *(_POINTER,) * 4]
        self._norm = library.dmoe_norm
        self._norm.argtypes = [*(_INT,) * 2, _POINTER, *(_INT64,) * 2, _FLOAT, *(_POINTER,) * 3]
        self._turn_heads = library.dmoe_turn_heads
        self._turn_heads.argtypes = [*(_INT,) * 2, _POINTER, *(_INT64,) * 5, _FLOAT, *(_POINTER,) * 5]
        self._router = library.dmoe_router
        self._router.argtypes = [*(_INT,) * 2, _POINTER, *(_INT64,) * 3, *(_POINTER,) * 3]
        self._likeliest = library.dmoe_likeliest
        self._likeliest.argtypes = [*(_INT,) * 2, _POINTER, *(_INT64,) * 3, *(_POINTER,) * 3]
        self.select = library.dmoe_select
        """cpu/select.c, unchecked, as is the next."""
        self.select.argtypes = [_INT, *(_INT64,) * 6, _INT, _FLOAT, _DOUBLE, _INT64, *(_POINTER,) * 7]
        self.select.restype = _INT64
        self.rank = library.dmoe_rank
        self.rank.argtypes = [_INT64, _POINTER, _INT64, _INT64, _POINTER, _INT64, *(_POINTER,) * 3]
        self.rank.restype = _INT64
        self.variants: dict[str, int] = {}
        """Variants that this CPU can run, fastest first, with their numbers."""
        for number in range(8):
            name = library.dmoe_variant(number)
            if name is not None and library.dmoe_supported(number):
                self.variants[name.decode()] = number

    def threads(self) -> int:
        """How many threads a call may use: torch's number, if its OpenMP runtime can be shared."""
        return torch.get_num_threads() if self.parallel else 1

    def experts(
        self,
        variant: int,
        kind: int,
        bf16: bool,
        threads: int,
        sizes: tuple[int, ...],
        hidden: int,
        chosen: int | None,
        numbers: Sequence[int],
        table: bytes,
        out: int,
    ) -> None:
        """Call `dmoe_experts` (cpu/expert_ffn.c) with checked arguments. Raises MemoryError."""
        named = struct.pack(f"{len(numbers)}q", *numbers)
        failure = self._experts(variant, kind, bf16, threads, self.parallel, *sizes, hidden, chosen, named, table, out)
        if failure == NO_MEMORY:
            raise MemoryError(f"no memory for the workspace of {sizes[0]} experts")
        if failure:
            raise ValueError(f"{self.path.name} refused {sizes[0]} experts in variant {variant} with code {failure}")

    def linear(self, variant: int, bf16: bool, threads: int, sizes: tuple[int, int, int], *data: int | None) -> None:
        """Call `dmoe_linear` (cpu/linear.c) with checked arguments. Raises MemoryError."""
        failure = self._linear(variant, bf16, threads, self.parallel, *sizes, *data)
        if failure == NO_MEMORY:
            raise MemoryError(f"no memory for the workspace of {sizes[0]} tokens")
        if failure:
            raise ValueError(f"{self.path.name} refused a linear layer in variant {variant} with code {failure}")

    def attention(self, variant: int, threads: int, sizes: tuple[int, ...], scale: float, *data: int) -> None:
        """Call `dmoe_attention` (cpu/attention.c) with checked arguments. Raises MemoryError."""
        failure = self._attention(variant, threads, self.parallel, *sizes, scale, *data)
        if failure == NO_MEMORY:
            raise MemoryError(f"no memory for the workspace of attention to {sizes[-1]} positions")
        if failure:
            raise ValueError(f"{self.path.name} refused attention in variant {variant} with code {failure}")

    def attention_half(
        self,
        variant: int,
        threads: int | None,
        half: bytes,
        layer: int,
        places: bytes,
        sizes: tuple[int, int, int],
        *data: int,
    ) -> None:
        """Call `dmoe_attention_half` (cpu/attention_half.c) with checked arguments, `threads` None: torch's number.
        Raises MemoryError.
        """
        crew = self._crew(threads)
        failure = self._attention_half(variant, crew, self.parallel, half, layer, places, *sizes, *data)
        if failure == NO_MEMORY:
            raise MemoryError(f"no memory for the workspace of a layer's {sizes[1]} tokens")
        if failure:
            raise ValueError(f"{self.path.name} refused a layer's first half in variant {variant} with code {failure}")

    def weighted_sum(self, variant: int, sizes: tuple[int, ...], *data: int) -> None:
        """Call `dmoe_weighted_sum` (cpu/weighted_sum.c) with checked arguments."""
        failure = self._weighted_sum(variant, self.threads(), self.parallel, *sizes, *data)
        if failure:
            raise ValueError(f"{self.path.name} refused a weighted sum in variant {variant} with code {failure}")

    def norm(self, variant: int, threads: int | None, sizes: tuple[int, int], eps: float, *data: int) -> None:
        """Call `dmoe_norm` (cpu/norms.c) with checked arguments, on `threads` (None: torch's number)."""
        failure = self._norm(variant, self._crew(threads), self.parallel, *sizes, eps, *data)
        if failure:
            raise ValueError(f"{self.path.name} refused a norm in variant {variant} with code {failure}")

    def turn_heads(
        self, variant: int, threads: int | None, sizes: tuple[int, ...], eps: float, *data: int | None
    ) -> None:
        """Call `dmoe_turn_heads` (cpu/norms.c) with checked arguments, on `threads` (None: torch's number)."""
        failure = self._turn_heads(variant, self._crew(threads), self.parallel, *sizes, eps, *data)
        if failure:
            raise ValueError(f"{self.path.name} refused heads in variant {variant} with code {failure}")

    def router(self, variant: int, threads: int | None, sizes: tuple[int, int, int], *data: int) -> None:
        """Call `dmoe_router` (cpu/router.c) with checked arguments, on `threads` (None: torch's number)."""
        failure = self._router(variant, self._crew(threads), self.parallel, *sizes, *data)
        if failure == NO_MEMORY:
            raise MemoryError(f"no memory for the workspace of a router's {sizes[0]} tokens")
        if failure:
            raise ValueError(f"{self.path.name} refused a router in variant {variant} with code {failure}")

    def likeliest(self, variant: int, threads: int | None, sizes: tuple[int, int, int], *data: int) -> None:
        """Call `dmoe_likeliest` (cpu/likeliest.c) with checked arguments, on `threads` (None: torch's number)."""
        failure = self._likeliest(variant, self._crew(threads), self.parallel, *sizes, *data)
        if failure:
            raise ValueError(f"{self.path.name} refused rows of logits in variant {variant} with code {failure}")

    def _crew(self, threads: int | None) -> int:
        return self.threads() if threads is None or self.parallel is None else threads


def _parallel() -> int | None:
    """Address of `GOMP_parallel` in the OpenMP runtime that torch runs on; None where it has another one."""
    for name in ("libtorch_cpu.so", "libtorch.so"):
        try:
            torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
            return ctypes.cast(torch_library.GOMP_parallel, _POINTER).value
        except (OSError, AttributeError):
            continue
    return None


@dataclass(frozen=True, slots=True)
class KernelStatus:
    """What computes experts and bf16 linear layers on the CPU."""

    variant: str | None
    """The instruction set in use; None: torch computes."""
    reason: str
    """Why, in one line."""
    usable: tuple[str, ...] = ()
    """Every variant this CPU could run."""
    library: Library | None = None

    @property
    def number(self) -> int:
        """The variant's number in the library."""
        if self.library is None or self.variant is None:
            raise ValueError(f"no kernel is in use: {self.reason}")
        return self.library.variants[self.variant]


@cache
def _loaded() -> Library | str:
    try:
        return Library()
    except UnavailableError as error:
        return str(error)


def choose(library: Library | str, choice: str) -> KernelStatus:
    """Which variant of `library` (or the reason that there is none) `choice` means. Raises UsageError."""
    if choice == "off":
        return KernelStatus(None, f"{CHOICE} is off")
    if isinstance(library, str):
        if choice != "auto":
            raise UsageError(f"{CHOICE}={choice!r}: {library}")
        return KernelStatus(None, library)
    usable = tuple(library.variants)
    name = usable[0] if choice == "auto" else choice
    if name not in usable:
        raise UsageError(f"{CHOICE}={choice!r} is none of auto, off, {', '.join(usable)}, which this CPU can run")
    shared = "on torch's threads" if library.parallel else "on one thread (torch brings no libgomp to share)"
    why = "the fastest this CPU can run" if choice == "auto" else f"asked for by {CHOICE}"
    return KernelStatus(name, f"{why}, {shared}", usable, library)


@cache
def status() -> KernelStatus:
    """What computes them on the CPU in this process, decided once. Raises UsageError for a bad `CHOICE`."""
    return choose(_loaded(), os.environ.get(CHOICE) or "auto")
