"""Several experts in one call, and the weighted sum of what they give."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import FORMATS, random_expert, random_hidden, relative_error

from offload_engine.kernels import Expert, expert_ffn, experts_ffn, weighted_sum
from offload_engine.kernels.library import KernelStatus, Library, choose

CHOICES, HIDDEN, INNER = 3, 96, 48


def variants(library: Library) -> list[KernelStatus]:
    return [choose(library, name) for name in library.variants]


@pytest.mark.parametrize("form", FORMATS)
@given(chosen=st.lists(st.lists(st.integers(0, 5), min_size=CHOICES, max_size=CHOICES), min_size=1, max_size=40))
def test_experts_together_give_what_each_gives_alone(library: Library, form: str, chosen: list[list[int]]) -> None:
    experts = [random_expert(form, HIDDEN, INNER, seed=number) for number in range(6)]
    flat = torch.tensor(chosen).flatten()
    for dtype in (torch.bfloat16, torch.float32):
        hidden = random_hidden(len(chosen), HIDDEN, dtype)
        places = [(flat == number).nonzero().flatten() for number in range(6)]  # of no token at all, too
        for kernel in variants(library):
            wanted = torch.full((flat.numel(), HIDDEN), torch.nan, dtype=dtype)
            for expert, rows in zip(experts, places, strict=True):
                wanted[rows] = expert_ffn(hidden[rows // CHOICES], *expert, kernel=kernel, threads=1)
            for threads in (1, 2):
                found = torch.full_like(wanted, torch.nan)
                together = [Expert.of(*expert) for expert in experts]
                experts_ffn(hidden, together, places, found, kernel=kernel, threads=threads)
                assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"places": [torch.tensor([0, 30])]}, "code 3"),
        ({"places": [torch.tensor([-1])]}, "code 3"),
        ({"places": [torch.tensor([0], dtype=torch.int32)]}, "int64"),
        ({"out": torch.empty(31, HIDDEN).bfloat16()}, r"out is bfloat16 \[31, 96\]"),
        ({"out": torch.empty(30, HIDDEN)}, "out is float32"),
        ({"hidden": torch.empty(10, HIDDEN + 16).bfloat16()}, "out is"),
        (
            {"experts": [Expert.of(*random_expert("int8", HIDDEN, INNER)), Expert.of(*random_expert("bf16", 96, 48))]},
            "differ",
        ),
        ({"experts": [Expert.of(*random_expert("bf16", HIDDEN + 16, INNER))]}, "takes 112 columns, hidden has 96"),
    ],
)
def test_calls_that_do_not_fit_are_refused(library: Library, change: dict[str, object], told: str) -> None:
    good = {
        "hidden": random_hidden(10, HIDDEN, torch.bfloat16),
        "experts": [Expert.of(*random_expert("bf16", HIDDEN, INNER))],
        "places": [torch.arange(10)],
        "out": torch.empty(30, HIDDEN, dtype=torch.bfloat16),
    }
    experts_ffn(**good, kernel=choose(library, "auto"))  # type: ignore[arg-type]
    call = good | change
    call["places"] = call["places"] * len(call["experts"])  # type: ignore[operator, arg-type]
    with pytest.raises(ValueError, match=told):
        experts_ffn(**call, kernel=choose(library, "auto"))  # type: ignore[arg-type]


@given(
    tokens=st.integers(1, 40),
    choices=st.integers(1, 9),
    width=st.sampled_from([1, 100, 128, 300]),
    seed=st.integers(0, 99),
)
def test_the_weighted_sum_leaves_out_what_no_expert_gave(
    library: Library, tokens: int, choices: int, width: int, seed: int
) -> None:
    drawn = torch.Generator().manual_seed(seed)
    outputs = torch.randn(tokens, choices, width, generator=drawn).bfloat16()
    experts = torch.randint(-1, 3, (tokens, choices), generator=drawn)
    weights = torch.rand(tokens, choices, generator=drawn)
    exact = (outputs.double() * weights.double()[..., None]).masked_fill((experts < 0)[..., None], 0.0).sum(dim=1)
    outputs[experts < 0] = torch.nan
    found = [weighted_sum(outputs, experts, weights, kernel=kernel) for kernel in variants(library)]
    assert all(torch.equal(one, found[0]) for one in found)
    assert relative_error(found[0], exact) < 0.005 or float(exact.abs().max()) == 0 == float(found[0].abs().max())


def test_a_weighted_sum_that_does_not_fit_is_refused(library: Library) -> None:
    outputs, experts, weights = torch.zeros(4, 2, 8).bfloat16(), torch.zeros(4, 2).long(), torch.zeros(4, 2)
    kernel = choose(library, "auto")
    with pytest.raises(ValueError, match=r"both \[4, 2\]"):
        weighted_sum(outputs, experts[:3], weights, kernel=kernel)
    for bad in (
        (outputs.float(), experts, weights),
        (outputs, experts.int(), weights),
        (outputs, experts, weights.half()),
    ):
        with pytest.raises(ValueError, match="wanted contiguous"):
            weighted_sum(*bad, kernel=kernel)
