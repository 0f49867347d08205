"""Experts computed on the CPU straight from their stored weights, where a C library of ours is built and can run.

`expert_ffn` computes; `serves` says whether it would take such weights; `status` says what is in use and why.
"""

from __future__ import annotations

from offload_engine.kernels.ffn import Matrix, expert_ffn, serves
from offload_engine.kernels.library import KernelStatus, status

__all__ = ["KernelStatus", "Matrix", "expert_ffn", "serves", "status"]
