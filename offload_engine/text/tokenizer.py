"""The checkpoint's tokenizer (tokenizer.json, through the `tokenizers` library), and decoding piece by piece."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from offload_engine.errors import PromptError, TokenizerError
from offload_engine.text.chat_template import ROLES, ChatTemplate, Message, load_chat_template, token_text
from offload_engine.text.literal import Span, StandIns

LLADA2_MASK = "<|mask|>"
"""What LLaDA2's vocabularies call the mask token, should tokenizer_config.json not say."""


class Tokenizer:
    """Text and conversations to token ids, and back.

    The strings of added tokens (special or not) are text wherever a user wrote them; only a chat template's own
    become those tokens. No bos or eos is added.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        chat_template: ChatTemplate,
        *,
        eos_token_id: int | None = None,
        mask_token_id: int | None = None,
        pad_token_id: int | None = None,
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.post_processor = None  # it would add tokens, and trims offsets
        self._tokenizer = tokenizer
        self._added = {id_: token.content for id_, token in tokenizer.get_added_tokens_decoder().items()}
        self.chat_template = chat_template
        self.eos_token_id = eos_token_id
        self.mask_token_id = mask_token_id
        self.pad_token_id = pad_token_id

    @property
    def vocab_size(self) -> int:
        """One more than the largest id this tokenizer can produce."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode_text(self, text: str) -> list[int]:
        """The ids of `text` as it stands; raises `PromptError` if it isn't valid Unicode."""
        _require_unicode(text)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids if self._added.keys().isdisjoint(ids) else self._encode_literally(text)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation, ready for the assistant's answer.

        Raises `PromptError` for messages that are empty, malformed or refused by the chat template, and
        `TokenizerError` when the template fails.
        """
        if not messages:
            raise PromptError("a conversation needs at least one message, found none")
        turns = [_checked(message) for message in messages]
        stand_ins = StandIns([turn["content"] for turn in turns], list(self._added.values()), self._added_spans)
        protected = [Message(role=turn["role"], content=stand_ins.protect(turn["content"])) for turn in turns]
        return self._encode_rendered(self.chat_template.render(protected), stand_ins)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`; special tokens are left out unless `skip_special` is False, unassigned ids always."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special))

    def _added_spans(self, text: str) -> list[Span]:
        """Where `text` would become added tokens."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        found = zip(encoding.ids, encoding.offsets, strict=True)
        return [span for id_, span in found if id_ in self._added and span[0] < span[1]]

    def _encode_rendered(self, text: str, stand_ins: StandIns) -> list[int]:
        """Ids of a rendered template: its added tokens as such, what lies between with its stand-ins resolved."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        if not stand_ins.within(text):
            return list(encoding.ids)
        ids: list[int] = []
        between: list[int] = []
        start = 0
        tokens = list(zip(encoding.ids, encoding.offsets, strict=True))
        for id_, (first, end) in [*tokens, (None, (len(text), len(text)))]:
            ours = id_ is None or (id_ in self._added and not stand_ins.within(text[first:end]))
            if not ours and id_ is not None:
                between.append(id_)
                continue
            segment = text[start:first]
            ids += self._encode_literally(stand_ins.resolve(segment)) if stand_ins.within(segment) else between
            if id_ is not None:
                ids.append(id_)
            between, start = [], end
        return ids

    def _encode_literally(self, text: str) -> list[int]:
        """Ids of `text` by the model of the tokenizer alone, as if there were no added tokens."""
        encoding = self._without_added.encode(text, add_special_tokens=False)
        unknown = getattr(self._without_added.model, "unk_token", None)
        ids: list[int] = []
        for id_, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if id_ not in self._added or self._added[id_] == unknown or end - start < 2:
                ids.append(id_)
            else:  # an ordinary entry of the vocabulary has the same id: spell it otherwise
                ids += self._encode_literally(text[start : start + 1]) + self._encode_literally(text[start + 1 : end])
        return ids

    @cached_property
    def _without_added(self) -> tokenizers.Tokenizer:
        """Built when first needed: few prompts hold the string of an added token."""
        return tokenizers.Tokenizer.from_str(json.dumps(json.loads(self._tokenizer.to_str()) | {"added_tokens": []}))


class StreamDecoder:
    """Decodes ids as they come, emitting whole characters only.

    A byte-level vocabulary may split a character over several tokens: its beginning is held back until the rest is
    there. All that `push` and `finish` return is together what `Tokenizer.decode` makes of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._ids: list[int] = []
        self._emitted = ""

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids`, following those before, have made certain; may be empty."""
        self._ids += ids
        text = self._text().rstrip("\ufffd")
        if not text.startswith(self._emitted):
            return ""
        return self._emit(text)

    def finish(self) -> str:
        """The rest of the text, with U+FFFD for what never became a character."""
        return self._emit(self._text())

    def _text(self) -> str:
        # A decoder may treat a token by its neighbours, so all ids are decoded again: an answer is a few thousand.
        return self._tokenizer.decode(self._ids, self._skip_special)

    def _emit(self, text: str) -> str:
        new = text[len(self._emitted) :]
        self._emitted = text
        return new


def load_tokenizer(directory: Path, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of the checkpoint in `directory`; None if it has none (no tokenizer.json).

    `vocab_size` is the model's. Raises `TokenizerError`, naming the file, for one that is damaged, doesn't fit the
    model, or lacks a token that tokenizer_config.json names.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises nothing more specific
        _read_json(path)  # raises, and says where, if the file isn't JSON at all
        raise TokenizerError(
            f"{path}: not a tokenizer that this engine reads ({' '.join(str(error).split())})"
        ) from None
    config = _merged_config(directory)
    tokenizer = Tokenizer(
        backend,
        load_chat_template(directory, config),
        eos_token_id=_token_id(backend, config, "eos_token", directory),
        mask_token_id=_token_id(backend, config, "mask_token", directory, LLADA2_MASK),
        pad_token_id=_token_id(backend, config, "pad_token", directory),
    )
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"{path}: holds ids up to {tokenizer.vocab_size - 1}, but the model's vocabulary (vocab_size {vocab_size}) "
            f"ends at {vocab_size - 1}; the tokenizer belongs to another model"
        )
    return tokenizer


def _merged_config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json, over the older special_tokens_map.json; empty where there is neither."""
    merged: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = directory / name
        if path.is_file():
            merged |= {key: value for key, value in _read_json(path).items() if value is not None}
    return merged


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(found, dict):
        raise TokenizerError(f"{path}: holds {type(found).__name__}, wanted a JSON object")
    return found


def _token_id(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], name: str, directory: Path, usual: str | None = None
) -> int | None:
    """The id of the special token that `config` calls `name`; else of the `usual` one; else None."""
    entry = config.get(name)
    if entry is None:
        return backend.token_to_id(usual) if usual else None
    text = token_text(entry)
    id_ = backend.token_to_id(text) if text is not None else None
    if id_ is None:
        raise TokenizerError(
            f"{directory / 'tokenizer_config.json'}: {name} is {text if text is not None else entry!r}, "
            f"which the vocabulary of tokenizer.json doesn't hold; take both files from the same checkpoint"
        )
    return int(id_)


def _checked(message: Mapping[str, Any]) -> Message:
    """A message whose role is known and whose content is text; raises `PromptError` for any other."""
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise PromptError(f"a message's role is {role!r}, wanted one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise PromptError(f"a message's content is {content!r}, wanted a string")
    _require_unicode(content)
    return {"role": role, "content": content}


def _require_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the prompt is not valid Unicode: half of a surrogate pair (U+{ord(text[error.start]):04X}) "
            f"at character {error.start}; read it as UTF-8"
        ) from None
