"""The grouped kernels in Triton's interpreter: `tests/kernels/test_triton_kernels.py` runs these in a process of its own."""

from __future__ import annotations

import pytest

from tests.contracts.grouped_contract import GroupedContract
from tests.triton.conftest import INTERPRETING

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="runs where TRITON_INTERPRET is 1 and Triton is there")


class TestInterpreted(GroupedContract):
    DEVICE = "cpu"
