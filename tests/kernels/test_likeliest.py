"""The likeliest token in C: what torch finds, on every instruction set that this machine has."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from offload_engine.core import SamplingParams
from offload_engine.decode.sampler import propose
from offload_engine.kernels import KernelStatus, likeliest, serves_likeliest
from offload_engine.kernels.library import Library, choose

INF, NAN = math.inf, math.nan


def kernels_of(library: Library) -> list[KernelStatus]:
    return [choose(library, name) for name in library.variants]


def random(*shape: int, scale: float = 4.0, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def by_float64(logits: Tensor, barred: int) -> tuple[Tensor, Tensor]:
    allowed = logits.clone()
    allowed[:, barred] = -INF
    tokens = allowed.argmax(dim=-1)
    return tokens, logits.double().softmax(dim=-1).gather(1, tokens.unsqueeze(1)).squeeze(1)


@given(rows=st.integers(1, 5), vocabulary=st.integers(2, 3000), scale=st.sampled_from([0.0, 1.0, 30.0]), data=st.data())
def test_tokens_and_probabilities_are_those_of_float64(
    library: Library, rows: int, vocabulary: int, scale: float, data: st.DataObject
) -> None:
    barred = data.draw(st.integers(0, vocabulary - 1))
    logits = random(rows, vocabulary, scale=scale, seed=vocabulary)
    tokens, wanted = by_float64(logits, barred)
    for kernel in kernels_of(library):
        found, probabilities = likeliest(logits, barred, kernel=kernel)
        assert torch.equal(found, tokens)
        torch.testing.assert_close(probabilities.double(), wanted, rtol=1e-5, atol=1e-35)


def test_instruction_sets_give_the_same_bits(library: Library) -> None:
    logits = random(7, 5000)
    first, *others = [likeliest(logits, 3, kernel=kernel) for kernel in kernels_of(library)]
    for other in others:
        assert torch.equal(other[0], first[0])
        assert torch.equal(other[1], first[1])


def test_neither_threads_nor_neighbours_show(library: Library) -> None:
    logits = random(9, 4100)
    for kernel in kernels_of(library):
        tokens, probabilities = likeliest(logits, 0, kernel=kernel, threads=1)
        for threads in (2, 3):
            again = likeliest(logits, 0, kernel=kernel, threads=threads)
            assert torch.equal(again[0], tokens)
            assert torch.equal(again[1], probabilities)
        for row in range(9):
            alone = likeliest(logits[row : row + 1], 0, kernel=kernel)
            assert alone[0] == tokens[row]
            assert alone[1] == probabilities[row]
        assert likeliest(logits[:0], 0, kernel=kernel)[0].shape == (0,)


@pytest.mark.parametrize("best", [0, 1, 1023, 1024, 2047, 2999])
def test_the_barred_token_counts_in_the_softmax_and_is_never_chosen(library: Library, best: int) -> None:
    logits = torch.zeros(1, 3000)
    logits[0, best] = 8.0
    for kernel in kernels_of(library):
        tokens, probabilities = likeliest(logits, best, kernel=kernel)
        assert tokens.item() == (1 if best == 0 else 0), "all others tie, and the lowest wins"
        assert probabilities.item() == pytest.approx(1 / (2999 + math.exp(8.0)), rel=1e-5)


def test_equals_far_apart_go_to_the_lower_token(library: Library) -> None:
    logits = torch.full((1, 4000), -1.0)
    logits[0, [1500, 1501, 3900]] = 2.0
    for kernel in kernels_of(library):
        assert likeliest(logits, 0, kernel=kernel)[0].item() == 1500
        assert likeliest(logits, 1500, kernel=kernel)[0].item() == 1501


@pytest.mark.parametrize("place", [0, 1023, 1024, 2500])
@pytest.mark.parametrize("damage", [NAN, -NAN, INF])
def test_damage_shows_in_its_row_alone(library: Library, damage: float, place: int) -> None:
    logits = random(3, 2501)
    logits[1, place] = damage
    for kernel in kernels_of(library):
        for barred in (place, 7):
            probabilities = likeliest(logits, barred, kernel=kernel)[1]
            assert probabilities.isnan().tolist() == [False, True, False]


def test_logits_of_minus_infinity_are_tokens_that_cannot_be(library: Library) -> None:
    logits = random(3, 3000)
    logits[0, :2000] = -INF
    logits[1] = -INF
    logits[2] = -INF
    logits[2, 5] = 1.0
    for kernel in kernels_of(library):
        tokens, probabilities = likeliest(logits, 5, kernel=kernel)
        wanted = by_float64(logits, 5)
        assert tokens[0] == wanted[0][0]
        assert probabilities[0].item() == pytest.approx(wanted[1][0].item(), rel=1e-5)
        assert probabilities[1].isnan(), "there is nothing to choose from"
        assert probabilities[2] < 1e-30, "nothing but the barred token can be"


@pytest.mark.parametrize(
    ("logits", "barred"),
    [
        (torch.zeros(2, 8).double(), 0),
        (torch.zeros(8), 0),
        (torch.zeros(2, 0), 0),
        (torch.zeros(2, 8), 8),
        (torch.zeros(2, 8), -1),
        (torch.zeros(8, 2).t(), 0),
    ],
)
def test_what_does_not_fit_is_refused(library: Library, logits: Tensor, barred: int) -> None:
    with pytest.raises(ValueError, match=r"logits are float.* wanted contiguous float32"):
        likeliest(logits, barred, kernel=kernels_of(library)[0])


@pytest.mark.usefixtures("library")
def test_gradients_and_other_dtypes_are_left_to_torch() -> None:
    assert serves_likeliest(torch.zeros(2, 8))
    assert not serves_likeliest(torch.zeros(2, 8).double())
    wanting = torch.zeros(2, 8, requires_grad=True)
    assert not serves_likeliest(wanting)
    with torch.no_grad():
        assert serves_likeliest(wanting)


@given(rows=st.integers(1, 6), vocabulary=st.integers(2, 2100), seed=st.integers(0, 9))
def test_what_is_proposed_greedily_is_what_torch_proposes(rows: int, vocabulary: int, seed: int) -> None:
    logits, barred = random(rows, vocabulary, seed=seed), seed % vocabulary
    with patch("offload_engine.kernels.serves_likeliest", lambda _logits: False):
        wanted = propose(logits.clone(), barred, SamplingParams(), None)
    found = propose(logits.clone(), barred, SamplingParams(), None)
    assert torch.equal(found.tokens, wanted.tokens)
    torch.testing.assert_close(found.confidence, wanted.confidence, rtol=1e-5, atol=1e-30)
