"""Text a user typed stays text: what looks like one of the tokenizer's added tokens is kept from becoming one.

A chat template mixes the user's words with markers such as `<|role_end|>` into one string, in which the tokenizer
can't tell them apart. So before rendering, whatever it would take for an added token in the user's words is replaced
by a stand-in: one private-use character, which no token matches. After rendering, added tokens are the template's,
and the text between them gets its stand-ins resolved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

Span = tuple[int, int]
"""[first, behind the last) character."""

_PRIVATE_USE = range(0xF0000, 0xFFFFE)


class StandIns:
    """Stand-ins of one prompt, and what they stand for."""

    def __init__(
        self, texts: Iterable[str], tokens: Sequence[str], find_tokens: Callable[[str], Sequence[Span]]
    ) -> None:
        """`texts` are all strings the user gave, `tokens` the added tokens' strings.

        `find_tokens(text)` says which spans of a text the tokenizer takes for added tokens.
        """
        taken = set().union(*texts, *tokens)
        self._free = (chr(code) for code in _PRIVATE_USE if chr(code) not in taken)
        self._tokens = tokens
        self._find_tokens = find_tokens
        self._character_of: dict[str, str] = {}
        self._guard = next(self._free)
        self._text_of = {self._guard: ""}

    def protect(self, text: str) -> str:
        """`text` with stand-ins, so that no added token matches in it or across its ends."""
        while spans := self._find_tokens(text):  # replacing one may uncover another
            pieces, last = [], 0
            for start, end in spans:
                pieces += [text[last:start], self._stand_in(text[start:end])]
                last = end
            text = "".join(pieces) + text[last:]
        core = text.strip()
        if not core:
            return text
        before, _, after = text.partition(core)
        return before + self._guarded(core) + after

    def resolve(self, text: str) -> str:
        """`text` with every stand-in replaced by what it stands for."""
        return "".join(self._text_of.get(character, character) for character in text)

    def within(self, text: str) -> bool:
        """Whether `text` holds a stand-in."""
        return not self._text_of.keys().isdisjoint(text)

    def _stand_in(self, text: str) -> str:
        if text not in self._character_of:
            self._character_of[text] = character = next(self._free)
            self._text_of[character] = self.resolve(text)
        return self._character_of[text]

    def _guarded(self, core: str) -> str:
        """`core` behind guards at those ends where it could complete a token that the template begins or ends."""
        left = right = False
        for token in self._tokens:
            for cut in range(1, len(token)):
                head, tail = token[:cut], token[cut:]
                left = left or core.startswith(tail) or tail.startswith(core)
                right = right or core.endswith(head) or head.endswith(core)
        return self._guard * left + core + self._guard * right
