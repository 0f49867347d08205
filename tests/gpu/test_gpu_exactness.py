"""Offloaded equals resident, bit for bit, on the GPU: whole answers, and single layers against the oracle."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_engine.core import ExpertKey, ForwardInfo, Phase, RoutingDecision, SamplingParams
from offload_engine.engine.engine import Engine
from offload_engine.errors import InternalError
from offload_engine.experts import arena as arenas
from offload_engine.experts.cpu_experts import ForwardShape, HostExperts
from offload_engine.experts.device.executor import DeviceExperts
from offload_engine.experts.observe import ObservedExperts
from offload_engine.experts.scheduling.cache import ExpertCache
from offload_engine.experts.scheduling.cpu_rates import LearnedRates
from offload_engine.experts.scheduling.eviction import EVICTION, make_eviction
from offload_engine.experts.scheduling.predictor import make_predictor
from offload_engine.experts.scheduling.scheduler import ExpertScheduler
from offload_engine.experts.scheduling.sharing import Rates
from offload_engine.experts.storage.conversion import Kind, convert
from offload_engine.experts.storage.opening import open_store
from offload_engine.experts.storage.store import ExpertStore, load_all
from offload_engine.experts.transfer.host_tier import HostTier
from offload_engine.kernels import grouped
from offload_engine.metrics import EngineStats
from offload_engine.model.checkpoint import Checkpoint
from offload_engine.model.config import ModelConfig
from offload_engine.model.moe import ExpertWeights, ResidentExperts
from tests.checkpoints import tiny_config, write_checkpoint
from tests.gpu.conftest import never_waiting
from tests.grouped_layers import EPSILON, random_decision, to_device

transfers = pytest.importorskip("offload_engine.experts.transfer.cuda")
drivers = pytest.importorskip("offload_engine.experts.transfer.cuda_driver")

CONFIG = tiny_config(hidden_size=64, moe_intermediate_size=32, num_experts=32, num_hidden_layers=4)
PROMPT = list(range(5, 90))
PARAMS = SamplingParams(max_new_tokens=64, threshold=0.2)
BUDGET = "2GB"
KINDS: dict[str, tuple[torch.dtype, Kind | None]] = {
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "bf16-int8": (torch.bfloat16, "int8"),
    "bf16-int4": (torch.bfloat16, "int4"),
}


@pytest.fixture(scope="module", params=list(KINDS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dtype, kind = KINDS[request.param]
    folder = tmp_path_factory.mktemp("gpu")
    source = write_checkpoint(folder / "source", CONFIG, dtype=dtype)
    return source if kind is None else convert(source, folder / kind, kind, identity="one").directory


@pytest.fixture(params=["auto", "off"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, cuda: torch.device) -> Iterator[str]:
    """By our kernels, and by torch."""
    monkeypatch.setenv(grouped.CHOICE, request.param)
    grouped.why_not.cache_clear()
    yield request.param
    grouped.why_not.cache_clear()


def engine(directory: Path, **options: Any) -> Engine:
    return Engine.from_pretrained(directory, **{"gpu_mem": BUDGET, "device": "cuda", "min_experts": 6, **options})


@pytest.mark.parametrize("routing", ["original", "dmoe"])
def test_answers_do_not_depend_on_what_is_resident(checkpoint: Path, routing: str, kernels: str) -> None:
    with engine(checkpoint, routing=routing) as whole:
        assert whole.plan.slots == whole.plan.all_experts
        expected, logits = whole.generate(PROMPT, PARAMS).token_ids, whole.logits(PROMPT)
        slab = whole.plan.slab_bytes
    for slots, eviction, predictor in (
        (2, "lru", "none"),
        (9, "score-aware", "previous-step"),
        (30, "lfu", "combined"),
    ):
        few = {"expert_mem": slots * slab, "eviction": eviction, "predictor": predictor}
        with engine(checkpoint, routing=routing, **few) as small:
            assert small.plan.slots == slots
            assert small.generate(PROMPT, PARAMS).token_ids == expected
            assert torch.equal(small.logits(PROMPT), logits)
            assert small.stats.misses > 0


def test_logits_are_near_those_of_the_cpu(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", CONFIG)
    with engine(directory, dtype="float32") as gpu, engine(directory, dtype="float32", device="cpu") as cpu:
        found, wanted = gpu.logits(PROMPT).cpu(), cpu.logits(PROMPT)
    assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max()


class Layers:
    """The experts of a checkpoint, and an oracle that has all of them on the GPU."""

    def __init__(self, directory: Path, device: torch.device) -> None:
        config = ModelConfig.from_dict(CONFIG)
        self.device = device
        self.store: ExpertStore = open_store(config, Checkpoint.open(directory))
        self.dtype = self.store.format.dtype
        hosted = load_all(self.store, self.store.keys())
        kept = {
            key: ExpertWeights(*(to_device(matrix, str(device)) for matrix in hosted(*key)))
            for key in self.store.keys()  # noqa: SIM118 (a store is no mapping)
        }
        self.resident = ResidentExperts(lambda layer, expert: kept[ExpertKey(layer, expert)])

    def offloaded(self, slots: int, eviction: str, host: HostTier | None = None) -> DeviceExperts:
        driver = drivers.CudaDriver(self.device)
        arena = arenas.DeviceArena(slots, self.store.slab_bytes, driver.allocate)
        return DeviceExperts(
            store=self.store,
            arena=arena,
            transfers=transfers.CudaTransfers(self.store, arena, driver, host=host),
            scheduler=ExpertScheduler(ExpertCache(slots, make_eviction(eviction)), 2),
            predictor=make_predictor("previous-step"),
            stats=EngineStats(),
        )

    def shared(self, slots: int, share: float) -> DeviceExperts:
        """The CPU computes this share of the missing experts, from a host tier that holds everything."""
        driver = drivers.CudaDriver(self.device)
        host = HostTier(driver, 96, self.store.slab_bytes)
        experts = self.offloaded(slots, "lru", host)
        shape = ForwardShape(tokens=20, choices=4, hidden=64, itemsize=self.dtype.itemsize)
        experts.cpu = HostExperts(driver, host, self.store, shape, share, LearnedRates(Rates.unknown()))
        return experts

    def steps(self, count: int) -> Iterator[tuple[int, int, torch.Tensor, RoutingDecision]]:
        """Step, layer, tokens and where they go."""
        generator = torch.Generator().manual_seed(0)
        for step in range(count):
            for layer in (1, 2, 3):
                hidden = torch.randn(20, 64, generator=generator).to(self.device, self.dtype)
                decision = random_decision(20, 4, 32, 0.2, generator)
                yield (
                    step,
                    layer,
                    hidden,
                    RoutingDecision(decision.experts.to(self.device), decision.weights.to(self.device)),
                )


def test_a_layer_that_is_here_makes_the_host_wait_for_its_record_alone(checkpoint: Path, cuda: torch.device) -> None:
    """Whatever else waits for the device is an error; the record's events are not among what torch looks out for."""
    if grouped.why_not(cuda) is not None:
        pytest.skip(str(grouped.why_not(cuda)))
    layers = Layers(checkpoint, cuda)
    experts = layers.offloaded(96, "lru")
    watched = ObservedExperts(experts, [lambda _info, _layer, decision: decision.experts.unique()])
    rounds = list(layers.steps(3))
    with torch.inference_mode():
        for waiting in (contextlib.nullcontext(), never_waiting()):  # first everything is fetched, and compiled
            with waiting:
                for step, layer, hidden, decision in rounds:
                    if layer == 1:
                        watched.begin(ForwardInfo(Phase.DENOISE, 0, step))
                    watched.prepare(layer, lambda _layer, decision=decision: decision)  # type: ignore[misc]
                    watched.run(layer, hidden, decision)
            experts.idle()
    assert experts.stats.misses < experts.stats.expert_requests / 2
    experts.close()


def test_a_slot_table_that_lies_is_found_out(checkpoint: Path, cuda: torch.device) -> None:
    if grouped.why_not(cuda) is not None:
        pytest.skip(str(grouped.why_not(cuda)))
    layers = Layers(checkpoint, cuda)
    experts = layers.offloaded(96, "lru")
    step, layer, hidden, decision = next(iter(layers.steps(1)))
    with torch.inference_mode():
        experts.begin(ForwardInfo(Phase.DENOISE, 0, step))
        wanted = experts.run(layer, hidden, decision)
        experts.idle()
        assert torch.equal(experts.run(layer, hidden, decision), wanted)
        experts.table.on_device(layer).fill_(0)
        experts.run(layer, hidden, decision)
        with pytest.raises(InternalError, match="but the slot table on the device said 0"):
            experts.idle()  # the last layer of a forward would have looked by itself
        assert torch.equal(experts.run(layer, hidden, decision), wanted)
    experts.close()


@pytest.mark.parametrize("eviction", sorted(EVICTION))
@pytest.mark.parametrize("slots", [1, 7, 96])
def test_layers_equal_the_oracle(checkpoint: Path, slots: int, eviction: str, cuda: torch.device, kernels: str) -> None:
    """By torch bit for bit; by our kernels, which the oracle does without, to rounding; few slots or many."""
    layers = Layers(checkpoint, cuda)
    few, all_here = layers.offloaded(slots, eviction), layers.offloaded(96, "lru")
    with torch.inference_mode():
        for step, layer, hidden, decision in layers.steps(4):
            found = []
            for experts in (few, all_here):
                if layer == 1:
                    experts.begin(ForwardInfo(Phase.DENOISE, 0, step))
                experts.prepare(layer, lambda _layer, decision=decision: decision)
                found.append(experts.run(layer, hidden, decision))
            wanted = layers.resident.run(layer, hidden, decision)
            assert torch.equal(*found)
            if kernels == "off":
                assert torch.equal(found[0], wanted)
            else:
                assert (found[0].float() - wanted.float()).norm() < 0.03 * wanted.float().norm()
    for experts in (few, all_here):
        experts.idle()
        experts.close()


def test_layers_equal_themselves_at_every_size(checkpoint: Path, cuda: torch.device, kernels: str) -> None:
    """And memory that is given up is the system's at once."""
    layers = Layers(checkpoint, cuda)
    resized, all_here = layers.offloaded(40, "lru"), layers.offloaded(96, "lru")
    slab = resized.arena.slab_bytes
    with torch.inference_mode():
        for step, layer, hidden, decision in layers.steps(6):
            if layer == 1:
                slots = (7, 60, 96, 2, 41, 40)[step]
                reserved, before = torch.cuda.memory_reserved(cuda), resized.arena.slots
                resized.resize(slots, max(slots, before) * slab if step % 2 else None)
                if slots < before:
                    assert reserved - torch.cuda.memory_reserved(cuda) >= (before - slots) * slab - 2**22
                for experts in (resized, all_here):
                    experts.begin(ForwardInfo(Phase.DENOISE, 0, step))
            found = [experts.run(layer, hidden, decision) for experts in (resized, all_here)]
            assert torch.equal(*found)
    for experts in (resized, all_here):
        experts.idle()
        experts.close()


def test_layers_whose_misses_the_cpu_shares_agree_with_the_oracle(
    checkpoint: Path, cuda: torch.device, kernels: str
) -> None:
    """Within the tolerance that docs/streams.md states."""
    layers = Layers(checkpoint, cuda)
    shared = layers.shared(7, 0.5)
    with torch.inference_mode():
        for step, layer, hidden, decision in layers.steps(6):
            if layer == 1:
                shared.begin(ForwardInfo(Phase.DENOISE, 0, step))
            shared.prepare(layer, lambda _layer, decision=decision: decision)  # type: ignore[misc]
            found, wanted = shared.run(layer, hidden, decision), layers.resident.run(layer, hidden, decision)
            assert (found.double() - wanted.double()).norm() < 6 * EPSILON[layers.dtype] * wanted.double().norm()
    assert shared.stats.computed_on_cpu > 50
    shared.idle()
    shared.close()
