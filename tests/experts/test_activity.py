"""Where experts are and which are used, as whoever watches sees it."""

from __future__ import annotations

import pytest

from offload_engine import Engine, SamplingParams
from offload_engine.experts.observe import ObservedExperts

PROMPT = "What is 37 + 58?"


@pytest.fixture(scope="module")
def engine():
    with Engine.from_pretrained(gpu_mem="4GB", expert_mem="2MB", threads=1, max_context=512) as engine:
        yield engine


def test_rows_say_where_every_expert_is(engine):
    engine.generate(PROMPT, SamplingParams(max_new_tokens=32))
    rows, slots = engine.activity.rows(), engine.occupancy()
    assert engine.activity.layers == [1, 2, 3]
    assert [len(row) for row in rows] == [256] * 3
    assert sum(row.count("r") for row in rows) == slots.resident > 0
    assert sum(row.count(".") for row in rows) == 3 * 256 - slots.resident - slots.loading


def test_uses_are_those_of_the_denoising_steps(engine):
    seen = set()

    def keep(info, layer, decision):
        if info.phase == "denoise":
            seen.update((layer, expert) for expert in decision.experts.unique().tolist() if expert >= 0)

    observed: ObservedExperts = engine._observed
    observed.watchers.append(keep)
    before = engine.activity.uses()
    with engine.activity.watching():
        engine.generate(PROMPT * 8, SamplingParams(max_new_tokens=64))  # long enough to be prefilled
    observed.watchers.remove(keep)
    counted = engine.activity.uses() - before
    assert seen == {(engine.activity.layers[row], expert) for row, expert in counted.nonzero().tolist()}
    assert engine.stats.forwards["prefill"] > 0


def test_nothing_is_counted_unwatched(engine):
    before = engine.activity.uses()
    engine.generate(PROMPT, SamplingParams(max_new_tokens=8))
    assert engine.activity.uses().equal(before)
    with engine.activity.watching(), engine.activity.watching():
        pass
    engine.generate(PROMPT, SamplingParams(max_new_tokens=8))
    assert engine.activity.uses().equal(before)


def test_uses_are_a_copy(engine):
    engine.activity.uses().fill_(-1)
    assert int(engine.activity.uses().min()) >= 0
