"""The half of a decoder layer that comes before its experts, as one call of the C kernels: the checks, made once for a
layer's weights and once for a forward's places, and the call.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from offload_engine.kernels.library import KernelStatus, status
from offload_engine.kernels.norms import WIDEST_HEAD


class HalfWeights(NamedTuple):
    """A layer's weights up to its router's, for heads of size d and a residual stream of width H; contiguous bf16."""

    norm: Tensor
    """[H]"""
    projection: Tensor
    """[(heads + 2 kv_heads) d, H]: queries, keys and values"""
    projection_bias: Tensor | None
    query_norm: Tensor | None
    """[d], as `key_norm`; both or neither"""
    key_norm: Tensor | None
    dense: Tensor
    """[H, heads d]"""
    dense_bias: Tensor | None
    next_norm: Tensor
    """[H]: of what comes after attention"""
    router: Tensor | None
    """[E, H] float32; None: the layer has no experts"""

    @property
    def places(self) -> tuple[int, ...]:
        """Where they lie, 0 for None."""
        return tuple([0 if tensor is None else tensor.data_ptr() for tensor in self])


class BlockPlace(NamedTuple):
    """Where the keys and values of one block of a forward go, which sees them and all before them."""

    keys: Tensor
    """[layers, positions, kv_heads, d], contiguous bf16; as `values`"""
    values: Tensor
    start: int
    tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class AttentionHalf:
    """A layer's weights, checked."""

    packed: bytes
    """As the kernel reads them (`struct half`)."""
    width: int
    kv_heads: int
    head_dim: int
    experts: int
    """0: there is no router."""
    held: HalfWeights
    """So that the memory stays."""

    @staticmethod
    def of(weights: HalfWeights, heads: int, kv_heads: int, eps: float) -> AttentionHalf | None:
        """None where our kernels don't take such weights: dtype, device or stride. Raises ValueError for shapes that
        don't fit each other.
        """
        *plain, router = weights
        fitting = all(_plain(tensor, torch.bfloat16) for tensor in plain if tensor is not None)
        if not fitting or (router is not None and not _plain(router, torch.float32)):
            return None
        outputs, width = weights.projection.shape
        head_dim = outputs // (heads + 2 * kv_heads)
        experts = 0 if router is None else router.shape[0]
        if head_dim > WIDEST_HEAD:
            return None
        _check_weights(weights, heads, kv_heads, head_dim, width, experts)
        sizes = width, heads, kv_heads, head_dim, experts
        packed = struct.pack("9P5q2d", *weights.places, *sizes, eps, head_dim**-0.5)
        return AttentionHalf(packed, width, kv_heads, head_dim, experts, weights)


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Where the keys and values of a forward's blocks go, one after the other; checked."""

    packed: bytes
    """As the kernel reads them (`struct place`)."""
    count: int
    tokens: int
    longest: int
    """Positions that one of them sees, at most."""
    shape: tuple[int, int, int]
    """Layers, key-value heads, and d."""
    held: Sequence[BlockPlace]

    @staticmethod
    def of(blocks: Sequence[BlockPlace]) -> Places | None:
        """None where our kernels don't take such keys and values, or there are no blocks. Raises ValueError for blocks
        that lie outside, or in caches of different shapes.
        """
        if not blocks or not all(_plain(tensor, torch.bfloat16) for one in blocks for tensor in one[:2]):
            return None
        layers, _positions, kv_heads, head_dim = blocks[0].keys.shape
        rows = []
        for keys, values, start, tokens in blocks:
            if keys.shape != values.shape or (keys.shape[0], *keys.shape[2:]) != (layers, kv_heads, head_dim):
                raise ValueError(
                    f"keys are {list(keys.shape)}, values {list(values.shape)}, wanted both "
                    f"[{layers}, positions, {kv_heads}, {head_dim}]"
                )
            if start < 0 or tokens < 1 or start + tokens > keys.shape[1]:
                raise ValueError(f"a block of {tokens} at {start} is not within {keys.shape[1]} positions")
            rows.append(struct.pack("2P3q", keys.data_ptr(), values.data_ptr(), keys[0].numel(), start, tokens))
        ends, tokens = [one.start + one.tokens for one in blocks], sum(one.tokens for one in blocks)
        return Places(b"".join(rows), len(rows), tokens, max(ends), (layers, kv_heads, head_dim), blocks)


def serves_half(hidden: Tensor) -> bool:
    """Whether `attention_half` computes on `hidden`: there is a kernel, it is contiguous bf16 [T, H] on the CPU, and
    gradients are off.
    """
    return (
        not torch.is_grad_enabled()
        and hidden.dim() == 2
        and _plain(hidden, torch.bfloat16)
        and status().variant is not None
    )


def attention_half(
    half: AttentionHalf,
    places: Places,
    layer: int,
    hidden: Tensor,
    angles: tuple[Tensor, Tensor],
    *,
    kernel: KernelStatus | None = None,
    threads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer up to its router, for `hidden` [T, H], the tokens of the blocks of `places`: the residual stream after
    attention and its norm, [T, H] bf16, and the router's logits [T, E] float32, [T, 0] without one.

    The same, bit for bit, as `rms_norm`, `linear`, `turn_heads`, `attention` of each block to what it sees of `layer`,
    `linear`, the sum, `rms_norm` and `router_logits` one by one. `angles`: cosines and sines [T, dims], contiguous
    bf16. The keys and values of all blocks are in their places afterwards.

    `kernel` defaults to `status()`, `threads` to torch's number. Raises ValueError for shapes, dtypes or strides that
    don't fit, or without a kernel; MemoryError.
    """
    kernel = kernel or status()
    number, library = kernel.number, kernel.library
    assert library is not None
    cos, sin = angles
    _check_call(half, places, layer, hidden, cos, sin)
    stream, normed = torch.empty_like(hidden), torch.empty_like(hidden)
    logits = torch.empty(places.tokens, half.experts, dtype=torch.float32)
    pointers = [tensor.data_ptr() for tensor in (cos, sin, hidden, stream, normed, logits)]
    sizes = (places.count, places.tokens, cos.shape[1])
    library.attention_half(number, threads, half.packed, layer, places.packed, sizes, *pointers)
    return stream, normed, logits


def _check_weights(weights: HalfWeights, heads: int, kv_heads: int, head_dim: int, width: int, experts: int) -> None:
    """Raises ValueError rather than read out of bounds."""
    outputs = (heads + 2 * kv_heads) * head_dim
    wanted: dict[str, tuple[int, ...]] = {
        "norm": (width,),
        "projection": (outputs, width),
        "projection_bias": (outputs,),
        "query_norm": (head_dim,),
        "key_norm": (head_dim,),
        "dense": (width, heads * head_dim),
        "dense_bias": (width,),
        "next_norm": (width,),
        "router": (experts, width),
    }
    for (name, shape), tensor in zip(wanted.items(), weights, strict=True):
        if tensor is not None and (tuple(tensor.shape) != shape or not tensor.numel()):
            raise ValueError(f"{name} is {list(tensor.shape)}, wanted {list(shape)}")
    if not kv_heads or heads % kv_heads or (weights.query_norm is None) != (weights.key_norm is None):
        raise ValueError(f"{heads} heads share {kv_heads} of keys, wanted a divisor, and norms of both or neither")


def _check_call(half: AttentionHalf, places: Places, layer: int, hidden: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raises ValueError rather than read or write out of bounds."""
    layers, *shape = places.shape
    if shape != [half.kv_heads, half.head_dim] or not 0 <= layer < layers:
        raise ValueError(
            f"layer {layer} of a cache of {layers}, its heads {shape}, wanted {[half.kv_heads, half.head_dim]} and a "
            "layer within"
        )
    if hidden.shape != (places.tokens, half.width) or not _plain(hidden, torch.bfloat16):
        raise ValueError(f"hidden is {_told(hidden)}, wanted contiguous bfloat16 [{places.tokens}, {half.width}]")
    dims = cos.shape[-1] if cos.dim() == 2 else 0
    angles_fit = _plain(cos, torch.bfloat16) and _plain(sin, torch.bfloat16) and cos.shape == sin.shape
    if not angles_fit or cos.shape[0] != places.tokens or dims % 2 or not 0 < dims <= half.head_dim:
        raise ValueError(
            f"angles are {_told(cos)} and {_told(sin)}, wanted contiguous bfloat16 [{places.tokens}, dims], dims even "
            f"and at most {half.head_dim}"
        )


def _plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype == dtype and tensor.is_cpu and tensor.is_contiguous()


def _told(tensor: Tensor) -> str:
    how = "" if tensor.is_contiguous() else ", not contiguous"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}{how}"
