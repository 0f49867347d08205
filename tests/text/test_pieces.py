"""The text of single tokens of a block under way."""

from __future__ import annotations

from offload_engine.text import load_tokenizer
from offload_engine.text.pieces import token_texts
from tests.cli.command_line import EOS, MASK, byte_tokenizer


def test_a_character_of_several_tokens_appears_whole(tmp_path):
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path, 261)
    ids = tuple(tokenizer.encode_text("aé\x1bé"))
    assert len(ids) == 6
    signs = {MASK: "?", EOS: "!"}
    assert token_texts((MASK, *ids, EOS), signs, tokenizer) == ["?", "a", "", "é", "\x1b", "", "é", "!"]
    cut = (*ids[:2], MASK, *ids[2:3])
    assert "".join(token_texts(cut, signs, tokenizer)) == "a\ufffd?\ufffd"
    assert token_texts((5, MASK), signs, None) == [" 5", "?"]
