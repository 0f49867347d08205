"""What only a GPU can show: `python -m pytest tests/gpu`. Without one everything here is skipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
SKIP = pytest.mark.skip(reason="there is no CUDA device")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(SKIP)


@contextmanager
def never_waiting() -> Iterator[None]:
    """Whatever has the host wait for the device is an error, events excepted, which torch does not look out for."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
