"""Files read past the page cache; what stores make of them is in `tests/contracts/store_contract.py`."""

from __future__ import annotations

import pytest

from offload_engine.disk_file import align_down, align_up


@pytest.mark.parametrize(("offset", "down", "up"), [(0, 0, 0), (1, 0, 4096), (4095, 0, 4096), (4096, 4096, 4096)])
def test_alignment(offset: int, down: int, up: int) -> None:
    assert align_down(offset) == down
    assert align_up(offset) == up
