"""The text of an answer under way: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from offload_engine.text import StreamDecoder, Tokenizer


class AnswerText:
    """The text of one answer as its blocks finish, cut before the first stop string."""

    def __init__(self, tokenizer: Tokenizer | None, stop: tuple[str, ...]) -> None:
        self.whole = ""
        """The text so far, what is held back included."""
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer) if tokenizer else None
        self._stop = stop
        self._end: int | None = None
        """Where the first stop string begins in the text, once one is found."""
        self._decoded = 0
        self._given = 0

    def find_stop(self, token_ids: Sequence[int]) -> int | None:
        """How many of these leading ids the text before the first stop string takes; None if there is none."""
        if not self._stop or self._tokenizer is None:
            return None
        text = self._tokenizer.decode(token_ids)
        places = [place for place in map(text.find, self._stop) if place >= 0]
        if not places:
            return None
        self._end = end = min(places)
        return next(n for n in range(len(token_ids) + 1) if len(self._tokenizer.decode(token_ids[:n])) >= end)

    def advance(self, answer: Sequence[int], *, final: bool) -> str:
        """The new text of `answer`, longer by a block than last time; what may be part of a stop string waits."""
        if self._decoder is None:
            return ""
        self.whole += self._decoder.push(answer[self._decoded :])
        self._decoded = len(answer)
        if final:
            self.whole += self._decoder.finish()
        if self._end is not None:
            self.whole = self.whole[: self._end]
        end = len(self.whole) if final else len(self.whole) - self._suspicious()
        new = self.whole[self._given : end]
        self._given = max(self._given, end)
        return new

    def _suspicious(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        return next(
            (
                n
                for n in range(min(longest, len(self.whole)), 0, -1)
                if any(s.startswith(self.whole[-n:]) for s in self._stop)
            ),
            0,
        )
