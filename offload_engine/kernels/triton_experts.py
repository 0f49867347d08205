"""Triton kernels of the grouped expert GEMM, launched by `offload_engine.kernels.grouped` alone.

Imported only where Triton is installed. Weights are read where they lie, in the slots of one buffer: a program finds
its expert in a table of tiles, the expert's slot in the slot table, and its matrices by their places in the slab
(docs/packed-format.md). A tile whose expert has no slot costs a program that returns at once.

Every product sums its depth in one order, whatever else is in the tile: an output depends on its token, its expert and
the block sizes alone, not on slots, launches or the tokens beside it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _keys(chosen, at, rows, experts):
    """What rows sort by: their expert; after all of them what has none, and then what is beyond the last row."""
    keys = tl.load(chosen + at, mask=at < rows, other=0)
    return tl.where(at < rows, tl.where(keys < 0, experts, keys), experts + 1)


@triton.jit
def sort_rows(chosen, order, rows, experts, block: tl.constexpr):
    """To `order` [rows]: the numbers of the rows by rising expert, each expert's rising; those of no expert last.

    Every row counts the rows before it, which for the few thousand that there are is faster than several launches.
    """
    mine = tl.program_id(0) * block + tl.arange(0, block)
    key = _keys(chosen, mine, rows, experts)
    rank = tl.zeros((block,), tl.int32)
    for first in range(0, rows, block):
        at = first + tl.arange(0, block)
        keys = _keys(chosen, at, rows, experts)
        less = tl.where(keys[None, :] < key[:, None], 1, 0)
        alike = tl.where(keys[None, :] == key[:, None], tl.where(at[None, :] < mine[:, None], 1, 0), 0)
        rank += tl.sum(less + alike, axis=1)
    tl.store(order + rank, mine.to(tl.int64), mask=mine < rows)


@triton.jit
def cut_tiles(chosen, starts, tile_experts, tile_rows, rows, experts, tiles,
              block_rows: tl.constexpr, block_experts: tl.constexpr, block: tl.constexpr):  # fmt: skip
    """To `starts` [experts + 1] where in the order each expert's rows begin, and where the last one's end; to
    `tile_experts` and `tile_rows` [tiles] whose each tile is and where it begins, experts and 0 where there is no need.
    """
    numbers = tl.arange(0, block_experts)
    begin = tl.zeros((block_experts,), tl.int32)
    end = tl.zeros((block_experts,), tl.int32)
    for first in range(0, rows, block):
        keys = _keys(chosen, first + tl.arange(0, block), rows, experts)
        begin += tl.sum(tl.where(keys[None, :] < numbers[:, None], 1, 0), axis=1)
        end += tl.sum(tl.where(keys[None, :] <= numbers[:, None], 1, 0), axis=1)
    tl.store(starts + numbers, begin.to(tl.int64), mask=numbers <= experts)
    needed = tl.where(numbers < experts, (end - begin + block_rows - 1) // block_rows, 0)
    last = tl.cumsum(needed, 0)
    for tile in range(tl.max(needed, axis=0)):
        place = last - needed + tile
        tl.store(tile_experts + place, numbers.to(tl.int64), mask=tile < needed)
        tl.store(tile_rows + place, (begin + tile * block_rows).to(tl.int64), mask=tile < needed)
    total = tl.max(last, axis=0)
    for first in range(0, tiles, block):
        at = first + tl.arange(0, block)
        unneeded = tl.where(at >= total, at, tiles) < tiles
        tl.store(tile_experts + at, tl.zeros((block,), tl.int64) + experts, mask=unneeded)
        tl.store(tile_rows + at, tl.zeros((block,), tl.int64), mask=unneeded)


@triton.jit
def _product(x, rows, values, scales, columns,
             depth: tl.constexpr, width: tl.constexpr, group: tl.constexpr, block_depth: tl.constexpr):  # fmt: skip
    """Rows of activations by `columns` [N] of the transpose of the matrix [width, depth] at `values`: [M, N] float32.

    `x`: pointers to the rows [M, 1]; `rows` [M, 1]: which of them there are. `group` 0: plain values; 1: 8 bits with a
    scale per row of the matrix; else 4 bits, so many columns to a scale.
    """
    kind = x.dtype.element_ty
    wanted = (columns < width)[:, None]
    stored: tl.constexpr = depth // 2 if group > 1 else depth
    total = tl.zeros((x.shape[0], columns.shape[0]), tl.float32)
    for start in range(0, stored, block_depth):
        at = start + tl.arange(0, block_depth)
        inside = at < stored
        there = inside[None, :] & wanted
        # Integers become floating point by way of float32: Triton's interpreter knows no other way.
        weights = tl.load(values + columns[:, None] * stored + at[None, :], mask=there, other=0)
        if group > 1:
            # Byte i of a group holds its columns i and i + group / 2: two products, each of columns that lie together.
            half: tl.constexpr = group // 2
            low = x + (at // half * group + at % half)[None, :]
            held = rows & inside[None, :]
            steps_at = scales + columns[:, None] * (depth // group)
            if half % block_depth == 0:  # the block is in one group: a scale a column, not one a weight
                steps = tl.load(steps_at + start // half, mask=wanted, other=0)
            else:
                steps = tl.load(steps_at + (at // half)[None, :], mask=there, other=0)
            left, right = tl.load(low, mask=held, other=0), tl.load(low + half, mask=held, other=0)
            first = ((weights & 15).to(tl.float32) - 8.0) * steps.to(tl.float32)
            second = ((weights >> 4).to(tl.float32) - 8.0) * steps.to(tl.float32)
            total = tl.dot(left, tl.trans(first.to(kind)), total, input_precision="ieee")
            total = tl.dot(right, tl.trans(second.to(kind)), total, input_precision="ieee")
        else:
            part = tl.load(x + at[None, :], mask=rows & inside[None, :], other=0)
            total = tl.dot(part, tl.trans(weights.to(tl.float32).to(kind)), total, input_precision="ieee")
    if group == 1:
        total *= tl.load(scales + columns, mask=columns < width, other=0)[None, :]
    return total


@triton.jit
def _at(memory, slab, place, aligned: tl.constexpr):
    """Pointer to what begins at the byte that `place` points to, from byte `slab` on; `aligned` divides both, and the
    size of the elements of `memory` divides that.
    """
    size: tl.constexpr = memory.dtype.element_ty.primitive_bitwidth // 8
    first = slab + tl.multiple_of(tl.load(place), aligned)
    return memory + tl.multiple_of(first // size, aligned // size)


@triton.jit
def gate_up(hidden, inner, order, tile_experts, tile_rows, starts, slots, places, values, scales, slab_bytes,
            choices: tl.constexpr, depth: tl.constexpr, width: tl.constexpr, group: tl.constexpr, aligned: tl.constexpr,
            block_rows: tl.constexpr, block_columns: tl.constexpr, block_depth: tl.constexpr):  # fmt: skip
    """silu(gate(x)) * up(x) for the rows of `hidden` [T, depth], to `inner` [R, width], its rows as in `order`."""
    expert = tl.load(tile_experts + tl.program_id(1))
    slot = tl.load(slots + expert)
    if slot < 0:
        return
    rows = tl.load(tile_rows + tl.program_id(1)) + tl.arange(0, block_rows)
    there = rows < tl.load(starts + expert + 1)
    columns = tl.program_id(0) * block_columns + tl.arange(0, block_columns)
    tokens = tl.load(order + rows, mask=there, other=0) // choices
    x = hidden + tokens[:, None] * depth
    slab = slot.to(tl.int64) * slab_bytes
    place = places + expert * 6
    gate, gate_scales = _at(values, slab, place, aligned), _at(scales, slab, place + 1, aligned)
    up, up_scales = _at(values, slab, place + 2, aligned), _at(scales, slab, place + 3, aligned)
    gated = _product(x, there[:, None], gate, gate_scales, columns, depth, width, group, block_depth)
    passed = _product(x, there[:, None], up, up_scales, columns, depth, width, group, block_depth)
    result = gated / (1.0 + tl.exp(-gated)) * passed
    target = inner + rows.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(target, result.to(inner.dtype.element_ty), mask=there[:, None] & (columns < width)[None, :])


@triton.jit
def down(inner, outputs, order, tile_experts, tile_rows, starts, slots, places, values, scales, slab_bytes,
         depth: tl.constexpr, width: tl.constexpr, group: tl.constexpr, aligned: tl.constexpr,
         block_rows: tl.constexpr, block_columns: tl.constexpr, block_depth: tl.constexpr):  # fmt: skip
    """The last product of the rows of `inner` [R, depth], each to the row of `outputs` [R, width] that `order` says."""
    expert = tl.load(tile_experts + tl.program_id(1))
    slot = tl.load(slots + expert)
    if slot < 0:
        return
    rows = tl.load(tile_rows + tl.program_id(1)) + tl.arange(0, block_rows)
    there = rows < tl.load(starts + expert + 1)
    columns = tl.program_id(0) * block_columns + tl.arange(0, block_columns)
    x = inner + rows.to(tl.int64)[:, None] * depth
    slab = slot.to(tl.int64) * slab_bytes
    place = places + expert * 6 + 4
    matrix, matrix_scales = _at(values, slab, place, aligned), _at(scales, slab, place + 1, aligned)
    result = _product(x, there[:, None], matrix, matrix_scales, columns, depth, width, group, block_depth)
    target = outputs + tl.load(order + rows, mask=there, other=0)[:, None] * width + columns[None, :]
    tl.store(target, result.to(outputs.dtype.element_ty), mask=there[:, None] & (columns < width)[None, :])


@triton.jit
def weighted_sum(outputs, chosen, weights, out, choices: tl.constexpr, width: tl.constexpr, block: tl.constexpr):
    """Over a token's choices, in their order, in float32: the sum of weight times row of `outputs` [T * k, width]."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    total = tl.zeros((block,), tl.float32)
    for choice in range(choices):
        place = token * choices + choice
        wanted = columns < tl.where(tl.load(chosen + place) >= 0, width, 0)
        row = tl.load(outputs + place * width + columns, mask=wanted, other=0).to(tl.float32)
        total += tl.where(wanted, tl.load(weights + place) * row, 0.0)
    tl.store(out + token * width + columns, total.to(out.dtype.element_ty), mask=columns < width)
