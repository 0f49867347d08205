"""The grouped expert GEMM: many experts of one layer on their tokens in two launches, straight from their slots.

Nothing here waits for the device. Which expert gets which rows is worked out there, and no shape depends on it, so that
all of it can also be captured in a CUDA graph.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from offload_engine.errors import UsageError

CHOICE = "OFFLOAD_ENGINE_TRITON"
"""Environment variable: auto (the default), or off."""

INTERPRETED = "TRITON_INTERPRET"
"""Triton's own: 1 lets its interpreter run kernels, on CPU tensors. It counts when Triton is first imported."""

CAPABILITY = (8, 0)
"""The lowest compute capability that Triton's makers support."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ALIGNMENT = 16
"""Bytes of the widest load."""

_COLUMNS, _DEPTHS, _SUMMED = 64, (64, 32, 16), 1024
"""Columns of a block of a product; its depth, in bytes of int4 or else in weights; columns of a block of the sum."""
_SORTED, _COUNTED = 64, 32
"""Rows that are compared with as many others at a time, or with all experts."""
_OPTIONS = {"enable_fp_fusion": True}
"""Of every launch: Triton warns where it isn't told."""


class Slabs(NamedTuple):
    """The slots of one buffer, and where the experts of a layer have their matrices once they are in one."""

    memory: Tensor
    """uint8 [slots * slab_bytes]"""
    slab_bytes: int
    """A multiple of `ALIGNMENT`."""
    places: Tensor
    """int64 [E, 6], contiguous, on `memory`'s device: where in a slab, in bytes, gate's values and scales begin, up's,
    and down's; anything for scales that there aren't."""
    width: int
    """Rows of gate and up, columns of down: an expert's inner width I."""
    dtype: torch.dtype
    """Of plain values."""
    group: int = 0
    """0: plain values; 1: int8, a float32 scale per row; else int4, so many columns to a bfloat16 scale."""
    aligned: int = 4
    """A power of two, at most `ALIGNMENT`, that divides all `places`; so do the sizes of what lies there."""

    def views(self) -> tuple[Tensor, Tensor]:
        """The memory as values, and as scales."""
        if self.group == 0:
            return (self.memory.view(self.dtype),) * 2
        if self.group == 1:
            return self.memory.view(torch.int8), self.memory.view(torch.float32)
        return self.memory, self.memory.view(torch.bfloat16)


class Tiles(NamedTuple):
    """The rows of a decision [T, k] by expert, cut into tiles of at most `block_rows` rows of one expert."""

    order: Tensor
    """int64 [T * k]: the flattened decision's places by rising expert, each expert's rising; those of no expert last"""
    starts: Tensor
    """int64 [E + 1]: where in `order` each expert's begin, and where the last one's end"""
    experts: Tensor
    """int64 [tiles]: whose each tile is; E for the tiles at the end that there was no need of"""
    rows: Tensor
    """int64 [tiles]: where in `order` each begins"""
    block_rows: int


def rows_per_tile(rows: int, experts: int) -> int:
    """16, 32 or 64, by what an expert gets on average. Nothing else may decide: a tile's size can show in the last bit
    of a result, which must not depend on what is cached.
    """
    return next(size for size in (16, 32, 64) if rows <= size * experts or size == 64)


def tiles_by_expert(chosen: Tensor, experts: int) -> Tiles:
    """Group `chosen` [T, k] int64 contiguous, -1 for no expert: as many tiles as it may need, whatever it holds."""
    rows, block_rows = chosen.numel(), rows_per_tile(chosen.numel(), experts)
    tiles = rows // block_rows + min(experts, rows)
    order, starts = chosen.new_empty(rows), chosen.new_zeros(experts + 1)
    owners, begins = chosen.new_empty(tiles), chosen.new_empty(tiles)
    if rows:
        kernels = _kernels()
        kernels.sort_rows[(-(-rows // _SORTED),)](chosen, order, rows, experts, _SORTED, **_OPTIONS)
        sizes = (rows, experts, tiles, block_rows, 1 << experts.bit_length(), _COUNTED)
        kernels.cut_tiles[(1,)](chosen, starts, owners, begins, *sizes, **_OPTIONS)
    return Tiles(order, starts, owners, begins, block_rows)


@cache
def why_not(device: torch.device) -> str | None:
    """Why the kernels can't run on `device`, in one line; None if they can, which is tried out once on a tiny expert.

    Raises `UsageError` for a bad `CHOICE`.
    """
    choice = os.environ.get(CHOICE) or "auto"
    if choice not in ("auto", "off"):
        raise UsageError(f"{CHOICE}={choice!r} is none of auto, off")
    if choice == "off":
        return f"{CHOICE} is off"
    if not _installed():
        return "Triton is not installed"
    if device.type == "cpu" and os.environ.get(INTERPRETED) != "1":
        return f"Triton needs a GPU (or {INTERPRETED}=1, to test it)"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"compute capability {found}, and Triton wants {'.'.join(map(str, CAPABILITY))}"
    try:
        _try_out(device)
    except Exception as error:  # a compiler or a driver that doesn't suit Triton shows in ways of its own
        return f"Triton fails here: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return None


def serves(hidden: Tensor) -> bool:
    """Whether the kernels compute on `hidden`: they run on its device, know its dtype, and nobody wants a gradient."""
    learning = torch.is_grad_enabled() and hidden.requires_grad
    return hidden.dtype in DTYPES and not learning and why_not(hidden.device) is None


def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _try_out(device: torch.device) -> None:
    """Run one tiny expert of ones. Raises whatever Triton does; `ArithmeticError` if the result is wrong."""
    hidden = torch.ones(1, 16, dtype=torch.float16, device=device)
    chosen = torch.zeros(1, 1, dtype=torch.int64, device=device)
    memory = torch.ones(3 * 256, dtype=torch.float16, device=device).view(torch.uint8)
    places = torch.tensor([[0, 0, 512, 0, 1024, 0]], device=device)
    outputs = torch.empty(1, 16, dtype=torch.float16, device=device)
    slabs = Slabs(memory, 3 * 512, places, 16, torch.float16, aligned=ALIGNMENT)
    experts_ffn(hidden, tiles_by_expert(chosen, 1), chosen[0].int(), slabs, outputs)
    found = float(weighted_sum(outputs, chosen, torch.ones(1, 1, device=device))[0, 0])
    if not abs(found - 4096) <= 4:  # silu(16) is 16 less 2e-6
        raise ArithmeticError(f"16 x 16 x 16 gave {found}")


def experts_ffn(hidden: Tensor, tiles: Tiles, slots: Tensor, slabs: Slabs, outputs: Tensor) -> None:
    """Run the experts that have a slot, each on its tokens: down(silu(gate(x)) * up(x)) of rows of `hidden` [T, H] into
    the rows of `outputs` [T * k, H] that are theirs. All other rows stay as they are, for a later launch.

    `slots` int32 [E]: an expert's slot, or below 0. `hidden` and `outputs` share one of `DTYPES`, which products are
    taken in; int4 is rounded to it (as by `QuantizedMatrix.dequantize`), int8 scaled after the product. Sums are kept
    in float32, and what goes from gate and up to down is rounded to it once. All contiguous and on one device.

    Raises ValueError for shapes, dtypes or devices that don't fit. Numbers are not looked at: slots, places and experts
    that are out of range are the caller's fault.
    """
    _check(hidden, tiles, slots, slabs, outputs)
    if not outputs.numel():
        return
    rows, model_width = outputs.shape
    values, scales = slabs.views()
    inner = hidden.new_empty(rows, slabs.width)
    slots = F.pad(slots, (0, 1), value=-1)  # tiles of no expert find no slot
    table = (tiles.order, tiles.experts, tiles.rows, tiles.starts, slots, slabs.places)
    weights = (values, scales, slabs.slab_bytes)
    blocks = {"block_rows": tiles.block_rows, "block_columns": _COLUMNS, "block_depth": block_depth(slabs.group)}
    form = {"group": slabs.group, "aligned": slabs.aligned, **_OPTIONS}
    kernels, count = _kernels(), tiles.experts.shape[0]
    shape = {"choices": rows // hidden.shape[0], "depth": model_width, "width": slabs.width}
    kernels.gate_up[(_blocks(slabs.width), count)](hidden, inner, *table, *weights, **shape, **form, **blocks)
    shape = {"depth": slabs.width, "width": model_width}
    kernels.down[(_blocks(model_width), count)](inner, outputs, *table, *weights, **shape, **form, **blocks)


def weighted_sum(outputs: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The sum [T, H] over k of `weights` [T, k] float32 times `outputs` [T * k, H], accumulated in float32 in the order
    of k. Rows whose expert, of `chosen` [T, k] int64, is below 0 count nothing and may hold anything. All contiguous.
    """
    tokens, choices = chosen.shape
    out = outputs.new_empty(tokens, outputs.shape[1])
    if out.numel():
        grid = (tokens, -(-outputs.shape[1] // _SUMMED))
        _kernels().weighted_sum[grid](outputs, chosen, weights, out, choices, outputs.shape[1], _SUMMED, **_OPTIONS)
    return out


def block_depth(group: int) -> int:
    """How much of a product's depth is taken at a time: of int4, if it can be, what one scale is for."""
    half = group // 2
    return next((depth for depth in _DEPTHS if half % depth == 0), _DEPTHS[0])


def _blocks(columns: int) -> int:
    return -(-columns // _COLUMNS)


@cache
def _kernels() -> Any:
    return importlib.import_module("offload_engine.kernels.triton_experts")


def _check(hidden: Tensor, tiles: Tiles, slots: Tensor, slabs: Slabs, outputs: Tensor) -> None:
    if hidden.dim() != 2 or hidden.dtype not in DTYPES:
        raise ValueError(f"hidden is {_told(hidden)}, wanted bf16, fp16 or float32 [T, H]")
    rows, experts = tiles.order.shape[0], tiles.starts.shape[0] - 1
    tensors = (hidden, outputs, slots, slabs.memory, slabs.places)
    for name, tensor, dtype, shape in (
        ("outputs", outputs, hidden.dtype, (rows, hidden.shape[1])),
        ("slots", slots, torch.int32, (experts,)),
        ("places", slabs.places, torch.int64, (experts, 6)),
    ):
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(f"{name} is {_told(tensor)}, wanted {dtype} {list(shape)}")
    if rows % max(1, hidden.shape[0]):
        raise ValueError(f"{rows} choices are no whole number for each of {hidden.shape[0]} tokens")
    if slabs.memory.dtype != torch.uint8 or slabs.slab_bytes % ALIGNMENT or slabs.memory.numel() % slabs.slab_bytes:
        raise ValueError(f"memory is {_told(slabs.memory)}, wanted uint8, a multiple of {slabs.slab_bytes} bytes")
    if not all(tensor.is_contiguous() and tensor.device == hidden.device for tensor in tensors):
        raise ValueError("a tensor is not contiguous, or not on the same device as hidden")


def _told(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
