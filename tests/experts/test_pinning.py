from __future__ import annotations

from itertools import pairwise

import pytest

from offload_engine.experts.transfer import pinning
from offload_engine.experts.transfer.pinning import register, unregister

UNIT = 3 * 4096


class Runtime:
    """The two calls of the CUDA runtime; refuses the call number `refuses`."""

    def __init__(self, refuses: int | None = None) -> None:
        self.refuses = refuses
        self.calls = 0
        self.held: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802 (its name)
        assert flags == 0
        assert nbytes > 0
        self.calls += 1
        if self.calls - 1 == self.refuses:
            return 2
        assert all(address + nbytes <= start or end <= address for start, end in self.held.items())
        self.held[address] = address + nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.held[address]
        return 0


@pytest.mark.parametrize("units", [1, 7, 8, 20])
def test_exactly_what_is_there_is_registered_in_chunks_of_whole_units(
    monkeypatch: pytest.MonkeyPatch, units: int
) -> None:
    monkeypatch.setattr(pinning, "CHUNK_BYTES", 100_000)
    runtime = Runtime()
    assert register(4096, units * UNIT, UNIT, runtime) is None
    spans = sorted(runtime.held.items())
    assert (spans[0][0], spans[-1][1]) == (4096, 4096 + units * UNIT)
    assert all(end == start for (_, end), (start, _) in pairwise(spans))
    assert all((end - start) % UNIT == 0 and end - start <= 100_000 for start, end in spans)
    unregister(4096, units * UNIT, UNIT, runtime)
    assert not runtime.held


def test_a_unit_larger_than_a_chunk_is_registered_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinning, "CHUNK_BYTES", 4096)
    runtime = Runtime()
    assert register(0, 2 * UNIT, UNIT, runtime) is None
    assert runtime.held == {0: UNIT, UNIT: 2 * UNIT}


def test_a_refusal_takes_back_what_was_registered_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinning, "CHUNK_BYTES", UNIT)
    runtime = Runtime(refuses=2)
    refusal = register(4096, 5 * UNIT, UNIT, runtime)
    assert refusal is not None
    assert f"{5 * UNIT} bytes failed after {2 * UNIT}" in refusal
    assert refusal.endswith("2")
    assert not runtime.held
