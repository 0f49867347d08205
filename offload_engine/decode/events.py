"""What a caller is told of decoding as it goes."""

from __future__ import annotations

from offload_engine.core import StepEvent
from offload_engine.decode.block_diffusion import DecodingState
from offload_engine.text.answer import AnswerText


def step_event(state: DecodingState, block_length: int, text: AnswerText) -> StepEvent:
    """The event of the step or block that `state` has just finished; a finished block adds to `text`."""
    start = state.block * block_length
    first = max(start, state.prompt_length)
    return StepEvent(
        kind="block" if state.block_finished else "step",
        block=state.block - state.prompt_length // block_length,
        step=state.step,
        block_token_ids=tuple(state.ids[first : start + block_length]),
        accepted=()
        if state.block_finished
        else tuple((position - first, token, sure) for position, token, sure in state.accepted),
        text=text.advance(_without_eos(state), final=state.finish_reason is not None) if state.block_finished else "",
    )


def _without_eos(state: DecodingState) -> list[int]:
    """The answer's ids that have text, whether or not the tokenizer knows the eos for a special token."""
    return state.answer[:-1] if state.finish_reason == "eos" else state.answer
