"""The grouped kernels in Triton's interpreter, on CPU tensors.

Collected where TRITON_INTERPRET is 1, which must be so before anything imports Triton: `tests/kernels/test_grouped.py`
has them run in a process of their own.
"""

from __future__ import annotations

from tests.contracts.grouped_contract import GroupedContract


class TestInterpreted(GroupedContract):
    DEVICE = "cpu"
