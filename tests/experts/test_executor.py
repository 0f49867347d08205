"""Offloaded execution against `ResidentExperts`: bit for bit, in whatever order transfers finish."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload_engine.core import ExpertKey, ForwardInfo, Phase, RoutingDecision
from offload_engine.decode.kv_cache import PrefixCache
from offload_engine.errors import InternalError, MemoryBudgetError, TransferError
from offload_engine.experts.arena import SlotArena
from offload_engine.experts.executor import OffloadedExperts
from offload_engine.experts.scheduling.cache import ExpertCache
from offload_engine.experts.scheduling.eviction import EVICTION, make_eviction
from offload_engine.experts.scheduling.predictor import make_predictor
from offload_engine.experts.scheduling.scheduler import Command, ExpertScheduler
from offload_engine.experts.storage.conversion import Kind, convert
from offload_engine.experts.storage.opening import open_store
from offload_engine.experts.storage.store import ExpertStore, load_all
from offload_engine.experts.transfer.base import OnComplete, Stream, TransferTicket
from offload_engine.experts.transfer.cpu import CpuTransfers
from offload_engine.experts.transfer.stalls import HostStalls
from offload_engine.metrics import EngineStats
from offload_engine.model.attention import MaskedSequence, block_causal_mask
from offload_engine.model.checkpoint import Checkpoint
from offload_engine.model.config import ModelConfig
from offload_engine.model.llada2 import Forward, LLaDA2Model
from offload_engine.model.moe import ExpertExecutor, ResidentExperts
from offload_engine.model.weights import load_resident
from offload_engine.routing import POLICIES, RoutingOptions, make_policy
from tests.checkpoints import tiny_config, write_checkpoint


class ScrambledTransfers(HostStalls):
    """A driver that completes copies in an order drawn in advance, and only once the slab has been scribbled over."""

    notices = ()

    def __init__(self, store: ExpertStore, arena: SlotArena, order: Sequence[int]) -> None:
        super().__init__()
        self.store = store
        self.arena = arena
        self.order = list(order) or [0]
        self.taken = 0
        self.pending: list[TransferTicket] = []
        self.begun: TransferTicket | None = None
        self.changed = threading.Condition()
        self.closed = False
        self.thread = threading.Thread(target=self._serve)

    def start(self, on_complete: OnComplete) -> None:
        self.on_complete = on_complete
        self.thread.start()

    def copy(self, stream: Stream, source: ExpertKey, slot: int) -> TransferTicket:
        ticket = TransferTicket(source, slot)
        self.arena.buffer(slot)[:] = b"\xff" * self.arena.slab_bytes  # NaNs, should anyone read too early
        with self.changed:
            self.pending.append(ticket)
            self.changed.notify_all()
        return ticket

    def withdraw(self) -> list[TransferTicket]:
        with self.changed:
            self.pending.clear()
            return [] if self.begun is None else [self.begun]

    def launch(self, stream: Stream, fn: Callable[[], None], reads: Sequence[int], writes: Sequence[int] = ()) -> None:
        fn()

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        self.thread.join()

    def _serve(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.pending or self.closed)
                if not self.pending:
                    return
                choice = self.order[self.taken % len(self.order)] % len(self.pending)
                self.taken += 1
                ticket = self.begun = self.pending.pop(choice)
            ticket.bytes_read = self.store.read(ticket.key, self.arena.buffer(ticket.slot))
            self.on_complete(ticket)


class Model:
    """A small checkpoint opened once, converted before if `kind` says to what: its network, store and oracle."""

    def __init__(self, directory: Path, dtype: torch.dtype, kind: Kind | None = None) -> None:
        config = tiny_config(num_experts=32, n_group=4, topk_group=2, moe_intermediate_size=24, num_hidden_layers=4)
        self.dtype = dtype
        source = write_checkpoint(directory / "source", config, dtype=dtype)
        read = source if kind is None else convert(source, directory / kind, kind, identity="one").directory
        checkpoint = Checkpoint.open(read)
        self.config = ModelConfig.from_dict(config)
        self.store = open_store(self.config, checkpoint)
        self.network: LLaDA2Model = load_resident(self.config, checkpoint, dtype, torch.device("cpu"), None)
        self.resident = ResidentExperts(load_all(self.store, self.store.keys()))

    def hidden(self, experts: ExpertExecutor, routing: str, ids: Tensor, step: int = 0) -> Tensor:
        options = RoutingOptions(top_p=0.6, min_experts=6, top_k_experts=2, des_beta=0.2, expert_capacity=6)
        policy = make_policy(routing, self.config.router, options)
        positions = torch.arange(ids.shape[0])
        forward = Forward(
            ForwardInfo(Phase.DENOISE, 0, step),
            positions,
            positions // 8,
            MaskedSequence(block_causal_mask(positions, 8)),
            policy,
            experts,
        )
        with torch.inference_mode():
            return self.network(ids, forward)

    def prefilled(self, experts: ExpertExecutor, routing: str, ids: Tensor, pieces: int) -> Tensor:
        """Keys and values [2, layers, T, heads, d] after a prefill in so many pieces."""
        policy = make_policy(routing, self.config.router, RoutingOptions(top_p=0.6, min_experts=6, top_k_experts=2))
        cache = PrefixCache(self.config, len(ids), self.dtype, torch.device("cpu"))
        length = len(ids) // pieces
        spans = [cache.span(length, 8, start) for start in range(0, len(ids), length)]
        blocks = torch.arange(length) // 8
        info = ForwardInfo(Phase.PREFILL)
        forwards = [Forward(info, span.positions, blocks, span, policy, experts) for span in spans]
        with torch.inference_mode():
            assert self.network.prefill(ids, forwards)
        return torch.stack((cache.keys, cache.values))

    def offloaded(
        self,
        slots: int,
        eviction: str = "lru",
        predictor: str = "none",
        order: Sequence[int] | None = None,
        in_flight: int = 2,
    ) -> OffloadedExperts:
        arena = SlotArena(slots, self.store.slab_bytes)
        return OffloadedExperts(
            store=self.store,
            arena=arena,
            transfers=CpuTransfers(self.store, arena)
            if order is None
            else ScrambledTransfers(self.store, arena, order),
            scheduler=ExpertScheduler(ExpertCache(slots, make_eviction(eviction)), in_flight),
            predictor=make_predictor(predictor),
            stats=EngineStats(),
            prefetch_depth=2,
        )


KINDS = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "bf16-packed": (torch.bfloat16, "stored"),
    "bf16-int8": (torch.bfloat16, "int8"),
    "bf16-int4": (torch.bfloat16, "int4"),
}


@pytest.fixture(scope="module", params=list(KINDS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("model"), *KINDS[request.param])


@settings(max_examples=40)
@given(
    slots=st.integers(1, 70),
    eviction=st.sampled_from(sorted(EVICTION)),
    predictor=st.sampled_from(["none", "previous-step", "cross-layer-gate"]),
    routing=st.sampled_from(sorted(POLICIES)),
    order=st.lists(st.integers(0, 7), min_size=1, max_size=20),
    in_flight=st.integers(1, 6),
    seed=st.integers(0, 100),
)
def test_offloaded_equals_resident_bit_for_bit(
    model: Model, slots: int, eviction: str, predictor: str, routing: str, order: list[int], in_flight: int, seed: int
) -> None:
    experts = model.offloaded(slots, eviction, predictor, order, in_flight)
    generator = torch.Generator().manual_seed(seed)
    try:
        for step in range(3):
            ids = torch.randint(0, 94, (12,), generator=generator)
            expected = model.hidden(model.resident, routing, ids, step)
            assert torch.equal(model.hidden(experts, routing, ids, step), expected)
        experts.idle()
    finally:
        experts.close()


@settings(max_examples=40)
@given(
    slots=st.integers(1, 70),
    eviction=st.sampled_from(sorted(EVICTION)),
    predictor=st.sampled_from(["none", "previous-step", "cross-layer-gate"]),
    routing=st.sampled_from(["original", "dmoe"]),
    order=st.lists(st.integers(0, 7), min_size=1, max_size=20),
    in_flight=st.integers(1, 6),
    pieces=st.integers(1, 4),
)
def test_an_offloaded_prefill_equals_a_resident_one_bit_for_bit(
    model: Model, slots: int, eviction: str, predictor: str, routing: str, order: list[int], in_flight: int, pieces: int
) -> None:
    ids = torch.randint(0, 94, (8 * 4 * pieces,), generator=torch.Generator().manual_seed(slots))
    expected = model.prefilled(model.resident, routing, ids, pieces)
    experts = model.offloaded(slots, eviction, predictor, order, in_flight)
    try:
        model.hidden(experts, routing, ids[:12])
        assert torch.equal(model.prefilled(experts, routing, ids, pieces), expected)
        experts.idle()
        stats = experts.stats
        assert stats.hits + stats.late + stats.misses == stats.expert_requests
        assert stats.loads >= stats.misses
    finally:
        experts.close()


def test_what_a_layer_computes_beside_its_experts_is_computed_before_it_waits(model: Model) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, model.config.hidden_size, generator=generator).to(model.dtype)
    decision = RoutingDecision(torch.tensor([[0, 1], [2, 3], [0, 4], [5, 1]]), torch.full((4, 2), 0.5))
    experts = model.offloaded(slots=20)
    heard: list[tuple[bool, int]] = []
    waiting, beside = experts.transfers.waiting, lambda: heard.append((False, experts.scheduler.counters.misses))

    def waited() -> AbstractContextManager[None]:
        heard.append((True, 0))
        return waiting()

    experts.transfers.waiting = waited  # type: ignore[method-assign]
    with torch.inference_mode():
        expected = model.resident.run(1, hidden, decision)
        experts.begin(ForwardInfo(Phase.SCORE))
        assert torch.equal(experts.run(1, hidden, decision, beside), expected)
        assert heard[0] == (False, 6), "once all that is missing was asked for"
        assert all(waits for waits, _misses in heard[1:]), "once"
        heard.clear()
        assert torch.equal(experts.run(1, hidden, decision, beside), expected)
    assert heard == [], "there is nothing to wait for"
    experts.close()


def test_prefill_in_pieces_agrees_with_one_piece(model: Model) -> None:
    ids = torch.randint(0, 94, (96,), generator=torch.Generator().manual_seed(0))
    tolerance = 1e-4 if model.dtype == torch.float32 else 0.1
    for routing in ("original", "dmoe"):
        whole = model.prefilled(model.resident, routing, ids, 1)
        for pieces in (2, 3, 12):
            parts = model.prefilled(model.resident, routing, ids, pieces)
            torch.testing.assert_close(parts, whole, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("predictor", ["none", "previous-step", "cross-layer-gate"])
@pytest.mark.parametrize("slots", [3, 8, 20, 50])
def test_a_prefill_reads_each_expert_once_however_long_the_prompt(model: Model, slots: int, predictor: str) -> None:
    experts = model.offloaded(slots, predictor=predictor)
    read: list[ExpertKey] = []
    wanted: dict[int, set[int]] = {}
    load, want = model.store.read, experts.scheduler.want

    def counting(key: ExpertKey, slab: memoryview) -> int:
        read.append(key)
        return load(key, slab)

    def watching(layer: int, chosen: Sequence[int], scores: Sequence[float]) -> object:
        wanted.setdefault(layer, set()).update(chosen)
        return want(layer, chosen, scores)

    experts.scheduler.want = watching  # type: ignore[method-assign, assignment]
    experts.transfers.store = Counted(model.store, counting)  # type: ignore[attr-defined]
    ids = torch.randint(0, 94, (320,), generator=torch.Generator().manual_seed(0))
    model.prefilled(experts, "original", ids, pieces=10)
    experts.idle()
    experts.close()
    assert [key for place, key in enumerate(read) if key in read[:place]] == []
    needed = {ExpertKey(layer, expert) for layer, chosen in wanted.items() for expert in chosen}
    assert needed <= set(read)
    assert sorted(wanted) == [1, 2], "nothing depends on the last layer's experts"
    assert experts.stats.expert_requests == len(needed) > 50
    if slots >= 8:
        assert experts.stats.prefetches_issued > 0, "the next layer is fetched during this one's attention"


@pytest.mark.parametrize("eviction", ["next-use", "lru"])
def test_a_sweep_keeps_what_it_will_come_to(model: Model, eviction: str) -> None:
    """What is resident when a sweep begins is not loaded again in it while others could go; with more slots than the
    layer has experts, others always can.
    """
    experts = model.offloaded(40, eviction)
    read: list[ExpertKey] = []
    load = model.store.read

    def counting(key: ExpertKey, slab: memoryview) -> int:
        read.append(key)
        return load(key, slab)

    experts.transfers.store = Counted(model.store, counting)  # type: ignore[attr-defined]
    ids = torch.randint(0, 94, (320,), generator=torch.Generator().manual_seed(0))
    before: dict[int, set[ExpertKey]] = {}
    sweep = experts.sweep

    def watched(layer: int, hidden: Tensor, decision: RoutingDecision, rows: int) -> Tensor:
        before[layer] = {key for key in experts.scheduler.cache.resident_keys() if key.layer == layer}
        read.clear()
        out = sweep(layer, hidden, decision, rows)
        assert before[layer].isdisjoint(read)
        return out

    for _ in range(2):
        model.prefilled(experts, "original", ids, pieces=10)
    experts.sweep = watched  # type: ignore[method-assign]
    model.prefilled(experts, "original", ids, pieces=10)
    assert any(before.values()), "something was there to be kept"
    experts.idle()
    experts.close()


class Counted:
    """A store whose reads are somebody else's."""

    def __init__(self, store: ExpertStore, read: Callable[[ExpertKey, memoryview], int]) -> None:
        self.store = store
        self.read = read

    def __getattr__(self, name: str) -> object:
        return getattr(self.store, name)


def test_a_prefill_that_fails_half_way_leaves_the_engine_usable(model: Model) -> None:
    experts = model.offloaded(slots=5)
    faulty = Faulty(model.store)
    experts.transfers.store = faulty  # type: ignore[attr-defined]
    ids = torch.arange(64) % 90
    faulty.broken = True
    with pytest.raises(TransferError, match="the disk is gone"):
        model.prefilled(experts, "original", ids, 4)
    experts.idle()
    faulty.broken = False
    expected = model.prefilled(model.resident, "original", ids, 4)
    assert torch.equal(model.prefilled(experts, "original", ids, 4), expected)
    experts.close()


def test_every_byte_read_is_accounted_for(model: Model) -> None:
    experts = model.offloaded(slots=4, predictor="previous-step")
    ids = torch.arange(12)
    for step in range(3):
        model.hidden(experts, "original", ids, step)
    experts.idle()
    stats, store = experts.stats, model.store
    some = next(iter(store.keys()))
    assert stats.misses > 0
    assert stats.loads == stats.misses + stats.prefetches_issued
    assert stats.hits + stats.late + stats.misses == stats.expert_requests
    assert stats.bytes_moved == stats.loads * store.payload_bytes(some)
    assert stats.bytes_read >= stats.bytes_moved
    experts.close()


def test_what_is_resident_is_not_read_again(model: Model) -> None:
    experts = model.offloaded(slots=64)
    ids = torch.arange(12)
    model.hidden(experts, "dmoe", ids)
    first = experts.stats.loads
    model.hidden(experts, "dmoe", ids)
    assert experts.stats.loads == first > 0
    experts.close()


def test_the_previous_steps_experts_are_prefetched(model: Model) -> None:
    experts = model.offloaded(slots=12, predictor="previous-step")
    ids = torch.arange(12)
    for step in range(4):
        model.hidden(experts, "dmoe", ids, step)
    assert experts.stats.prefetches_issued > 0
    experts.close()


class Faulty:
    """A store that refuses some reads."""

    def __init__(self, store: ExpertStore) -> None:
        self.store = store
        self.broken = False

    def read(self, key: ExpertKey, slab: memoryview) -> int:
        if self.broken:
            raise TransferError(f"expert {key.expert} of layer {key.layer}: the disk is gone")
        return self.store.read(key, slab)

    def __getattr__(self, name: str) -> object:
        return getattr(self.store, name)


def test_a_reader_that_fails_mid_run_raises_and_leaves_the_engine_usable(model: Model) -> None:
    experts = model.offloaded(slots=5, predictor="previous-step")
    faulty = Faulty(model.store)
    experts.transfers.store = faulty  # type: ignore[attr-defined]
    ids = torch.arange(12)
    model.hidden(experts, "original", ids)
    faulty.broken = True
    with pytest.raises(TransferError, match=r"expert \d+ of layer 1: the disk is gone"):
        model.hidden(experts, "original", ids.flip(0))
    experts.idle()
    faulty.broken = False
    expected = model.hidden(model.resident, "original", ids)
    assert torch.equal(model.hidden(experts, "original", ids), expected)
    experts.idle()
    experts.close()


def test_an_unforeseen_error_in_a_reader_reaches_the_caller(model: Model) -> None:
    experts = model.offloaded(slots=5)

    class Broken(Faulty):
        def read(self, key: ExpertKey, slab: memoryview) -> int:
            raise ValueError("a bug")

    experts.transfers.store = Broken(model.store)  # type: ignore[attr-defined]
    with pytest.raises(TransferError, match="ValueError: a bug"):
        model.hidden(experts, "original", torch.arange(12))
    experts.close()


@pytest.mark.parametrize(
    ("met", "raised", "told"),
    [
        (KeyError("books"), InternalError, "KeyError: 'books'"),
        (MemoryError(), MemoryBudgetError, r"expert \d+ of layer 1: memory ran out"),
    ],
)
def test_what_is_met_on_arrival_reaches_the_caller_and_costs_one_answer(
    model: Model, met: Exception, raised: type[Exception], told: str
) -> None:
    experts, ids = model.offloaded(slots=5), torch.arange(12)
    arrived, left = experts.scheduler.arrived, [met]

    def broken(key: ExpertKey) -> Sequence[Command]:
        if left:
            raise left.pop()
        return arrived(key)

    experts.scheduler.arrived = broken  # type: ignore[method-assign, assignment]
    with pytest.raises(raised, match=told):
        model.hidden(experts, "original", ids)
    assert torch.equal(model.hidden(experts, "original", ids), model.hidden(model.resident, "original", ids))
    experts.close()


def test_an_interrupt_before_a_load_is_handed_over_loses_no_slot(model: Model) -> None:
    experts = model.offloaded(slots=6, predictor="previous-step")
    model.hidden(experts, "dmoe", torch.arange(12))
    scheduler, want, predict = experts.scheduler, experts.scheduler.want, experts.scheduler.predict

    def interrupted(*arguments: object) -> list[object]:
        (want if len(arguments) > 1 else predict)(*arguments)  # type: ignore[arg-type, operator]
        raise KeyboardInterrupt

    for step, name in enumerate(("want", "predict"), start=1):
        setattr(scheduler, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.hidden(experts, "original", torch.arange(12).flip(0), step=step)
        delattr(scheduler, name)
        experts.idle(timeout=20)
    expected = model.hidden(model.resident, "original", torch.arange(12))
    assert torch.equal(model.hidden(experts, "original", torch.arange(12)), expected)
    experts.close()


def test_an_answer_does_not_wait_for_the_hot_set(model: Model) -> None:
    experts = model.offloaded(slots=5)
    gate = threading.Event()

    def gated(key: ExpertKey, slab: memoryview) -> int:
        assert gate.wait(20)
        return model.store.read(key, slab)

    experts.transfers.store = Counted(model.store, gated)  # type: ignore[attr-defined]
    experts.hot.use(1, [3, 4, 5])
    experts.warm_up()
    try:
        experts.idle(timeout=0.05)
        with pytest.raises(InternalError, match="hot experts were not all here"):
            experts.wait_warm(timeout=0.05)
    finally:
        gate.set()
    experts.wait_warm()
    experts.close()
    assert (experts.stats.loads, experts.stats.warmed) == (3, 3)


def test_close_joins_every_thread(model: Model) -> None:
    before = threading.active_count()
    experts = model.offloaded(slots=5)
    model.hidden(experts, "dmoe", torch.arange(12))
    assert threading.active_count() > before
    experts.close()
    experts.close()
    assert threading.active_count() == before
