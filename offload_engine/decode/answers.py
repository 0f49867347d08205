"""What a caller is told of an answer as it goes, and of one that is finished."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace

from offload_engine.core import Completion, SamplingParams, StepEvent
from offload_engine.decode.state import DecodingState, Request
from offload_engine.metrics import EngineStats
from offload_engine.text import Tokenizer
from offload_engine.text.answer import AnswerText


class Answer:
    """One answer under way: its text so far, and what the engine had counted when it began."""

    def __init__(
        self, prompt: Sequence[int], params: SamplingParams, tokenizer: Tokenizer | None, stats: EngineStats
    ) -> None:
        self.prompt, self.params = prompt, params
        self._text = AnswerText(tokenizer, params.stop)
        self._stats, self._before = stats, stats.snapshot()
        self._steps = self._blocks = 0
        stats.prompts += 1
        stats.prompt_tokens += len(prompt)

    def request(self, cancelled: Callable[[], bool]) -> Request:
        """What the decoder is asked."""
        return Request(self.prompt, self.params, self._text.find_stop, cancelled)

    def event(self, state: DecodingState) -> StepEvent:
        """The event of the step or block that `state` has just finished; a finished block adds to the text."""
        finished, length = state.block_finished, self.params.block_length
        self._steps += not finished
        self._blocks += finished
        if over(state):
            self._stats.new_tokens += len(state.answer)
        start = state.block * length
        first = max(start, state.prompt_length)
        return StepEvent(
            kind="block" if finished else "step",
            block=state.block - state.prompt_length // length,
            step=state.step,
            block_token_ids=tuple(state.ids[first : start + length]),
            accepted=() if finished else tuple((place - first, token, sure) for place, token, sure in state.accepted),
            text=self._text.advance(_without_eos(state), final=over(state)) if finished else "",
        )

    def completion(self, state: DecodingState) -> Completion:
        """The whole answer, once `state` is `over`. Its statistics are those of the time since it began, of which only
        prompts, tokens, blocks and steps are its own where others were answered at the same time.
        """
        assert state.finish_reason is not None
        stats = replace(
            self._stats.since(self._before),
            prompts=1,
            prompt_tokens=len(self.prompt),
            prompt_tokens_reused=state.reused,
            new_tokens=len(state.answer),
            blocks=self._blocks,
            denoise_steps=self._steps,
        )
        return Completion(self._text.whole, state.answer, state.finish_reason, stats)


def over(state: DecodingState) -> bool:
    """Whether nothing more will be told of this answer."""
    return state.block_finished and state.finish_reason is not None


def _without_eos(state: DecodingState) -> list[int]:
    """The answer's ids that have text, whether or not the tokenizer knows the eos for a special token."""
    return state.answer[:-1] if state.finish_reason == "eos" else state.answer


Events = Generator[tuple[int, StepEvent], None, None]
"""Each event with the number of its prompt."""


def events_of_one(events: Events) -> Iterator[StepEvent]:
    """The events of the only prompt there is."""
    with closing(events):
        for _number, event in events:
            yield event


def completions(events: Events) -> Iterator[tuple[int, Completion]]:
    """The finished answers, each with the number of its prompt."""
    with closing(events):
        for number, event in events:
            if event.completion is not None:
                yield number, event.completion
