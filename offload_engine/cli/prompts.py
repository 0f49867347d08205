"""Prompts from the command line: files, standard input, or the argument itself; text or token ids."""

from __future__ import annotations

import codecs
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from offload_engine.errors import PromptError, UsageError

MAX_BYTES = 16 * 2**20
"""No model's context holds a prompt of this length; a longer file is some other file."""

_SEPARATORS = re.compile(r"[\s,]+")


class Prompt(NamedTuple):
    """One prompt, and what to call it in messages."""

    source: str
    content: str | list[int]


def read_prompts(texts: Sequence[str], files: Sequence[str], *, token_ids: bool) -> list[Prompt]:
    """The prompts given with `-p` or as files ("-" is standard input), in order.

    Raises `UsageError` where there is none, or both kinds; `PromptError`, naming the source, for one that is empty,
    unreadable or no text (with `token_ids`: no list of ids).
    """
    if texts and files:
        raise UsageError(f"prompts are given with -p and as {files[0]!r}; choose one way")
    if not texts and not files:
        raise UsageError("there is no prompt; name a PROMPT_FILE, - for standard input, or -p TEXT")
    if files.count("-") > 1:
        raise UsageError("standard input (-) is named more than once, but can be read only once")
    named = [(f"-p (prompt {place})" if len(texts) > 1 else "-p", text) for place, text in enumerate(texts, start=1)]
    named += [("standard input" if file == "-" else file, _read(file)) for file in files]
    return [Prompt(source, _content(source, text, token_ids)) for source, text in named]


def _content(source: str, text: str, token_ids: bool) -> str | list[int]:
    if not text.strip():
        raise PromptError(f"{source}: the prompt is empty; write a question into it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"{source}: character {error.start} of the prompt is not valid UTF-8") from None
    return _ids(source, text) if token_ids else text


def _read(file: str) -> str:
    """The text of a file, less one newline at its end."""
    source = "standard input" if file == "-" else file
    try:
        if file == "-":
            if sys.stdin is None:
                raise PromptError(f"{source}: is closed; name a PROMPT_FILE, or use -p")
            data = sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            with Path(file).open("rb") as stream:
                data = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise PromptError(f"{source}: no such file; for a prompt on the command line use -p") from None
    except IsADirectoryError:
        raise PromptError(f"{source}: is a directory; wanted a file of UTF-8 text") from None
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise PromptError(f"{source}: can't be read ({reason})") from None
    if len(data) > MAX_BYTES:
        raise PromptError(f"{source}: longer than {MAX_BYTES} bytes, which no prompt is")
    return _decode(source, data)


def _decode(source: str, data: bytes) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{source}: byte {error.start} (0x{data[error.start]:02x}) is not UTF-8; wanted a file of UTF-8 text"
        ) from None
    zero = data.find(0)
    if zero >= 0:
        raise PromptError(f"{source}: byte {zero} is 0, so this is no text; wanted a file of UTF-8 text")
    text = text.removeprefix(codecs.BOM_UTF8.decode())
    return text[:-2] if text.endswith("\r\n") else text.removesuffix("\n")


def _ids(source: str, text: str) -> list[int]:
    """The ids of a JSON list, or of numbers between commas or white space."""
    if text.lstrip().startswith("["):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{source}: not a JSON list of token ids ({error})") from None
    else:
        found = [int(word) if word.isdecimal() and len(word) < 20 else word for word in _SEPARATORS.split(text) if word]
    for place, id_ in enumerate(found):
        if not isinstance(id_, int) or isinstance(id_, bool):
            shown = repr(id_)
            shown = shown if len(shown) <= 40 else f"{shown[:37]}..."
            raise PromptError(f"{source}: token {place} is {shown}; with --token-ids a prompt is a list of numbers")
    if not found:
        raise PromptError(f"{source}: the prompt is empty; write token ids into it")
    return list(found)
