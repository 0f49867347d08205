"""Several experts in one call, and the weighted sum of what they give."""

from __future__ import annotations

from typing import Any

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
@given(chosen=st.lists(st.lists(st.integers(-1, 5), min_size=CHOICES, max_size=CHOICES), min_size=1, max_size=40))
def test_experts_together_give_what_each_gives_alone(library: Library, form: str, chosen: list[list[int]]) -> None:
    experts = [random_expert(form, HIDDEN, INNER, seed=number) for number in range(5)]  # nobody computes 5
    decision = torch.tensor(chosen)
    flat = decision.flatten()
    for dtype in (torch.bfloat16, torch.float32):
        hidden = random_hidden(len(chosen), HIDDEN, dtype)
        for kernel in variants(library):
            wanted = torch.full((flat.numel(), HIDDEN), 7.0, dtype=dtype)
            for number, expert in enumerate(experts):
                rows = (flat == number).nonzero().flatten()
                wanted[rows] = expert_ffn(hidden[rows // CHOICES], *expert, kernel=kernel, threads=1)
            for threads in (1, 2):
                found = torch.full_like(wanted, 7.0)
                together = [Expert.of(*expert) for expert in experts]
                experts_ffn(hidden, decision, range(5), together, found, kernel=kernel, threads=threads)
                assert torch.equal(found, wanted)


def test_more_rows_than_the_workspace_has_are_computed_in_pieces(library: Library) -> None:
    kernel = choose(library, "auto")
    experts = [random_expert("bf16", 32, 16, seed=number) for number in range(4)]
    hidden = random_hidden(1500, 32, torch.bfloat16)
    decision = torch.tensor([[0, 1], [2, 3], [0, 2]]).repeat(500, 1)  # 1000, 500, 1000 and 500 rows
    found = torch.empty(3000, 32, dtype=torch.bfloat16)
    experts_ffn(hidden, decision, [0, 1, 2, 3], [Expert.of(*one) for one in experts], found, kernel=kernel)
    for number, expert in enumerate(experts):
        rows = (decision.flatten() == number).nonzero().flatten()
        assert torch.equal(found[rows], expert_ffn(hidden[rows // 2], *expert, kernel=kernel))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"chosen": torch.zeros(10, 3, dtype=torch.int32)}, "chosen is int32"),
        ({"chosen": torch.zeros(10, 2, dtype=torch.int64)}, r"chosen is int64 \[10, 2\], wanted .* \[10, 3\]"),
        ({"chosen": torch.zeros(3, 10, dtype=torch.int64).T}, "contiguous int64"),
        ({"chosen": None}, "nothing says who chose whom"),
        ({"out": torch.empty(31, HIDDEN).bfloat16()}, r"out is bfloat16 \[31, 96\]"),
        ({"out": torch.empty(30, HIDDEN)}, "out is float32"),
        ({"hidden": torch.empty(10, HIDDEN + 16).bfloat16()}, "out is"),
        ({"experts": [Expert.of(*random_expert("bf16", HIDDEN + 16, INNER))]}, "takes 112 columns, hidden has 96"),
        ({"numbers": [0, 0]}, "a number each"),
        (
            {"experts": [Expert.of(*random_expert(form, HIDDEN, INNER)) for form in ("int8", "bf16")]},
            "differ",
        ),
    ],
)
def test_calls_that_do_not_fit_are_refused(library: Library, change: dict[str, Any], told: str) -> None:
    good: dict[str, Any] = {
        "hidden": random_hidden(10, HIDDEN, torch.bfloat16),
        "chosen": torch.zeros(10, 3, dtype=torch.int64),
        "numbers": [0],
        "experts": [Expert.of(*random_expert("bf16", HIDDEN, INNER))],
        "out": torch.empty(30, HIDDEN, dtype=torch.bfloat16),
    }
    experts_ffn(**good, kernel=choose(library, "auto"))
    with pytest.raises(ValueError, match=told):
        experts_ffn(**good | change, kernel=choose(library, "auto"))


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
