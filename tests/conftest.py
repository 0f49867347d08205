"""One thread per test process and whatever it starts: the machine's cores are few, and a spinning thread pool slows all
else down. Tests of several threads say how many.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from offload_engine.engine import assembly
from offload_engine.experts.executor import OffloadedExperts
from offload_engine.kernels import library

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a run in the background, whose children would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")


@pytest.fixture
def torch_computes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Experts are computed by torch, as where our kernel isn't built."""
    monkeypatch.setenv(library.CHOICE, "off")
    library.status.cache_clear()
    yield
    library.status.cache_clear()


@pytest.fixture(autouse=True)
def conserved_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever closes an executor learns whether free + loading + resident slots are still all of them."""
    close = OffloadedExperts.close

    def checked(experts: OffloadedExperts) -> None:
        close(experts)
        experts.scheduler.cache.check()

    monkeypatch.setattr(OffloadedExperts, "close", checked)


@pytest.fixture(autouse=True)
def cold_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test counts may not depend on which experts the test before it used most."""
    monkeypatch.setattr(assembly, "keeps_hot_set", lambda _config: False)
