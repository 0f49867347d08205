"""What the grouped kernels promise, on whatever device: derive a test class from `GroupedContract` and say which."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload_engine.core import RoutingDecision
from offload_engine.experts.grouped import KernelOutputs, LayerSlabs, TorchOutputs, grouped_outputs
from offload_engine.experts.layout import SlabLayout, packed_layout
from offload_engine.kernels import grouped
from offload_engine.model.moe import ExpertOutputs, ExpertWeights, ExpertWork
from offload_engine.model.quantized import (
    ExpertFormat,
    Matrix,
    QuantizedMatrix,
    in_dtype,
    quantize_int4,
    quantize_int8,
)

FORMS = ("plain", "int8", "int4")
HALVES = (torch.bfloat16, torch.float16)
EPSILON = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-20}
"""The largest relative error of one rounding; in float32, of a sum of some dozens."""


class Layer(NamedTuple):
    """One layer's experts in slots of a device buffer, those without one left out of it."""

    hidden: Tensor
    decision: RoutingDecision
    slabs: LayerSlabs
    slots: Tensor
    """int32 [E]: every expert has one"""
    weights: list[ExpertWeights]
    """By expert, on the device, outside the buffer."""

    def absent(self, *experts: int) -> Tensor:
        """The slot table without these."""
        slots = self.slots.clone()
        slots[list(experts)] = -1
        return slots


def random_matrix(form: str, rows: int, columns: int, dtype: torch.dtype, group: int, seed: torch.Generator) -> Matrix:
    matrix = torch.randn(rows, columns, generator=seed) * columns**-0.5
    if form == "plain":
        return matrix.to(dtype)
    return quantize_int8(matrix) if form == "int8" else quantize_int4(matrix, group)


def write(layout: SlabLayout, slab: Tensor, expert: ExpertWeights) -> None:
    for target, source in zip(layout.weights(slab), expert, strict=True):
        if isinstance(target, QuantizedMatrix):
            assert isinstance(source, QuantizedMatrix)
            target.values.copy_(source.values)
            target.scales.copy_(source.scales)
        else:
            assert isinstance(source, Tensor)
            target.copy_(source)


def to_device(matrix: Matrix, device: str) -> Matrix:
    if isinstance(matrix, QuantizedMatrix):
        return QuantizedMatrix(matrix.values.to(device), matrix.scales.to(device))
    return matrix.to(device)


def random_decision(tokens: int, choices: int, experts: int, share: float, seed: torch.Generator) -> RoutingDecision:
    """Distinct experts per token, every place after some point -1 where `share` says so; weights as they come."""
    ranked = torch.rand(tokens, experts, generator=seed).argsort(dim=1)[:, :choices]
    kept = torch.randint(0, choices + 1, (tokens, 1), generator=seed)
    cut = torch.rand(tokens, 1, generator=seed) < share
    chosen = ranked.masked_fill(cut & (torch.arange(choices) >= kept), -1)
    weights = torch.rand(tokens, choices, generator=seed).masked_fill(chosen < 0, 0.0)
    return RoutingDecision(chosen, weights)


def make_layer(
    device: str,
    *,
    tokens: int = 5,
    choices: int = 3,
    experts: int = 6,
    hidden: int = 32,
    width: int = 48,
    form: str = "plain",
    dtype: torch.dtype = torch.bfloat16,
    stored: torch.dtype | None = None,
    group: int = 16,
    missing: float = 0.3,
    seed: int = 0,
) -> Layer:
    """`stored`: the dtype of plain weights; None: `dtype`. What lies in unused slots, and in gaps, is NaN."""
    generator = torch.Generator().manual_seed(seed)
    stored = stored or dtype
    kind = {"plain": ExpertFormat(stored), "int8": ExpertFormat(stored, 8), "int4": ExpertFormat(stored, 4, group)}
    layout, _payload = packed_layout(kind[form], hidden, width)
    memory = torch.full(((experts + 2) * layout.nbytes,), 0xFF, dtype=torch.uint8)
    slots = torch.randperm(experts + 2, generator=generator)[:experts]
    weights = []
    for slot in slots.tolist():
        shapes = ((width, hidden), (width, hidden), (hidden, width))
        expert = ExpertWeights(*(random_matrix(form, *shape, stored, group, generator) for shape in shapes))
        write(layout, memory[slot * layout.nbytes : (slot + 1) * layout.nbytes], expert)
        weights.append(ExpertWeights(*(to_device(matrix, device) for matrix in expert)))
    decision = random_decision(tokens, choices, experts, missing, generator)
    return Layer(
        torch.randn(tokens, hidden, generator=generator).to(dtype).to(device),
        RoutingDecision(decision.experts.to(device), decision.weights.to(device)),
        LayerSlabs.of([layout] * experts, memory.to(device), layout.nbytes),
        slots.int().to(device),
        weights,
    )


def by_torch(layer: Layer) -> Tensor:
    """What the rest of the project computes with."""
    outputs = ExpertOutputs(layer.hidden, layer.decision)
    used = [expert for expert in layer.decision.experts.unique().tolist() if expert >= 0]
    outputs.compute([ExpertWork(expert, layer.weights[expert]) for expert in used])
    return outputs.combine()


def exact(layer: Layer) -> Tensor:
    """[T, H] float64, nothing rounded but the weights, which the kernels take in 16 bits; int8 fits there unscaled."""
    total = torch.zeros(layer.hidden.shape, dtype=torch.float64, device=layer.hidden.device)
    kept = torch.float32 if layer.slabs.slabs.group == 1 else layer.hidden.dtype
    for token, choices in enumerate(layer.decision.experts.tolist()):
        x = layer.hidden[token].double()
        for choice, expert in enumerate(choices):
            if expert >= 0:
                gate, up, down = (in_dtype(matrix, kept).double() for matrix in layer.weights[expert])
                out = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
                total[token] += layer.decision.weights[token, choice].double() * out
    return total


def computed(layer: Layer, *tables: Tensor) -> Tensor:
    """By the kernels, one launch per slot table; all slots if none is given."""
    outputs = KernelOutputs(layer.hidden, layer.decision, layer.slabs)
    outputs.outputs.fill_(torch.nan)  # whatever is not written must not be read
    for slots in tables or (layer.slots,):
        outputs.compute(slots)
    assert not bool(outputs.missing().any())
    return outputs.combine()


def off_by(found: Tensor, wanted: Tensor) -> float:
    """The error, relative to the result as a whole."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))


@st.composite
def layers(draw: st.DrawFn, device: str) -> Layer:
    group = draw(st.sampled_from([2, 8, 32]))
    step = st.integers(1, 4).map(lambda groups: groups * group)
    experts = draw(st.integers(1, 8))
    return make_layer(
        device,
        tokens=draw(st.integers(1, 40)),
        choices=draw(st.integers(1, experts)),
        experts=experts,
        hidden=draw(step),
        width=draw(step),
        form=draw(st.sampled_from(FORMS)),
        dtype=draw(st.sampled_from(HALVES)),
        stored=draw(st.sampled_from(HALVES)),
        group=group,
        missing=draw(st.sampled_from([0.0, 0.3, 1.0])),
        seed=draw(st.integers(0, 10**6)),
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

    def test_without_the_kernels_torch_does_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        layer = make_layer(self.DEVICE, tokens=20, form="int8")
        assert isinstance(grouped_outputs(layer.hidden, layer.decision, layer.slabs), KernelOutputs)
        monkeypatch.setattr(grouped, "why_not", lambda _device: "told so")
        outputs = grouped_outputs(layer.hidden, layer.decision, layer.slabs)
        assert isinstance(outputs, TorchOutputs)
        outputs.compute(layer.absent(2))
        assert outputs.missing().tolist() == [False, False, True, False, False, False]
        outputs.compute(layer.slots)
        assert torch.equal(outputs.combine(), by_torch(layer))
        assert off_by(outputs.combine(), computed(layer)) < 6 * EPSILON[torch.bfloat16]

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
