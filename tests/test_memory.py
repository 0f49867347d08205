from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload_engine.config import format_bytes
from offload_engine.errors import ConfigError, MemoryBudgetError
from offload_engine.memory import (
    MIN_SLOTS,
    MemoryPlan,
    Setup,
    auto_budget,
    estimated_slab_bytes,
    plan_memory,
    score_bytes,
    smallest_budget,
)
from offload_engine.memory.footprint import GEMM_SCRATCH_BYTES
from offload_engine.model.config import ModelConfig
from offload_engine.model.weights import resident_nbytes
from tests.mini_config import mini

GB = 10**9


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    layers = draw(st.integers(1, 6))
    return mini(
        vocab_size=draw(st.integers(8, 5000)),
        hidden_size=draw(st.integers(1, 128)) * 2,
        intermediate_size=draw(st.integers(1, 300)),
        moe_intermediate_size=draw(st.integers(1, 100)),
        num_hidden_layers=layers,
        first_k_dense_replace=draw(st.integers(0, layers)),
        num_key_value_heads=draw(st.integers(1, 2)),
        num_attention_heads=draw(st.integers(1, 3)) * 2,
        head_dim=draw(st.integers(1, 16)) * 4,
        num_experts=draw(st.integers(1, 12)),
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        num_shared_experts=draw(st.integers(0, 2)),
        max_position_embeddings=draw(st.integers(1, 20_000)),
        tie_word_embeddings=draw(st.booleans()),
        moe_router_enable_expert_bias=draw(st.booleans()),
        use_qkv_bias=draw(st.booleans()),
        use_bias=draw(st.booleans()),
        use_qk_norm=draw(st.booleans()),
    )


setups = st.builds(
    Setup,
    device=st.sampled_from(["cpu", "cuda"]),
    itemsize=st.sampled_from([2, 4]),
    stored_itemsize=st.sampled_from([1, 2, 4]),
    slab_bytes=st.none() | st.integers(1, 10**7),
    max_block=st.integers(1, 128),
    prefill_chunk=st.integers(1, 1024),
    choices=st.none() | st.integers(1, 8),
    runtime_bytes=st.none() | st.integers(0, GB),
    transfers_in_flight=st.integers(1, 2),
)
contexts = st.none() | st.integers(1, 20_000)


def first_line(refusal: pytest.ExceptionInfo[MemoryBudgetError]) -> str:
    return str(refusal.value).splitlines()[0]


@given(configs(), setups, contexts, st.integers(0, 4 * GB))
def test_total_is_the_sum_of_its_parts_and_within_the_budget(
    config: ModelConfig, setup: Setup, context: int | None, extra: int
) -> None:
    plan = plan_memory(config, setup, smallest_budget(config, setup, max_context=context) + extra, max_context=context)
    parts = [plan.weights, plan.kv_cache, plan.workspace, plan.staging, plan.runtime, plan.slots * plan.slab_bytes]
    assert min(parts) >= 0
    assert sum(parts) == plan.total == plan.budget - plan.spare
    assert plan.total <= plan.budget
    every = len(config.moe_layers) * config.num_experts
    assert min(MIN_SLOTS, every) <= plan.slots <= every == plan.all_experts
    assert plan.slots == every or plan.spare < plan.slab_bytes
    assert plan.context <= config.max_position_embeddings
    assert plan.kv_positions >= plan.context


@given(configs(), setups)
def test_weights_are_what_loading_allocates(config: ModelConfig, setup: Setup) -> None:
    plan = plan_memory(config, setup, 100 * GB)
    dtype = {2: torch.bfloat16, 4: torch.float32}[setup.itemsize]
    assert plan.weights + plan.host_embedding == resident_nbytes(config, dtype)


@given(configs(), setups, contexts)
def test_the_smallest_budget_is_exact(config: ModelConfig, setup: Setup, context: int | None) -> None:
    smallest = smallest_budget(config, setup, max_context=context)
    assert plan_memory(config, setup, smallest, max_context=context).total <= smallest
    with pytest.raises(MemoryBudgetError) as refusal:
        plan_memory(config, setup, smallest - 1, max_context=context)
    assert f"({smallest} bytes)" in first_line(refusal)
    assert refusal.value.exit_code == 4


@given(configs(), setups, st.integers(1, 20_000), st.integers(0, 10**8), st.integers(0, 10**8))
def test_a_larger_budget_never_has_fewer_slots(
    config: ModelConfig, setup: Setup, context: int, extra: int, more: int
) -> None:
    budget = smallest_budget(config, setup, max_context=context) + extra
    fewer = plan_memory(config, setup, budget, max_context=context)
    assert plan_memory(config, setup, budget + more, max_context=context).slots >= fewer.slots
    assert replace(fewer, budget=0, reasons={}) == replace(
        plan_memory(config, setup, fewer.total, max_context=context), budget=0, reasons={}
    ), "what a plan doesn't use, it doesn't need"


@given(configs(), setups, st.integers(0, 4 * GB))
def test_an_undecided_context_never_costs_the_run(config: ModelConfig, setup: Setup, extra: int) -> None:
    plan = plan_memory(config, setup, smallest_budget(config, setup) + extra)
    start = min(4096, config.max_position_embeddings)
    assert start <= plan.context <= config.max_position_embeddings
    if plan.context > start:
        per_position = plan.kv_cache // plan.kv_positions
        assert plan.context * per_position <= plan.budget // 50
        assert plan.context % 32 == 0 or plan.context == config.max_position_embeddings


@given(configs(), setups, st.integers(1, 20_000), st.integers(1, 10**9))
def test_a_refusal_offers_a_context_that_fits(config: ModelConfig, setup: Setup, context: int, short: int) -> None:
    budget = smallest_budget(config, setup, max_context=context) - short
    with pytest.raises(MemoryBudgetError) as refusal:
        plan_memory(config, setup, budget, max_context=context)
    offered = re.search(r"max_context to at most (\d+)$", first_line(refusal))
    shortest = smallest_budget(config, setup, max_context=1)
    if offered is None:
        assert shortest > budget or config.max_position_embeddings < max(setup.max_block, 32)
    else:
        assert plan_memory(config, setup, budget, max_context=int(offered[1])).total <= budget


@given(configs(), setups, st.integers(0, 10**8))
def test_expert_mem_caps_the_slots_alone(config: ModelConfig, setup: Setup, expert_mem: int) -> None:
    free = plan_memory(config, setup, 100 * GB)
    if expert_mem < min(MIN_SLOTS, free.all_experts) * free.slab_bytes:
        with pytest.raises(MemoryBudgetError, match=r"^expert_mem is .* bytes\); set expert_mem to at least that"):
            plan_memory(config, setup, 100 * GB, expert_mem=expert_mem)
        return
    capped = plan_memory(config, setup, 100 * GB, expert_mem=expert_mem)
    assert capped.slots == min(free.slots, expert_mem // capped.slab_bytes)
    assert capped.fixed == free.fixed


@given(configs(), setups, st.integers(0, 10**9))
def test_the_host_tier_keeps_to_its_own_budget(config: ModelConfig, setup: Setup, host_mem: int) -> None:
    setup = replace(setup, device="cuda")
    bare = plan_memory(config, setup, 100 * GB)
    assert (bare.host_slots, bare.host_budget) == (0, None)
    least = bare.host_total + min(MIN_SLOTS, bare.all_experts) * bare.slab_bytes
    if host_mem < least:
        with pytest.raises(MemoryBudgetError, match=rf"^host_mem is .*\({least} bytes\)"):
            plan_memory(config, setup, 100 * GB, host_mem=host_mem)
        return
    plan = plan_memory(config, setup, 100 * GB, host_mem=host_mem)
    assert plan.host_total == plan.host_embedding + plan.host_staging + plan.host_slots * plan.slab_bytes <= host_mem
    assert plan.host_slots == plan.all_experts or host_mem - plan.host_total < plan.slab_bytes
    assert plan.total == bare.total, "what is on the host costs no fast memory"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("gigabytes", [6, 8, 12, 16, 24])
def test_llada2_mini_plans_sensibly(device: Any, gigabytes: int) -> None:
    plan = plan_memory(mini(), Setup(device=device), gigabytes * GB)
    assert plan.all_experts == 4864
    assert 4096 <= plan.context <= 16384
    assert 0.99 * plan.budget < plan.total <= plan.budget
    assert plan.expert_slots > plan.budget // 2
    assert plan.slots_per_layer == pytest.approx(plan.slots / 19)


def test_llada2_mini_against_published_numbers() -> None:
    on_cpu, on_card = (plan_memory(mini(), Setup(device=kind), 100 * GB, max_context=4096) for kind in ("cpu", "cuda"))
    assert on_cpu.weights == pytest.approx(1.9e9, rel=0.03), "everything but routed experts (REFERENCE §1)"
    assert on_cpu.expert_slots == pytest.approx(30.6e9, rel=0.01)
    assert on_cpu.kv_cache == 20 * 2 * 4 * 128 * 4096 * 2
    table = 157184 * 2048 * 2
    assert on_cpu.weights - on_card.weights == table == on_card.host_embedding
    assert on_cpu.host_total == on_cpu.staging == 0


def test_a_model_that_fits_takes_what_it_needs_and_no_more() -> None:
    small = mini(hidden_size=64, vocab_size=512, num_hidden_layers=2, moe_intermediate_size=16, num_experts=16)
    plan = plan_memory(small, Setup(device="cpu", runtime_bytes=250_000_000), 8 * GB)
    assert plan.slots == plan.all_experts == 16
    assert plan.total < 450_000_000
    assert plan.spare > 7 * GB
    assert "every expert has its slot" in plan.table()


def test_tied_embeddings_are_counted_once() -> None:
    table = 157184 * 2048 * 2
    for device in ("cpu", "cuda"):
        setup = Setup(device=device)  # type: ignore[arg-type]
        own, tied = plan_memory(mini(), setup, 24 * GB), plan_memory(mini(tie_word_embeddings=True), setup, 24 * GB)
        everywhere = [plan.weights + plan.host_embedding for plan in (own, tied)]
        assert everywhere[0] - everywhere[1] == table
        assert tied.host_embedding == 0


def test_the_dtype_matters_for_weights_and_slots_apart() -> None:
    narrow = plan_memory(mini(), Setup(device="cpu", itemsize=2, stored_itemsize=1), 8 * GB, max_context=4096)
    stored = plan_memory(mini(), Setup(device="cpu", itemsize=2), 8 * GB, max_context=4096)
    wide = plan_memory(mini(), Setup(device="cpu", itemsize=4), 24 * GB, max_context=4096)
    assert narrow.slots > 1.95 * stored.slots, "an int8 cache holds twice the experts"
    assert wide.slab_bytes == stored.slab_bytes, "slots hold the stored format"
    routers = 19 * 256 * 2049 * 4
    assert wide.weights - routers == 2 * (stored.weights - routers), "routers are float32 whatever the dtype"


def test_larger_forwards_need_more_workspace() -> None:
    def workspace(**changes: Any) -> int:
        return plan_memory(mini(), Setup(device="cuda", **changes), 24 * GB, max_context=8192).workspace

    assert workspace(prefill_chunk=256) < workspace() < workspace(prefill_chunk=1024)
    assert workspace() < workspace(max_block=256)
    assert workspace(prefill_chunk=1) == workspace(prefill_chunk=32), "whole blocks"
    assert workspace(prefill_chunk=10**6) == workspace(prefill_chunk=8192), "no forward exceeds the context"
    assert plan_memory(mini(), Setup(device="cpu", choices=64), 24 * GB).workspace > workspace(prefill_chunk=32) // 4


def test_a_batch_costs_little_but_its_caches() -> None:
    """The logits of 32 positions take 191 MB at a time, however many sequences there are."""
    plans = [plan_memory(mini(), Setup(device="cpu", sequences=count), 8 * GB, max_context=160) for count in (1, 8)]
    assert plans[1].kv_cache == 8 * plans[0].kv_cache
    assert plans[1].workspace - plans[0].workspace < 10_000_000
    assert 0 < plans[0].slots - plans[1].slots < 10


def test_estimated_slab_bytes() -> None:
    assert estimated_slab_bytes(mini(), 2) == 3 * 2048 * 512 * 2 + 8192
    assert estimated_slab_bytes(mini(hidden_size=6, moe_intermediate_size=1), 2) == 3 * 4096


def test_scoring_a_sequence_grows_with_it() -> None:
    setup = Setup(device="cpu")
    logits = 157184 * (2 + 4)
    assert score_bytes(mini(), setup, 2000) - score_bytes(mini(), setup, 1000) > 1000 * logits
    assert score_bytes(mini(), setup, 10) > 10 * logits


def test_the_refusal_shows_the_table() -> None:
    with pytest.raises(MemoryBudgetError) as refusal:
        plan_memory(mini(), Setup(device="cpu"), 2 * GB)
    head, _, table = str(refusal.value).partition("\n\n")
    smallest = smallest_budget(mini(), Setup(device="cpu"))
    assert head.startswith("gpu_mem is 2.00 GB, but the smallest budget for a context of 4096 and 2 expert slots is ")
    assert f"{format_bytes(smallest, round_up=True)} ({smallest} bytes)" in head
    assert "\n" not in head
    assert sizes_in(table)["short by"] == format_bytes(smallest - 2 * GB)
    assert "2 of 4864 experts" in table


def test_a_context_that_is_too_long_for_the_budget_has_a_way_out() -> None:
    with pytest.raises(MemoryBudgetError, match=r"or max_context to at most 3872\n"):
        plan_memory(mini(), Setup(device="cpu"), 2_720_000_000, max_context=16384)


def test_the_context_is_cut_to_what_the_model_has_with_a_warning() -> None:
    plan = plan_memory(mini(), Setup(device="cpu"), 8 * GB, max_context=99_999)
    assert plan.context == 16384
    assert plan.warnings == ("max_context is 99999, but this model has 16384 positions",)
    assert "warning: max_context is 99999" in plan.table()
    with pytest.raises(ConfigError, match="max_context is 0, wanted at least 1"):
        plan_memory(mini(), Setup(device="cpu"), 8 * GB, max_context=0)


def test_a_budget_beyond_the_machine() -> None:
    setup = Setup(device="cpu")
    with pytest.raises(MemoryBudgetError) as refusal:
        plan_memory(mini(), setup, 16 * GB, machine_limit=12 * GB)
    assert "this machine has only 12.0 GB to give; set gpu_mem to at most 12000000000 bytes" in first_line(refusal)
    assert plan_memory(mini(), setup, 12 * GB, machine_limit=12 * GB).warnings == ()
    with pytest.raises(MemoryBudgetError, match="this model needs at least"):
        plan_memory(mini(), setup, 16 * GB, machine_limit=GB)
    small = mini(num_hidden_layers=2, vocab_size=1000)
    plan = plan_memory(small, setup, 64 * GB, machine_limit=16 * GB)
    assert "gpu_mem is 64.0 GB, but this machine has only 16.0 GB" in plan.warnings[0]


def test_a_cpu_has_no_host_tier() -> None:
    with pytest.raises(ConfigError, match="no host tier on a CPU-only machine"):
        plan_memory(mini(), Setup(device="cpu"), 8 * GB, host_mem=GB)


def sizes_in(table: str) -> dict[str, str]:
    rows = (re.match(r"(\S.*?)  +(\S+ [KMGT]?B)( |$)", line) for line in table.splitlines())
    return {row[1]: row[2] for row in rows if row}


def test_the_table_says_what_the_plan_says() -> None:
    plan = plan_memory(mini(), Setup(device="cuda"), 8 * GB, host_mem=24 * GB)
    shown = sizes_in(plan.table())
    wanted = {
        "weights": plan.weights,
        "KV cache": plan.kv_cache,
        "workspace": plan.workspace,
        "staging": plan.staging,
        "runtime": plan.runtime,
        "expert slots": plan.expert_slots,
        "total": plan.total,
        "budget": plan.budget,
        "spare": plan.spare,
        "embedding table": plan.host_embedding,
        "bounce buffers": plan.host_staging,
        "host slots": plan.host_slots * plan.slab_bytes,
        "host total": plan.host_total,
        "host budget": 24 * GB,
    }
    assert shown == {name: format_bytes(size) for name, size in wanted.items()}
    assert f"{plan.slots} of 4864 experts x 6.30 MB, {plan.slots_per_layer:.1f} per MoE layer" in plan.table()
    on_cpu = sizes_in(plan_memory(mini(), Setup(device="cpu"), 8 * GB).table())
    assert set(on_cpu) == set(list(wanted)[:9]) - {"staging"}


def test_the_runtime_row_tells_a_measurement_from_an_estimate() -> None:
    estimate = plan_memory(mini(), Setup(device="cpu"), 8 * GB)
    measured = plan_memory(mini(), Setup(device="cpu", runtime_bytes=123_000_000), 8 * GB)
    assert "estimated" in estimate.table()
    assert "measured" in measured.table()
    assert measured.runtime == 123_000_000


def test_as_dict_is_complete_and_plain() -> None:
    plan: MemoryPlan = plan_memory(mini(), Setup(device="cuda"), 8 * GB)
    numbers = plan.as_dict()
    assert numbers["total"] == plan.total
    assert numbers["slots_per_layer"] == plan.slots_per_layer
    assert {"weights", "kv_cache", "workspace", "staging", "runtime", "expert_slots", "spare"} <= numbers.keys()
    assert all(isinstance(value, int | float | str | list | None) for value in numbers.values())


@pytest.mark.parametrize(("kind", "share"), [("cpu", 0.8), ("cuda", 0.9), ("host", 0.6)])
def test_auto_budget(kind: Any, share: float) -> None:
    assert auto_budget(10**10, kind) == share * 10**10
    assert auto_budget(-5, kind) == 0


@pytest.mark.parametrize("itemsize", [2, 4])
def test_recordings_of_steps_are_planned_for_on_a_gpu_that_makes_them(itemsize: int) -> None:
    config = mini()
    plain, recording = (
        plan_memory(config, Setup(device="cuda", itemsize=itemsize, step_graphs=graphs), 8 * 10**9)
        for graphs in (False, True)
    )
    extra = recording.workspace - plain.workspace
    tokens, layers = 32, len(config.moe_layers)
    outputs = tokens * (2 * config.hidden_size * itemsize + 4 * config.num_experts)
    assert extra > layers * outputs + GEMM_SCRATCH_BYTES["cuda"], "what every layer keeps, and the library's buffers"
    assert extra < plain.workspace, "a step is smaller than a prefill"
    assert recording.total <= recording.budget
    assert "recordings of attention" in recording.table()
    assert "recordings" not in plain.table()
