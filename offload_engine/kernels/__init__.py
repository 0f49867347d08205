"""Experts and linear layers computed on the CPU straight from their stored weights, where a C library of ours is built
and can run.

`expert_ffn` computes one expert, `experts_ffn` several at once, and `weighted_sum` adds up what they gave; `fits` and
`serves` say whether they would take such weights. `linear` is a layer of its own, if `serves_linear` says so. `status`
says what is in use and why.
"""

from __future__ import annotations

from offload_engine.kernels.dense import linear, serves_linear
from offload_engine.kernels.ffn import Expert, Matrix, expert_ffn, experts_ffn, fits, serves, weighted_sum
from offload_engine.kernels.library import KernelStatus, status

__all__ = [
    "Expert",
    "KernelStatus",
    "Matrix",
    "expert_ffn",
    "experts_ffn",
    "fits",
    "linear",
    "serves",
    "serves_linear",
    "status",
    "weighted_sum",
]
