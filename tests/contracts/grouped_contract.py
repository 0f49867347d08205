"""What the grouped kernels promise, on whatever device: derive a test class from `GroupedContract` and say which."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload_engine.core import ExpertKey, RoutingDecision
from offload_engine.experts.device.table import ABSENT, UNUSED
from offload_engine.experts.grouped import KernelOutputs, LayerSlabs, SlotExperts, SlotOutputs
from offload_engine.experts.storage.layout import SlabLayout
from offload_engine.kernels import grouped
from offload_engine.model.moe import ExpertWork
from tests.grouped_layers import (
    EPSILON,
    FORMS,
    HALVES,
    Layer,
    by_torch,
    computed,
    exact,
    layers,
    make_layer,
    off_by,
    random_decision,
    write,
)


class GroupedContract:
    """Against a float64 oracle and the project's own torch path within what rounding allows; else bit for bit."""

    DEVICE: str
    EXAMPLES = 25

    @pytest.fixture(autouse=True)
    def by_torch_alone(self, torch_computes: None) -> None:
        """What is held against is torch, not our kernels for the CPU."""

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
    def test_every_format_and_dtype(self, form: str, dtype: torch.dtype) -> None:
        layer = make_layer(self.DEVICE, form=form, dtype=dtype, tokens=20)
        found = computed(layer)
        assert found.dtype == dtype
        assert found.shape == layer.hidden.shape
        assert off_by(found, exact(layer)) < 3 * EPSILON[dtype]
        assert off_by(found, by_torch(layer)) < 6 * EPSILON[dtype]

    def test_tiles_hold_every_place_of_every_expert_once(self) -> None:
        @settings(max_examples=self.EXAMPLES)
        @given(
            tokens=st.integers(0, 60),
            experts=st.integers(1, 40),
            choices=st.integers(1, 8),
            missing=st.sampled_from([0.0, 0.3, 1.0]),
            seed=st.integers(0, 10**6),
        )
        def each(tokens: int, experts: int, choices: int, missing: float, seed: int) -> None:
            generator = torch.Generator().manual_seed(seed)
            chosen = random_decision(tokens, min(choices, experts), experts, missing, generator).experts
            self.check_tiles(chosen, experts)

        each()

    @pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
    def test_tiles_of_many_rows_of_few_experts(self, share: float) -> None:
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randint(-1, 3, (500, 1), generator=generator)
        self.check_tiles(chosen.where(torch.rand(500, 1, generator=generator) < share, 2), 3)

    def check_tiles(self, chosen: Tensor, experts: int) -> None:
        tiles = grouped.tiles_by_expert(chosen.to(self.DEVICE), experts)
        flat = chosen.flatten()
        wanted = {expert: (flat == expert).nonzero().flatten().tolist() for expert in range(experts)}
        pairs = list(zip(tiles.experts.tolist(), tiles.rows.tolist(), strict=True))
        assert pairs[: sum(expert < experts for expert, _row in pairs)] == [
            (expert, int(tiles.starts[expert]) + row)
            for expert, places in wanted.items()
            for row in range(0, len(places), tiles.block_rows)
        ], "tiles that weren't needed come last"
        starts, order = tiles.starts.tolist(), tiles.order.tolist()
        assert sorted(order) == list(range(len(flat)))
        assert wanted == {expert: order[starts[expert] : starts[expert + 1]] for expert in range(experts)}

    def check(self, layer: Layer) -> None:
        found, wanted = computed(layer), by_torch(layer)
        assert found.isfinite().all()
        assert off_by(found, wanted) < 8 * EPSILON[layer.hidden.dtype]

    def test_random_layers(self) -> None:
        @settings(max_examples=self.EXAMPLES)
        @given(layer=layers(self.DEVICE))
        def each(layer: Layer) -> None:
            self.check(layer)

        each()

    @pytest.mark.parametrize("stored", HALVES)
    def test_plain_weights_of_the_other_half_are_converted_at_use(self, stored: torch.dtype) -> None:
        self.check(make_layer(self.DEVICE, stored=stored, dtype=torch.float16))
        self.check(make_layer(self.DEVICE, stored=stored, dtype=torch.bfloat16))

    @pytest.mark.parametrize("choices", [1, 6])
    def test_one_token_and_none(self, choices: int) -> None:
        self.check(make_layer(self.DEVICE, tokens=1, choices=choices, missing=0.0))
        assert computed(make_layer(self.DEVICE, tokens=0, choices=choices)).shape == (0, 32)

    def test_a_token_without_any_expert_gets_zeros(self) -> None:
        layer = make_layer(self.DEVICE, tokens=4)
        layer.decision.experts[1] = -1
        layer.decision.weights[1] = 0.0
        assert (computed(layer)[1] == 0).all()
        layer.decision.experts[:] = -1
        assert (computed(layer) == 0).all()

    def test_all_tokens_at_one_expert(self) -> None:
        layer = make_layer(self.DEVICE, tokens=70, choices=1)
        layer.decision.experts[:] = 4
        self.check(layer)

    def test_equal_tokens_with_equal_weights_get_equal_bits(self) -> None:
        layer = make_layer(self.DEVICE, tokens=33, choices=2, missing=0.0)
        layer.hidden[:] = layer.hidden[0].clone()
        layer.decision.experts[:] = layer.decision.experts[0].clone()
        layer.decision.weights[:] = 0.5
        found = computed(layer)
        assert (found == found[0]).all()

    @pytest.mark.parametrize("form", FORMS)
    def test_what_is_late_is_computed_later_to_the_same_bits(self, form: str) -> None:
        layer = make_layer(self.DEVICE, form=form, tokens=20)
        wanted = computed(layer)
        none = torch.full_like(layer.slots, -1)
        for tables in (
            (layer.absent(0, 3), layer.slots),
            (none, layer.absent(1, 2, 4, 5), layer.absent(0, 3)),
            (layer.slots, none),
        ):
            assert torch.equal(computed(layer, *tables), wanted)

    def test_what_has_no_slot_is_left_alone_and_counted_missing(self) -> None:
        layer = make_layer(self.DEVICE, tokens=20, missing=0.0)
        layer.decision.experts[layer.decision.experts == 5] = -1  # nobody wants that one
        outputs = KernelOutputs(layer.hidden, layer.decision, layer.slabs)
        outputs.outputs.fill_(7.0)
        outputs.compute(layer.absent(0, 3))
        assert outputs.missing().tolist() == [True, False, False, True, False, False]
        late = torch.isin(layer.decision.experts.flatten(), torch.tensor([-1, 0, 3], device=layer.hidden.device))
        assert ((outputs.outputs == 7.0).all(dim=1) == late).all()

    def test_what_has_been_computed_is_not_computed_again(self) -> None:
        layer = make_layer(self.DEVICE, tokens=20)
        wanted = computed(layer)
        outputs = KernelOutputs(layer.hidden, layer.decision, layer.slabs)
        outputs.compute(layer.slots)
        layer.slabs.slabs.memory.fill_(0xFF)  # another expert may be in the slot by now
        outputs.compute(layer.slots)
        assert torch.equal(outputs.combine(), wanted)

    def test_neither_slots_nor_the_other_tokens_show_in_a_bit(self) -> None:
        layer = make_layer(self.DEVICE, tokens=24, missing=0.0)
        moved = make_layer(self.DEVICE, tokens=24, missing=0.0)
        order = torch.arange(len(moved.slots) - 1, -1, -1, dtype=torch.int32, device=self.DEVICE)
        layout, size = moved.slabs.layouts[0], moved.slabs.slabs.slab_bytes
        moved.slabs.slabs.memory.fill_(0xFF)
        for expert, slot in enumerate(order.tolist()):
            write(layout, moved.slabs.slabs.memory[slot * size : (slot + 1) * size], moved.weights[expert])
        assert torch.equal(computed(moved, order), computed(layer))
        first = RoutingDecision(layer.decision.experts[:9].clone(), layer.decision.weights[:9].clone())
        fewer = layer._replace(hidden=layer.hidden[:9].clone(), decision=first)
        assert torch.equal(computed(fewer), computed(layer)[:9])

    def test_a_damaged_token_damages_no_other(self) -> None:
        layer = make_layer(self.DEVICE, tokens=20, missing=0.0)
        wanted = computed(layer)
        layer.hidden[3] = torch.nan
        found = computed(layer)
        assert found[3].isnan().all()
        rest = torch.arange(20) != 3
        assert torch.equal(found[rest], wanted[rest])

    @pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # on its way to 0, where Triton is interpreted
    def test_large_gates_do_not_overflow(self) -> None:
        layer = make_layer(self.DEVICE, tokens=8)
        layer.hidden.mul_(300.0)
        self.check(layer)

    def test_slabs_of_a_checkpoint_as_it_is(self) -> None:
        """Matrices anywhere, at the multiples of the dtype's size that a file has them at, in any order."""
        layer = make_layer(self.DEVICE, hidden=32, width=16, tokens=12)
        size, places = 32 * 16 * 2, ((2, 1100, 2200), (3000, 66, 1500))
        slab = 4096
        memory = torch.full((7 * slab,), 0xFF, dtype=torch.uint8, device=self.DEVICE)
        base = layer.slabs.layouts[0]
        layouts = []
        for expert in range(6):
            gate, up, down = places[expert % 2]
            layout = SlabLayout(
                base.gate._replace(offset=gate),
                base.up._replace(offset=up),
                base.down._replace(offset=down),
                base.dtype,
                slab,
            )
            assert size <= min(abs(one - two) for one in (gate, up, down) for two in (gate, up, down) if one != two)
            write(layout, memory[expert * slab : (expert + 1) * slab], layer.weights[expert])
            layouts.append(layout)
        odd = layer._replace(slabs=LayerSlabs.of(layouts, memory, slab))
        assert odd.slabs.slabs.aligned == 2
        assert torch.equal(computed(odd, torch.arange(6, dtype=torch.int32, device=self.DEVICE)), computed(layer))

    def test_work_is_done_in_the_slots_it_names(self) -> None:
        layer = make_layer(self.DEVICE, tokens=20, form="int8", missing=0.0)
        outputs = SlotOutputs(layer.hidden, layer.decision, layer.slabs)
        slots = layer.slots.tolist()
        for experts in ((0, 4), (5,), (3, 1, 2)):
            outputs.compute([ExpertWork(expert, layer.weights[expert], slots[expert]) for expert in experts])
        assert torch.equal(outputs.combine(), computed(layer))

    def test_what_a_look_up_finds_is_computed_first_and_the_rest_as_it_comes(self) -> None:
        layer = make_layer(self.DEVICE, tokens=20, form="int4", missing=0.5)
        layer.decision.experts[layer.decision.experts == 3] = -1
        outputs = SlotOutputs(layer.hidden, layer.decision, layer.slabs)
        slots = layer.slots.tolist()
        found = outputs.look_up(layer.absent(2, 5)).tolist()
        assert found == [*slots[:2], ABSENT, UNUSED, slots[4], ABSENT]
        outputs.compute_found()
        outputs.compute([ExpertWork(5, layer.weights[5], slots[5])])
        outputs.compute([ExpertWork(2, layer.weights[2], slots[2])])
        assert torch.equal(outputs.combine(), computed(layer))

    def test_where_the_kernels_do_not_run_there_are_no_outputs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        layer = make_layer(self.DEVICE)
        store, arena = (
            SimpleNamespace(
                layout=lambda _key: layer.slabs.layouts[0],
                keys=lambda: [ExpertKey(3, expert) for expert in range(6)],
            ),
            SimpleNamespace(whole=lambda: layer.slabs.slabs.memory, slab_bytes=layer.slabs.slabs.slab_bytes),
        )
        experts = SlotExperts(store, arena)  # type: ignore[arg-type]
        assert experts.counts == {3: 6}
        assert isinstance(experts.outputs(3, layer.hidden, layer.decision), SlotOutputs)
        learning = layer.hidden.clone().requires_grad_()
        assert experts.outputs(3, learning, layer.decision) is None
        assert experts.outputs(3, layer.hidden.double(), layer.decision) is None
        monkeypatch.setattr(grouped, "why_not", lambda _device: "told so")
        assert experts.outputs(3, layer.hidden, layer.decision) is None

    def test_shapes_that_do_not_fit_are_refused(self) -> None:
        layer = make_layer(self.DEVICE)
        slabs, hidden = layer.slabs.slabs, layer.hidden
        tiles = grouped.tiles_by_expert(layer.decision.experts, 6)
        outputs = hidden.new_empty(15, 32)
        for message, arguments in (
            (r"hidden is int64 \[5, 32\]", (hidden.long(), tiles, layer.slots, slabs, outputs)),
            (r"outputs is bfloat16 \[14, 32\], wanted", (hidden, tiles, layer.slots, slabs, outputs[:14])),
            (r"slots is int32 \[5\], wanted", (hidden, tiles, layer.slots[:5], slabs, outputs)),
            (r"slots is int64 \[6\], wanted", (hidden, tiles, layer.slots.long(), slabs, outputs)),
            (
                r"places is int64 \[5, 6\]",
                (hidden, tiles, layer.slots, slabs._replace(places=slabs.places[:5]), outputs),
            ),
            (
                r"memory is .* a multiple of \d+ bytes",
                (hidden, tiles, layer.slots, slabs._replace(memory=slabs.memory[:100]), outputs),
            ),
            ("not contiguous", (hidden.T.contiguous().T, tiles, layer.slots, slabs, outputs)),
            ("no whole number", (hidden[:4], tiles, layer.slots, slabs, outputs)),
        ):
            with pytest.raises(ValueError, match=message):
                grouped.experts_ffn(*arguments)
