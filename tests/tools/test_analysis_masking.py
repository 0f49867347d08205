"""The masking experiment against the plain float64 model, one sequence at a time."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from offload_engine.core import RoutingDecision
from offload_engine.engine.engine import Engine
from tests.reference_model import ReferenceModel
from tests.tools.analysis_engine import CONFIG, MASK, open_tiny, reference
from tools.analysis import masking, seam
from tools.analysis.masking import Case, Masked, block_cases, effects, losses, mask_block, token_cases

BLOCK = 8
SCALE = CONFIG["routed_scaling_factor"]


class Without(ReferenceModel):
    """Leaves out what one expert adds to some tokens of one layer."""

    def __init__(self, whole: ReferenceModel, case: Case) -> None:
        self.c, self.w, self.case = whole.c, whole.w, case

    def moe(self, x: Tensor, at: str, block: int, dmoe: tuple[float, int] | None) -> Tensor:
        out = super().moe(x, at, block, dmoe)
        if at == f"model.layers.{self.case.layer}.mlp.":
            for token in self.case.tokens:
                weight = self.chosen[-1][token].get(self.case.expert, 0.0)
                out[token] -= weight * self.swiglu(x[token], f"{at}experts.{self.case.expert}.")
        return out


def loss_of(model: ReferenceModel, masked: Masked) -> Tensor:
    logits = model.logits(list(masked.ids), BLOCK)
    return torch.stack([logits[place].logsumexp(0) - logits[place, token] for place, token in masked.targets.items()])


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with open_tiny(tmp_path_factory.mktemp("tiny")) as opened:
        yield opened


@pytest.fixture(scope="module")
def masked() -> Masked:
    rng = random.Random(6)
    return mask_block([rng.randrange(90) for _ in range(11)], [rng.randrange(90) for _ in range(12)], MASK, BLOCK, rng)


@pytest.mark.parametrize("draw", [token_cases, block_cases])
def test_the_loss_rises_as_in_the_plain_model(engine: Engine, masked: Masked, draw: type[token_cases]) -> None:
    whole, (base, decisions) = reference(), losses(engine, masked, [None])
    expected = loss_of(whole, masked)
    torch.testing.assert_close(base[0].double(), expected, rtol=1e-3, atol=1e-4)
    cases = draw(decisions, masked, 4, SCALE, random.Random(1))
    found = effects(engine, masked, cases)
    assert [effect.case for effect in found] == cases
    places = list(masked.targets)
    for case, increase in found:
        rise = loss_of(Without(whole, case), masked) - expected
        wanted = rise[places.index(case.tokens[0])] if len(case.tokens) == 1 else rise.mean()
        assert increase == pytest.approx(float(wanted), abs=2e-4)
    assert max(abs(effect.increase) for effect in found) > 1e-3, "nothing was left out"


def test_a_case_says_the_routers_weight(engine: Engine, masked: Masked) -> None:
    model = reference()
    model.logits(list(masked.ids), BLOCK)
    decisions = losses(engine, masked, [None])[1]
    for case in token_cases(decisions, masked, 8, SCALE, random.Random(2)):
        (token,) = case.tokens
        assert token in masked.targets
        assert case.weight == pytest.approx(model.chosen[case.layer - 1][token][case.expert] / SCALE, rel=1e-3)
    for case in block_cases(decisions, masked, 8, SCALE, random.Random(2)):
        layer = model.chosen[case.layer - 1]
        assert case.weight == pytest.approx(
            sum(layer[token].get(case.expert, 0.0) for token in case.tokens) / SCALE, rel=1e-3
        )


@pytest.mark.parametrize("routing", [{"routing": "original"}, {"routing": "dmoe", "top_p": 0.4, "min_experts": 4}])
def test_rows_of_a_batch_do_not_touch_each_other(engine: Engine, masked: Masked, routing: dict[str, Any]) -> None:
    with seam.routed(engine, **routing):
        decisions = losses(engine, masked, [None])[1]
        cases = token_cases(decisions, masked, 5, SCALE, random.Random(3))
        together = losses(engine, masked, [None, *cases])[0]
        for row, case in enumerate([None, *cases]):
            torch.testing.assert_close(losses(engine, masked, [case])[0][0], together[row], rtol=1e-4, atol=1e-5)


def test_every_row_votes_for_blocks_of_its_own(engine: Engine, masked: Masked, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, seen = seam.routing_policy(engine), []

    def recording(logits: Tensor, bias: Tensor | None, block_ids: Tensor) -> RoutingDecision:
        seen.append(block_ids.view(3, -1))
        return policy(logits, bias, block_ids)

    monkeypatch.setattr(masking.seam, "routing_policy", lambda _engine: recording)
    losses(engine, masked, [None, None, None])
    blocks = -(-len(masked.ids) // BLOCK)
    for ids in seen:
        assert [row.unique().tolist() for row in ids] == [
            list(range(row * blocks, (row + 1) * blocks)) for row in range(3)
        ]


def test_cases_that_do_not_fit_at_once_are_split(
    engine: Engine, masked: Masked, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = token_cases(losses(engine, masked, [None])[1], masked, 5, SCALE, random.Random(3))
    whole = effects(engine, masked, cases)
    monkeypatch.setattr(masking.seam, "most_tokens", lambda _engine: 3 * len(masked.ids))
    rows: list[int] = []
    monkeypatch.setattr(masking, "losses", lambda *given: rows.append(len(given[2])) or losses(*given))
    split = effects(engine, masked, cases)
    assert rows == [3, 3, 2]
    for one, other in zip(whole, split, strict=True):
        assert one.case == other.case
        assert one.increase == pytest.approx(other.increase, abs=1e-5)


@given(st.integers(0, 40), st.integers(1, 40), st.randoms(use_true_random=False))
def test_what_is_hidden_is_of_one_block_of_the_answer(prompt: int, answer: int, rng: random.Random) -> None:
    ids = [rng.randrange(90) for _ in range(prompt + answer)]
    masked = mask_block(ids[:prompt], ids[prompt:], MASK, BLOCK, rng)
    end = len(masked.ids)
    assert end % BLOCK == 0 or end == len(ids)
    start = (end - 1) // BLOCK * BLOCK
    assert masked.targets
    assert all(max(start, prompt) <= place < end for place in masked.targets)
    shown = [masked.targets.get(place, token) for place, token in enumerate(masked.ids)]
    assert shown == ids[:end]
    assert [place for place, token in enumerate(masked.ids) if token == MASK] == list(masked.targets)
    own = end - max(start, prompt)
    assert len(masked.targets) <= max(1, round(0.8 * own))
