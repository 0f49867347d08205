"""The text of single tokens of a block that isn't finished yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from offload_engine.text.tokenizer import StreamDecoder, Tokenizer


def token_texts(ids: Sequence[int], signs: Mapping[int, str], tokenizer: Tokenizer | None) -> list[str]:
    """What each of `ids` adds to the text of its run between `signs`, which stand for themselves.

    A character spread over several tokens appears at the last of them. Without a tokenizer ids are numbers.
    """
    texts: list[str] = []
    run: StreamDecoder | None = None
    for id_ in ids:
        if id_ in signs:
            if run is not None:
                texts[-1] += run.finish()
            run = None
            texts.append(signs[id_])
        elif tokenizer is None:
            texts.append(f" {id_}")
        else:
            run = run or StreamDecoder(tokenizer, skip_special=False)
            texts.append(run.push([id_]))
    if run is not None:
        texts[-1] += run.finish()
    return texts
