"""The likeliest token of each row of logits, and its probability, through the C kernels: the checks, and the call."""

from __future__ import annotations

import torch
from torch import Tensor

from offload_engine.kernels.library import KernelStatus, status


def serves_likeliest(logits: Tensor) -> bool:
    """Whether `likeliest` computes these: there is a kernel, `logits` are contiguous float32 on the CPU, and nobody
    wants a gradient. Shapes are not looked at.
    """
    if status().variant is None or not _fits(logits):
        return False
    return not (torch.is_grad_enabled() and logits.requires_grad)


def likeliest(
    logits: Tensor, barred: int, *, kernel: KernelStatus | None = None, threads: int | None = None
) -> tuple[Tensor, Tensor]:
    """Of `logits` [n, vocab], contiguous float32, each row's largest but for the token `barred`, ties to the lower
    token: tokens [n] int64, and their probabilities [n] float32 in the softmax of the whole row. A probability is NaN
    where a logit is NaN or +inf, or all are -inf.

    A row is read once; powers are summed in float32, 1024 at a time, and those sums in double. What a row gives depends
    neither on the rows beside it nor on `threads` (default: torch's number).

    `kernel` defaults to `status()`. Raises ValueError for shapes, dtypes or strides that don't fit, or without one.
    """
    kernel = kernel or status()
    number, library = kernel.number, kernel.library
    assert library is not None
    if not _fits(logits) or logits.dim() != 2 or not logits.shape[1] or not 0 <= barred < logits.shape[1]:
        told = f"{str(logits.dtype).removeprefix('torch.')} {list(logits.shape)} on {logits.device}"
        raise ValueError(
            f"logits are {told} and token {barred} barred, wanted contiguous float32 [n, vocab] on the CPU and a token"
            " below vocab"
        )
    rows, count = logits.shape
    tokens, probabilities = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    pointers = (logits.data_ptr(), tokens.data_ptr(), probabilities.data_ptr())
    library.likeliest(number, threads, (rows, count, barred), *pointers)
    return tokens, probabilities


def _fits(logits: Tensor) -> bool:
    return logits.dtype == torch.float32 and logits.is_cpu and logits.is_contiguous()
