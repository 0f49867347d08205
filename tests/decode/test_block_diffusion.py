"""Decoding rules, on a scripted model whose confidence in each position is chosen by the test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from offload_engine.core import Phase, SamplingParams
from offload_engine.decode.block_diffusion import BlockDiffusionDecoder, DecodingState
from offload_engine.decode.kv_cache import PrefixCache
from offload_engine.errors import ModelError
from offload_engine.metrics import EngineStats
from offload_engine.model.config import ModelConfig
from offload_engine.model.llada2 import Forward
from tests.checkpoints import tiny_config

MASK, EOS, VOCAB = 30, 31, 32
CONFIG = ModelConfig.from_dict(tiny_config(vocab_size=VOCAB))


@dataclass
class Script:
    """Stands in for a model: says token `(position * 3) % 29` everywhere, or what `tokens` says, with logit `sure`."""

    tokens: dict[int, int] = field(default_factory=dict)
    sure: Callable[[int], float] = lambda _position: 20.0
    forwards: list[tuple[Phase, int, list[int]]] = field(default_factory=list)

    def token(self, position: int) -> int:
        return self.tokens.get(position, position * 3 % 29)

    def __call__(self, ids: Tensor, forward: Forward) -> Tensor:
        self.forwards.append((forward.info.phase, int(forward.positions[0]), ids.tolist()))
        rows = torch.zeros(len(ids), VOCAB)
        for row, position in enumerate(forward.positions.tolist()):
            rows[row, self.token(position)] = self.sure(position)
        return rows

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden.clone()

    def phases(self) -> list[Phase]:
        return [phase for phase, _, _ in self.forwards]


def run(
    script: Script, prompt: Sequence[int], context: int = 64, chunk: int = 512, **params: object
) -> tuple[DecodingState, list[tuple[int, int, bool, int]], EngineStats]:
    stats = EngineStats()
    cache = PrefixCache(CONFIG, context, torch.float32, torch.device("cpu"))
    stop = params.pop("stop_check", None)
    cancelled = params.pop("cancelled", lambda: False)
    decoder = BlockDiffusionDecoder(script, None, None, cache, stats, MASK, EOS, chunk)  # type: ignore[arg-type]
    settings = SamplingParams(**{"block_length": 8, "steps": 8, "threshold": 0.9, "max_new_tokens": 16, **params})
    seen = []
    for state in decoder.decode(prompt, settings, stop, cancelled):  # type: ignore[arg-type]
        seen.append((state.block, state.step, state.block_finished, len(state.accepted)))
    return state, seen, stats


def test_the_answer_alone_is_returned_and_has_the_asked_length() -> None:
    for length in (0, 3, 8, 11):
        script = Script()
        state, _, _ = run(script, [1] * length, max_new_tokens=13)
        assert state.answer == [script.token(length + i) for i in range(13)]
        assert state.finish_reason == "length"


def test_the_prompts_whole_blocks_are_prefilled_and_the_rest_denoised_with_the_answer() -> None:
    script = Script()
    run(script, [5] * 19, max_new_tokens=5)
    phase, start, ids = script.forwards[0]
    assert (phase, start, ids) == (Phase.PREFILL, 0, [5] * 16)
    phase, start, ids = script.forwards[1]
    assert (phase, start, ids) == (Phase.DENOISE, 16, [5] * 3 + [MASK] * 5)


def test_prefill_goes_in_chunks_of_whole_blocks() -> None:
    script = Script()
    run(script, [5] * 40, chunk=20, max_new_tokens=1)
    assert [len(ids) for phase, _, ids in script.forwards if phase is Phase.PREFILL] == [16, 16, 8]


def test_each_block_but_the_last_is_committed_once() -> None:
    script = Script()
    run(script, [], max_new_tokens=24)
    assert script.phases().count(Phase.COMMIT) == 2
    commits = [ids for phase, _, ids in script.forwards if phase is Phase.COMMIT]
    assert all(MASK not in ids for ids in commits)


def test_a_sure_model_needs_one_step_a_block_and_an_unsure_one_the_whole_schedule() -> None:
    assert run(Script(), [])[2].denoise_steps == 2
    assert run(Script(sure=lambda _: 0.1), [])[2].denoise_steps == 16
    assert run(Script(sure=lambda _: 0.1), [], steps=3)[2].denoise_steps == 6


def test_positions_above_the_threshold_are_accepted_together() -> None:
    script = Script(sure=lambda position: 20.0 if position in (2, 5) else 0.5)
    _, seen, _ = run(script, [], max_new_tokens=8)
    assert seen[0] == (0, 1, False, 2)
    assert seen[1] == (0, 2, False, 1), "below the threshold the schedule's minimum is taken"


def test_early_stop_at_an_eos_with_everything_before_it_decided() -> None:
    script = Script(tokens={4: EOS})
    state, seen, _ = run(script, [], max_new_tokens=40)
    assert state.answer == [script.token(i) for i in range(4)] + [EOS]
    assert state.finish_reason == "eos"
    assert {block for block, *_ in seen} == {0}
    assert Phase.COMMIT not in script.phases()


def test_an_eos_does_not_stop_while_a_mask_is_left_before_it() -> None:
    script = Script(tokens={4: EOS}, sure=lambda position: 20.0 if position == 4 else 0.5)
    state, _, stats = run(script, [], max_new_tokens=40)
    assert stats.denoise_steps == 5, "the eos, then positions 0 to 3 one by one"
    assert state.answer[-1] == EOS
    assert len(state.answer) == 5


def test_an_eos_or_a_mask_in_the_prompt_is_the_prompts_business() -> None:
    script = Script()
    prompt = [1, EOS, MASK, 2, 3]
    state, _, _ = run(script, prompt, max_new_tokens=11)
    assert state.answer == [script.token(5 + i) for i in range(11)]
    assert state.ids[:5] == prompt
    assert script.forwards[0][2] == [*prompt, MASK, MASK, MASK]


def test_an_eos_behind_the_asked_length_does_not_count() -> None:
    state, _, _ = run(Script(tokens={6: EOS}), [], max_new_tokens=5)
    assert state.finish_reason == "length"
    assert len(state.answer) == 5


def test_the_mask_is_never_emitted() -> None:
    state, _, _ = run(Script(tokens=dict.fromkeys(range(64), MASK)), [])
    assert MASK not in state.answer
    assert len(state.answer) == 16


def test_the_context_ends_the_answer_at_whole_blocks() -> None:
    state, _, _ = run(Script(), [1] * 10, context=30, max_new_tokens=100)
    assert len(state.answer) == 24 - 10
    assert state.finish_reason == "length"


def test_a_stop_check_ends_the_answer_within_the_step() -> None:
    def stop(answer: Sequence[int]) -> int | None:
        return 3 if len(answer) >= 5 else None

    state, seen, _ = run(Script(), [], max_new_tokens=40, stop_check=stop)
    assert state.finish_reason == "stop"
    assert len(state.answer) == 3
    assert seen[-1][0] == 0


def test_a_stop_string_behind_the_eos_does_not_count() -> None:
    shown: list[int] = []

    def stop(answer: Sequence[int]) -> int | None:
        shown.append(len(answer))
        return None

    state, _, _ = run(Script(tokens={4: EOS}), [], stop_check=stop)
    assert state.finish_reason == "eos"
    assert max(shown) == 4


def test_cancelling_keeps_what_was_decided_before_the_first_mask() -> None:
    asked = iter([False, False, True])
    script = Script(sure=lambda position: 3.0 - position * 0.1)
    state, _, stats = run(script, [], cancelled=lambda: next(asked))
    assert state.finish_reason == "cancelled"
    assert stats.denoise_steps == 3
    assert state.answer == [script.token(i) for i in range(3)]


def test_cancelling_during_prefill_yields_an_empty_answer() -> None:
    asked = iter([False, True])
    state, seen, _ = run(Script(), [1] * 32, chunk=8, cancelled=lambda: next(asked))
    assert (state.finish_reason, state.answer, seen[-1][2]) == ("cancelled", [], True)


def test_logits_that_are_not_finite_are_an_error_not_an_answer() -> None:
    with pytest.raises(ModelError, match="not finite in block 0, step 0"):
        run(Script(sure=lambda _: float("nan")), [])


def test_a_block_longer_than_the_logit_rows_is_decided_whole() -> None:
    script = Script()
    state, _, _ = run(script, [1], context=128, block_length=64, steps=4, max_new_tokens=63)
    assert state.answer == [script.token(1 + i) for i in range(63)]


def test_the_cache_masks_blocks_of_a_chunk_block_causally() -> None:
    cache = PrefixCache(CONFIG, 64, torch.float32, torch.device("cpu"))
    positions = cache.begin(16, 8)
    assert positions.tolist() == list(range(16))
    assert cache._mask is not None
    assert cache._mask[:8, 8:].sum() == 0
    assert cache._mask[8:].all()
    cache.commit(16)
    assert cache.begin(8, 8).tolist() == list(range(16, 24))
    assert cache._mask is None, "one block sees all of the prefix and all of itself"
