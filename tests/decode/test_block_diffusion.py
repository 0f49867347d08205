"""Decoding rules, on a scripted model whose confidence in each position is chosen by the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from offload_engine.core import BlockPass, Phase, SamplingParams
from offload_engine.decode.batch import decode_all
from offload_engine.decode.block_diffusion import BlockDiffusionDecoder
from offload_engine.decode.kv_cache import PrefixCache
from offload_engine.decode.state import DecodingState, Request
from offload_engine.errors import ModelError
from offload_engine.memory import plan
from offload_engine.metrics import EngineStats
from offload_engine.model.attention import MaskedSequence, block_causal_mask
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
    """Phase, first position and ids of every forward; of a prefill, of each of its pieces."""
    passes: list[tuple[BlockPass, ...]] = field(default_factory=list)

    def token(self, position: int) -> int:
        return self.tokens.get(position, position * 3 % 29)

    def __call__(self, ids: Tensor, forward: Forward) -> Tensor:
        self.forwards.append((forward.info.phase, int(forward.positions[0]), ids.tolist()))
        self.passes.append(forward.info.blocks)
        rows = torch.zeros(len(ids), VOCAB)
        for row, position in enumerate(forward.positions.tolist()):
            rows[row, self.token(position)] = self.sure(position)
        return rows

    def prefill(self, ids: Tensor, pieces: Sequence[Forward], cancelled: Callable[[], bool]) -> bool:
        for piece, part in zip(pieces, ids.split([len(piece.positions) for piece in pieces]), strict=True):
            if cancelled():
                return False
            self.forwards.append((piece.info.phase, int(piece.positions[0]), part.tolist()))
        return True

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden.clone()

    def phases(self) -> list[Phase]:
        return [phase for phase, _, _ in self.forwards]


def decoder_of(
    script: Script,
    stats: EngineStats,
    *,
    lanes: int = 1,
    context: int = 64,
    chunk: int = 512,
    fused: bool = True,
    forward_tokens: object = None,
) -> BlockDiffusionDecoder:
    caches = [PrefixCache(CONFIG, context, torch.float32, torch.device("cpu")) for _ in range(lanes)]
    return BlockDiffusionDecoder(
        script,
        None,
        None,
        caches,
        stats,
        MASK,
        EOS,
        chunk,
        fused_commit=fused,
        forward_tokens=forward_tokens,  # type: ignore[arg-type]
    )


def decode(decoder: BlockDiffusionDecoder, *request: object) -> Iterator[DecodingState]:
    for _number, state in decode_all(decoder, [Request(*request)]):  # type: ignore[arg-type]
        yield state


def run(
    script: Script, prompt: Sequence[int], context: int = 64, chunk: int = 512, **params: object
) -> tuple[DecodingState, list[tuple[int, int, bool, int]], EngineStats]:
    stats = EngineStats()
    fused, room = bool(params.pop("fused", True)), params.pop("forward_tokens", None)
    decoder = decoder_of(script, stats, context=context, chunk=chunk, fused=fused, forward_tokens=room)
    stop = params.pop("stop_check", None)
    cancelled = params.pop("cancelled", lambda: False)
    settings = SamplingParams(**{"block_length": 8, "steps": 8, "threshold": 0.9, "max_new_tokens": 16, **params})
    seen = []
    for state in decode(decoder, prompt, settings, stop, cancelled):  # type: ignore[arg-type]
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
    run(script, [], max_new_tokens=24, fused=False)
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


def test_a_fused_commit_goes_with_the_next_blocks_first_step() -> None:
    script, alone = Script(sure=lambda _: 0.1), Script(sure=lambda _: 0.1)
    state, seen, stats = run(script, [], max_new_tokens=24, steps=2)
    other = run(alone, [], max_new_tokens=24, steps=2, fused=False)
    assert (state.answer, seen) == (other[0].answer, other[1])
    assert stats.forwards == {Phase.DENOISE: 6}
    assert other[2].forwards == {Phase.DENOISE: 6, Phase.COMMIT: 2}
    assert [len(ids) for _, _, ids in script.forwards] == [8, 8, 16, 8, 16, 8]
    commit, denoise = script.passes[2]
    assert commit == BlockPass(Phase.COMMIT, 0, 0, 0, 8)
    assert denoise == BlockPass(Phase.DENOISE, 0, 1, 0, 8)
    assert MASK not in script.forwards[2][2][:8]
    assert script.forwards[2][2][8:] == [MASK] * 8


def test_a_forward_that_has_no_room_for_it_is_not_fused() -> None:
    script = Script()
    state, _, stats = run(script, [], max_new_tokens=24, forward_tokens=15)
    assert state.answer == run(Script(), [], max_new_tokens=24)[0].answer
    assert stats.forwards == {Phase.DENOISE: 3, Phase.COMMIT: 2}
    assert max(len(ids) for _, _, ids in script.forwards) == 8


requests = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 40), st.integers(1, 8), st.floats(0.01, 1), st.integers(0, 2)),
    min_size=1,
    max_size=7,
)


@given(requests, st.integers(1, 4), st.booleans(), st.sampled_from([None, 8, 16, 24, 40]), st.integers(0, 60))
def test_a_batch_answers_as_each_prompt_alone(
    asked: list[tuple[int, int, int, float, int]], lanes: int, fused: bool, room: int | None, eos_at: int
) -> None:
    def script() -> Script:
        return Script(tokens={eos_at: EOS}, sure=lambda position: 0.5 + position % 5)

    settings = [
        (
            [1 + number] * length,
            SamplingParams(block_length=8, max_new_tokens=new, steps=steps, threshold=sure, temperature=warm, seed=3),
        )
        for number, (length, new, steps, sure, warm) in enumerate(asked)
    ]
    stats, model = EngineStats(), script()
    decoder = decoder_of(model, stats, lanes=lanes, fused=fused, forward_tokens=room)
    together: dict[int, list[tuple[object, ...]]] = {}
    for number, state in decode_all(decoder, [Request(*one) for one in settings]):
        together.setdefault(number, []).append(
            (state.block, state.step, tuple(state.ids), state.block_finished, state.finish_reason, state.answer)
        )
    single = EngineStats()
    for number, (prompt, params) in enumerate(settings):
        alone = [
            (state.block, state.step, tuple(state.ids), state.block_finished, state.finish_reason, state.answer)
            for state in decode(decoder_of(script(), single), prompt, params)
        ]
        assert together[number] == alone
    assert (stats.denoise_steps, stats.blocks) == (single.denoise_steps, single.blocks)
    lanes_used = min(lanes, len(asked)) if room is None else min(lanes, len(asked), room // 8)
    assert stats.forwards[Phase.DENOISE] >= -(-stats.denoise_steps // lanes_used)
    if lanes_used == 1:
        assert stats.forwards[Phase.DENOISE] == stats.denoise_steps
    if room is not None:
        assert all(len(ids) <= room for phase, _, ids in model.forwards if phase is Phase.DENOISE)


def test_a_lane_that_falls_free_is_taken_by_the_next_prompt_at_once() -> None:
    script, stats = Script(sure=lambda _: 0.1), EngineStats()
    decoder = decoder_of(script, stats, lanes=2)
    params = [SamplingParams(block_length=8, steps=steps, max_new_tokens=8, threshold=1) for steps in (1, 4, 3)]
    for _ in decode_all(decoder, [Request([5] * 8, one) for one in params]):
        pass
    lanes = [tuple((one.lane, one.step) for one in passes) for passes in script.passes]
    assert lanes == [((0, 0), (1, 0)), ((1, 1), (0, 0)), ((1, 2), (0, 1)), ((1, 3), (0, 2))]
    assert stats.forwards == {Phase.PREFILL: 2, Phase.DENOISE: 4}, "the first two prompts are prefilled together"


@pytest.mark.parametrize(("room", "prefills"), [(64, 2), (2048, 1)])
def test_prompts_are_prefilled_together_as_far_as_the_plan_has_room(
    room: int, prefills: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "PROMPTS_TOGETHER", room)
    script, stats = Script(), EngineStats()
    decoder = decoder_of(script, stats, lanes=4, context=64, chunk=24)
    params = SamplingParams(block_length=8, max_new_tokens=1)
    prompts = [[number] * length for number, length in ((1, 33), (2, 16), (3, 15), (4, 40))]
    for _ in decode_all(decoder, [Request(prompt, params) for prompt in prompts]):
        pass
    prefilled = [ids for phase, _, ids in script.forwards if phase is Phase.PREFILL]
    apart = [[1] * 24, [1] * 8 + [2] * 16, [3] * 8, [4] * 24, [4] * 16]
    assert prefilled == (apart if prefills == 2 else [*apart[:2], [3] * 8, *apart[3:]])
    assert stats.forwards[Phase.PREFILL] == prefills


def test_the_head_is_read_once_for_what_fits_together() -> None:
    rows: list[int] = []

    class Counting(Script):
        def logits(self, hidden: Tensor) -> Tensor:
            rows.append(len(hidden))
            return super().logits(hidden)

    decoder = decoder_of(Counting(), EngineStats(), lanes=6)
    params = SamplingParams(block_length=8, steps=1, max_new_tokens=8)
    for _ in decode_all(decoder, [Request([], params)] * 6):
        pass
    assert rows == [32, 16]


@pytest.mark.parametrize("offset", [0, 8])
def test_blocks_see_what_is_before_them_and_nothing_behind(offset: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(24, heads, 8, generator=generator) for heads in (4, 2, 2))
    whole = MaskedSequence(block_causal_mask(torch.arange(24), 8)).attend(0, query, key, value)
    cache = PrefixCache(ModelConfig.from_dict(tiny_config(head_dim=8)), 32, torch.float32, torch.device("cpu"))
    if offset:
        cache.span(offset, 8).attend(0, query[:offset], key[:offset], value[:offset])
    span = cache.span(24 - offset, 8, offset)
    assert span.positions.tolist() == list(range(offset, 24))
    found = span.attend(0, query[offset:], key[offset:], value[offset:])
    torch.testing.assert_close(found, whole[offset:])


def test_a_cache_forgets_what_a_damaged_forward_left_behind() -> None:
    """In bfloat16 what lies behind a prefix is multiplied by 0, and NaN would stay NaN."""
    cache = PrefixCache(ModelConfig.from_dict(tiny_config(head_dim=8)), 96, torch.bfloat16, torch.device("cpu"))
    shape = (cache.keys.shape[2], cache.keys.shape[3])
    damaged = torch.full((96, *shape), torch.nan, dtype=torch.bfloat16)
    query = torch.ones(96, 4, 8, dtype=torch.bfloat16)
    assert cache.span(96, 32).attend(0, query, damaged, damaged).isnan().any()
    cache.reset()
    sound = torch.ones(40, *shape, dtype=torch.bfloat16)
    assert cache.span(40, 40).attend(0, query[:40], sound, sound).isfinite().all()
