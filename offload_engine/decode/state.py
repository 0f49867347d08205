"""One answer under way: its ids, where it stands, and when it ends (REFERENCE §2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from offload_engine.core import FinishReason, SamplingParams
from offload_engine.routing.base import RoutingPolicy

StopCheck = Callable[[Sequence[int]], int | None]
"""Given the answer's leading decided ids: how many of them to keep if a stop string occurs, else None."""


def never() -> bool:
    """Nobody cancels."""
    return False


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and how it is to be answered."""

    prompt: Sequence[int]
    params: SamplingParams
    stop: StopCheck | None = None
    cancelled: Callable[[], bool] = never
    """Asked after every step and every layer of the prefill; what was decided until then is the answer."""
    policy: RoutingPolicy | None = None
    """Who routes; None: the decoder's own."""


@dataclass(slots=True)
class DecodingState:
    """One answer under way."""

    ids: list[int]
    """Prompt and answer up to the end of the current block; the mask id where undecided."""
    prompt_length: int
    end: int
    """Where the answer is cut: `ids[:end]` is prompt and answer at their longest."""
    block: int
    """Index of the current block in the sequence."""
    reused: int = 0
    """Tokens of the prompt whose keys and values an earlier request left."""
    lane: int = 0
    """Its place among the sequences that are decoded together."""
    step: int = 0
    """Steps taken in the current block."""
    accepted: tuple[tuple[int, int, float], ...] = ()
    """(position in the sequence, token id, confidence) of what the last step unmasked."""
    block_finished: bool = False
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    """What ended the answer instead."""
    answer_length: int = 0
    """Once finished: tokens of the answer that count."""

    def finish(self, reason: FinishReason, length: int) -> None:
        """The answer ends here, `length` tokens long."""
        self.finish_reason = reason
        self.answer_length = length

    @property
    def answer(self) -> list[int]:
        """The answer's ids so far, or the whole of it once finished."""
        end = self.prompt_length + self.answer_length if self.finish_reason else len(self.ids)
        return self.ids[self.prompt_length : end]

    def open_block(self, prompt: Sequence[int], length: int, mask: int) -> None:
        """Append the current block: what the prompt says of it, then masks."""
        start = self.block * length
        known = list(prompt[start : start + length])
        self.ids += known + [mask] * (length - len(known))
        self.step = 0
        self.accepted = ()
        self.block_finished = False

    def masked(self, length: int, mask: int) -> list[int]:
        """Positions of the current block still undecided. A mask id that the prompt holds is the prompt's business."""
        first = max(self.block * length, self.prompt_length)
        return [place for place in range(first, len(self.ids)) if self.ids[place] == mask]

    def decided(self, mask: int) -> int:
        """Length of the answer before its first mask, at its longest."""
        answer = self.ids[self.prompt_length : self.end]
        return answer.index(mask) if mask in answer else len(answer)

    def check_end(self, mask: int, eos_id: int, stop: StopCheck | None) -> None:
        """Early stop: an eos, or a stop string, with everything before it decided."""
        answer = self.ids[self.prompt_length : self.prompt_length + self.decided(mask)]
        eos = answer.index(eos_id) if eos_id in answer else None
        kept = stop(answer[:eos]) if stop else None  # what follows an eos is not part of the answer
        if kept is not None:
            self.finish("stop", kept)
        elif eos is not None:
            self.finish("eos", eos + 1)
