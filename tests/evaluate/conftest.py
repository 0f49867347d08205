"""The built-in model, loaded once for the tests that only ask it things."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from offload_engine.engine.engine import Engine


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    with Engine.from_pretrained(gpu_mem="4GB", max_context=512, routing="original") as loaded:
        yield loaded
