"""`Engine` with device cuda, its GPU simulated: the same answers as on the CPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_engine import Engine, SamplingParams
from offload_engine.engine import assembly, placement, planning
from offload_engine.errors import DeviceError, MemoryBudgetError
from offload_engine.experts.device import executor
from offload_engine.experts.transfer import pinned
from tests.interrupts import Interrupt
from tests.model.graph_recorder import FakeRecorder
from tests.streams.engines import EmulatedSlots, WatchedExchange, WatchedHostExperts
from tests.streams.order import Fault
from tests.streams.simulator import SimulatedDevice, WatchedStore

PROMPT = "Anna has 37 apples. Tom gives her 58 more. How many apples does Anna have now?"
PARAMS = SamplingParams(max_new_tokens=64)


@dataclass
class SimulatedGpu:
    """As `Gpu`."""

    driver: SimulatedDevice
    has_bfloat16: bool = True
    size: int = 8 * 10**9
    device = torch.device("cpu")
    name = "NVIDIA Simulated"
    graphs: FakeRecorder = field(default_factory=FakeRecorder)

    def recorder(self) -> FakeRecorder:
        return self.graphs

    def context_bytes(self) -> int:
        return 300 * 10**6

    def reachable(self) -> int:
        return self.size

    def free(self) -> int:
        return self.size

    def reset_peak(self) -> None:
        self.driver.most_allocated = self.driver.allocated

    def peak(self) -> int:
        return 12345


@pytest.fixture(scope="module")
def on_cpu() -> dict[str, list[int]]:
    """Answers by routing."""
    answers = {}
    for routing in ("original", "dmoe"):
        with Engine.from_pretrained(gpu_mem="2GB", dtype="float32", routing=routing) as engine:
            answers[routing] = engine.generate(PROMPT, PARAMS).token_ids
    return answers


def on_gpu(monkeypatch: pytest.MonkeyPatch, device: SimulatedDevice, **options: Any) -> Engine:
    size, emulated = options.pop("size", SimulatedGpu.size), options.pop("emulated", False)
    opened, gpu = assembly.open_store, options.pop("gpu", None) or SimulatedGpu(device, size=size)
    monkeypatch.setattr(assembly, "find_gpu", lambda _config: gpu)
    monkeypatch.setattr(assembly, "open_store", lambda *given, **named: WatchedStore(opened(*given, **named), device))
    monkeypatch.setattr(placement, "HostExperts", WatchedHostExperts)
    monkeypatch.setattr(executor, "Exchange", lambda _driver: WatchedExchange(device))
    if emulated:
        monkeypatch.setattr(executor, "SlotExperts", lambda store, arena: EmulatedSlots(store, arena, device))
    settings = {"gpu_mem": "1GB", "dtype": "float32", "expert_mem": "4MB"} | options
    return Engine.from_pretrained(device="cuda", **settings)


@settings(max_examples=15)
@given(
    order=st.lists(st.integers(0, 7), min_size=1, max_size=24),
    expert_mem=st.sampled_from([100_000, 1_000_000, 4_000_000]),
    host_mem=st.sampled_from(["none", "auto", 12_000_000]),
    routing=st.sampled_from(["original", "dmoe"]),
    emulated=st.booleans(),
    cpu_experts=st.sampled_from(["off", "auto", 0.5]),
)
def test_answers_are_those_of_the_cpu_in_every_order(
    on_cpu: dict[str, list[int]],
    order: list[int],
    expert_mem: int,
    host_mem: str | int,
    routing: str,
    emulated: bool,
    cpu_experts: str | float,
) -> None:
    device = SimulatedDevice(order)
    with pytest.MonkeyPatch.context() as patch:
        options = {"expert_mem": expert_mem, "host_mem": host_mem, "routing": routing, "emulated": emulated}
        options["cpu_experts"] = cpu_experts
        with on_gpu(patch, device, **options) as engine:
            plan = engine.plan
            assert plan.device == "cuda"
            assert plan.slots < plan.all_experts, "experts have to move"
            assert {"none": 0, "auto": plan.all_experts}.get(str(host_mem), plan.host_slots) == plan.host_slots
            assert host_mem != 12_000_000 or 2 <= plan.host_slots < plan.all_experts
            assert engine.generate(PROMPT, PARAMS).token_ids == on_cpu[routing]
            assert engine.stats.misses > 0
            assert engine.stats.measured_peak_bytes == 12345
    device.check()


@pytest.mark.parametrize("emulated", [False, True])
@pytest.mark.parametrize("routing", ["original", "dmoe"])
def test_experts_that_miss_are_computed_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, on_cpu: dict[str, list[int]], routing: str, emulated: bool
) -> None:
    device = SimulatedDevice([1, 0])
    options = {"expert_mem": 100_000, "routing": routing, "predictor": "none", "emulated": emulated}
    with (
        on_gpu(monkeypatch, device, **options, cpu_experts=0.5) as engine,
        on_gpu(monkeypatch, device, **options) as plain,
    ):
        plan, without = engine.plan, plain.plan
        hidden, choices = engine.model_config.hidden_size, engine.model_config.num_experts_per_tok
        assert plan.staging - without.staging >= 64 * (hidden * 4 + choices * (hidden * 4 + 8)), "room on the device"
        assert plan.host_staging - without.host_staging >= plan.staging - without.staging + plan.slab_bytes
        assert engine.generate(PROMPT, PARAMS).token_ids == on_cpu[routing]
        first = engine.stats.computed_on_cpu
        assert first > 0
        assert engine.logits(PROMPT).equal(plain.logits(PROMPT))
        assert engine.stats.computed_on_cpu == first, "what only scores doesn't depend on what is resident"
        stats = engine.stats
        assert stats.hits + stats.late + stats.misses + stats.computed_on_cpu == stats.expert_requests
    device.check()


def test_without_a_host_tier_the_cpu_computes_nothing_and_a_notice_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimulatedDevice()
    with on_gpu(monkeypatch, device, cpu_experts="auto", host_mem="none") as engine:
        assert "cpu_experts is ignored: host_mem is none, so that no expert is in host memory" in engine.notices
        engine.generate(PROMPT, SamplingParams(max_new_tokens=32))
        assert engine.stats.computed_on_cpu == 0
    device.check()


def test_without_a_gpu_the_option_is_ignored_and_a_notice_says_so() -> None:
    with Engine.from_pretrained(gpu_mem="2GB", device="cpu", cpu_experts="auto") as engine:
        assert "cpu_experts is ignored: without a GPU the CPU computes every expert anyway" in engine.notices


@settings(max_examples=8)
@given(
    order=st.lists(st.integers(0, 7), min_size=1, max_size=24),
    host_mem=st.sampled_from(["none", "auto", 12_000_000]),
    routing=st.sampled_from(["original", "dmoe"]),
    emulated=st.booleans(),
    cpu_experts=st.sampled_from(["off", 0.5]),
    slots=st.lists(st.integers(2, 400), min_size=1, max_size=3),
)
def test_answers_are_those_of_the_cpu_before_and_after_a_resize(
    on_cpu: dict[str, list[int]],
    order: list[int],
    host_mem: str | int,
    routing: str,
    emulated: bool,
    cpu_experts: str | float,
    slots: list[int],
) -> None:
    device = SimulatedDevice(order)
    options = {"host_mem": host_mem, "routing": routing, "emulated": emulated, "cpu_experts": cpu_experts}
    with pytest.MonkeyPatch.context() as patch, on_gpu(patch, device, **options) as engine:
        first = engine.plan
        assert engine.generate(PROMPT, PARAMS).token_ids == on_cpu[routing]
        for number in slots:
            plan = engine.resize(expert_mem=number * first.slab_bytes)
            assert plan.slots == min(number, plan.all_experts) == sum(engine.occupancy()[:3])
            assert (plan.fixed, plan.context, plan.host_slots) == (first.fixed, first.context, first.host_slots)
            assert engine.stats.planned_peak_bytes == plan.total
            assert device.most_allocated == device.allocated, "the peak is that of the new plan"
            assert engine.generate(PROMPT, PARAMS).token_ids == on_cpu[routing]
    device.check()


def test_a_resize_takes_no_more_than_the_larger_budget(
    monkeypatch: pytest.MonkeyPatch, on_cpu: dict[str, list[int]]
) -> None:
    device = SimulatedDevice([1, 0, 2])
    with on_gpu(monkeypatch, device, routing="original", expert_mem="none", host_mem="auto") as engine:
        slab, fixed, whole = engine.plan.slab_bytes, engine.plan.fixed, engine.plan.all_experts
        beside = device.allocated - whole * slab
        monkeypatch.setattr(SimulatedGpu, "reset_peak", lambda _gpu: None)
        for slots, budget in ((whole // 2, fixed + whole * slab // 2), (whole, fixed + whole * slab), (9, None)):
            before, room = engine.plan.slots, max(engine.plan.budget, budget or 0) - fixed
            device.most_allocated = device.allocated
            plan = engine.resize(gpu_mem=budget, expert_mem=None if budget else slots * slab)
            assert plan.slots == slots
            both = (before + slots) * slab
            assert device.most_allocated == beside + (both if both <= room else max(before, slots) * slab)
            assert engine.generate(PROMPT, PARAMS).token_ids == on_cpu["original"]
    device.check()


def test_a_resize_that_is_refused_changes_nothing_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, on_cpu: dict[str, list[int]]
) -> None:
    device = SimulatedDevice([1, 0, 2])
    with on_gpu(monkeypatch, device, routing="original") as engine:
        plan, config, slab = engine.plan, engine.config, engine.plan.slab_bytes
        for options in ({"gpu_mem": "5MB"}, {"expert_mem": slab}):
            with pytest.raises(MemoryBudgetError, match=r"smallest budget|2 expert slots take"):
                engine.resize(**options)  # type: ignore[arg-type]
        device.size = device.allocated
        with pytest.raises(MemoryBudgetError, match="refused"):
            engine.resize(expert_mem=2 * plan.expert_slots)
        assert engine.plan is plan
        assert engine.config is config
        assert sum(engine.occupancy()[:3]) == plan.slots
        assert engine.generate(PROMPT, PARAMS).token_ids == on_cpu["original"]
        monkeypatch.setattr(planning, "available_memory", lambda: 10**6)
        assert engine.resize(expert_mem=plan.expert_slots // 2).slots == plan.slots // 2, "RAM is not asked for anew"
    device.check()


@pytest.mark.parametrize("first", [9, 40])
def test_an_interrupt_of_a_resize_leaves_plan_and_slots_in_agreement(
    monkeypatch: pytest.MonkeyPatch, on_cpu: dict[str, list[int]], first: int
) -> None:
    device = SimulatedDevice([1, 0, 2])
    found, at = set(), 3
    with on_gpu(monkeypatch, device, routing="original", emulated=True, predictor="none") as engine:
        slab, experts = engine.plan.slab_bytes, engine._parts.experts
        while True:
            engine.resize(expert_mem=first * slab)
            engine.logits(PROMPT)
            interrupt = Interrupt(lambda path: path.endswith(("adjusting.py", "resizing.py", "device/executor.py")), at)
            try:
                with interrupt.armed():
                    engine.resize(expert_mem=(49 - first) * slab)
            except KeyboardInterrupt:
                found.add(experts.arena.slots)
            else:
                break
            assert engine.plan.slots == experts.arena.slots == sum(engine.occupancy()[:3]) == engine.stats.slots
            assert engine.config.expert_mem == engine.plan.expert_slots
            assert engine.stats.planned_peak_bytes == engine.plan.total
            at += 2
            if at % 8 == 1:
                assert engine.generate(PROMPT, PARAMS).token_ids == on_cpu["original"]
        assert found == {9, 40}
        assert engine.plan.slots == 49 - first
        assert engine.generate(PROMPT, PARAMS).token_ids == on_cpu["original"]
    assert set(device.faults) <= {Fault.LEAK}


def test_recordings_outlive_a_resize(monkeypatch: pytest.MonkeyPatch) -> None:
    device, params = SimulatedDevice([2, 0, 1]), SamplingParams(max_new_tokens=32, threshold=0.9999)
    gpu = SimulatedGpu(device)
    with on_gpu(monkeypatch, device, routing="original", gpu=gpu) as engine:
        wanted = engine.generate(PROMPT, params).token_ids
        replays = gpu.graphs.replays
        assert replays > 0
        engine.resize(expert_mem="1MB")
        assert engine.generate(PROMPT, params).token_ids == wanted
        assert gpu.graphs.replays > replays
    device.check()


def test_attention_is_replayed_unless_nobody_wants_it(
    monkeypatch: pytest.MonkeyPatch, on_cpu: dict[str, list[int]]
) -> None:
    recorded = {}
    params = SamplingParams(max_new_tokens=64, threshold=0.9999)
    for choice in ("auto", "off"):
        device = SimulatedDevice([2, 0, 1])
        with on_gpu(monkeypatch, device, routing="original", cuda_graphs=choice) as engine:
            assert engine.generate(PROMPT, PARAMS).token_ids == on_cpu["original"]
            engine.generate(PROMPT, params)
            graphs, plan = engine._parts.graphs, engine.plan
            recorded[choice] = graphs is not None and graphs._recorder.replays, plan.workspace  # type: ignore[attr-defined]
        device.check()
    assert recorded["auto"][0] > 0
    assert recorded["off"][0] is False
    assert recorded["auto"][1] > recorded["off"][1], "recordings take memory"


def test_a_refusal_to_record_is_a_notice_or_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_new_tokens=64, threshold=0.9999)
    monkeypatch.setattr(SimulatedGpu, "recorder", lambda _gpu: FakeRecorder(most=0))
    with on_gpu(monkeypatch, SimulatedDevice()) as engine:
        engine.generate(PROMPT, params)
        assert any("CUDA refuses to record it" in notice for notice in engine.notices)
    with on_gpu(monkeypatch, SimulatedDevice(), cuda_graphs="on") as engine:
        with pytest.raises(DeviceError, match="cuda_graphs is on, but CUDA refuses"):
            engine.generate(PROMPT, params)
        engine.generate(PROMPT, params)  # plainly, from then on


def test_a_refusal_to_pin_is_a_notice_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimulatedDevice(pinning="code 2")
    with on_gpu(monkeypatch, device) as engine:
        assert any("refused to pin" in notice for notice in engine.notices)
    device.check()


def test_what_comes_up_in_use_joins_the_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "CHUNK_BYTES", 10**6)
    device = SimulatedDevice()
    with on_gpu(monkeypatch, device) as engine:
        before = engine.notices
        device.pinning = "code 2"
        engine.generate(PROMPT, PARAMS)
        (late,) = [notice for notice in engine.notices if notice not in before]
        assert "then refused (code 2)" in late
    device.check()


def test_a_card_smaller_than_asked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MemoryBudgetError, match="this GPU has only"):
        on_gpu(monkeypatch, SimulatedDevice(), size=310 * 10**6)


def test_ram_that_does_not_hold_the_host_tier_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "available_memory", lambda: 10**6)
    with pytest.raises(MemoryBudgetError, match=r"this machine has only 1000000 to give; set host_mem to at most that"):
        on_gpu(monkeypatch, SimulatedDevice(), host_mem="1GB")


def test_without_memory_for_the_host_tier_experts_come_from_disk(
    monkeypatch: pytest.MonkeyPatch, on_cpu: dict[str, list[int]]
) -> None:
    def refused(*_arguments: object) -> None:
        raise MemoryBudgetError("the system refused 5 bytes")

    device = SimulatedDevice()
    monkeypatch.setattr(placement, "HostTier", refused)
    with on_gpu(monkeypatch, device, routing="original") as engine:
        assert "there is no host tier, experts are read from disk: the system refused 5 bytes" in engine.notices
        assert engine.generate(PROMPT, PARAMS).token_ids == on_cpu["original"]
    device.check()


def test_a_gpu_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for name in ("cuda", "cuda:1"):
        with pytest.raises(DeviceError, match=f"device is '{name}', but torch finds no GPU here"):
            Engine.from_pretrained(device=name)
