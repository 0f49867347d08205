"""Engines to serve: one that answers, one that never comes to an end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from offload_engine.engine.engine import Engine
from tests.server.serving import Served, serving

BUDGET = {"gpu_mem": "4GB", "threads": 1, "max_context": 2048}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """The built-in model, with room for four answers at a time."""
    with Engine.from_pretrained(batch_size=4, **BUDGET) as engine:
        yield engine


@pytest.fixture(scope="module")
def served(engine: Engine) -> Iterator[Served]:
    """A server of it."""
    with serving(engine) as served:
        yield served


@pytest.fixture(scope="module")
def spare_engine() -> Iterator[Engine]:
    """Another one, for servers that a test starts itself: an engine belongs to one server at a time."""
    with Engine.from_pretrained(batch_size=2, **BUDGET) as engine:
        yield engine


@pytest.fixture(scope="module")
def endless_engine() -> Iterator[Engine]:
    """The built-in model with one place, whose answers end nowhere: its eos is the mask, which is never an answer."""
    with Engine.from_pretrained(eos_token_id=95, batch_size=1, **BUDGET) as engine:
        yield engine
