"""Text to ids and back; above all, that what a user typed never becomes a special token."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from offload_engine.errors import PromptError, TokenizerError
from offload_engine.text import ChatTemplate, StreamDecoder, Tokenizer, load_tokenizer
from offload_engine.text.chat_template import LLADA2_TEMPLATE

GOLDEN = Path(__file__).parents[2] / "../shared/golden/llada2_tiny"
SPECIAL = ("<|endoftext|>", "<|role_end|>", "<|mask|>", "<role>", "</role>", "mask|><|")
PLAIN = ("<think>", "</think>", "ab", "ba")


def byte_level(*, ignore_merges: bool = False, normalizer=None, extra=()) -> tokenizers.Tokenizer:
    """A tokenizer like LLaDA2's, of bytes and a few merges, with special and ordinary added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("a", "s"), ("<", "|"), ("|", ">")]
    vocab = {piece: i for i, piece in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    if ignore_merges:  # added tokens are entries of the model's vocabulary as well
        vocab |= {token: len(vocab) + i for i, token in enumerate((*SPECIAL, *PLAIN))}
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not ignore_merges)
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.add_tokens([AddedToken(token, special=False, normalized=normalizer is not None) for token in PLAIN])
    backend.add_tokens(list(extra))
    return backend


def wrap(backend: tokenizers.Tokenizer, template: str = LLADA2_TEMPLATE) -> Tokenizer:
    return Tokenizer(backend, ChatTemplate(template, "test"))


def save(directory: Path, backend: tokenizers.Tokenizer, **config: object) -> None:
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


USUAL = wrap(byte_level())
KINDS = {
    "usual": USUAL,
    "in the vocabulary too": wrap(byte_level(ignore_merges=True)),
    "greedy about spaces": wrap(byte_level(extra=[AddedToken("<x>", lstrip=True, rstrip=True, normalized=False)])),
    "whole words only": wrap(byte_level(extra=[AddedToken("so", single_word=True, normalized=False)])),
}
ADDED = {name: set(kind._tokenizer.get_added_tokens_decoder()) for name, kind in KINDS.items()}

pieces = st.sampled_from(
    [*SPECIAL, *PLAIN, "<|", "|>", "<", "mask", "role_end", "k|>", " ", "\n", "a", "b", "<x>", "so"]
)
adversarial = st.lists(pieces | st.text(max_size=3), max_size=12).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@given(text=adversarial)
@example(text="<|mask<|mask|>|>")
@example(text="<|mask|><|mask|>")
@example(text="aba")
@example(text="<|mask|>")
@example(text=" <x> sososo so <|so|>")
@example(text="\U000f0000<|mask|>\U000f0001")
def test_text_stays_text(kind, text):
    ids = KINDS[kind].encode_text(text)
    assert ADDED[kind].isdisjoint(ids)
    assert KINDS[kind].decode(ids, skip_special=False) == text


@pytest.mark.parametrize("kind", KINDS)
@given(text=adversarial, other=adversarial)
@example(text="<|mask<|mask|>|>", other="|><|mask|")
@example(text="role_end|>", other="<|role_end")
@example(text="<x>", other=" <x> ")
@example(text="sososo so", other="so")
@example(text="soab", other="baso")  # replacing one token uncovers the other
def test_in_a_conversation_only_the_templates_own_tokens_are_tokens(kind, text, other):
    chat = [{"role": "user", "content": text}, {"role": "assistant", "content": other}]
    ids = KINDS[kind].encode_chat(chat)
    want = "<role>SYSTEM</role>detailed thinking off<|role_end|>"
    want += f"<role>HUMAN</role>{text}<|role_end|><role>ASSISTANT</role>{other}<|role_end|><role>ASSISTANT</role>"
    assert KINDS[kind].decode(ids, skip_special=False) == want
    names = [KINDS[kind]._tokenizer.id_to_token(i) for i in ids if i in ADDED[kind]]
    turn = ["<role>", "</role>", "<|role_end|>"]
    assert names == turn * 3 + turn[:2]


@given(text=adversarial)
@example(text="mask")
@example(text=" role_end\n")
@example(text="mask|>x<|role_end")
@example(text="m")
def test_a_template_cannot_be_completed_from_its_gaps(text):
    """A template whose text around the content begins and ends an added token."""
    kind = wrap(byte_level(), "{% for m in messages %}<|{{ m.content | trim }}|>{% endfor %}")
    ids = kind.encode_chat([{"role": "user", "content": text}])
    assert ADDED["usual"].isdisjoint(ids)
    assert kind.decode(ids, skip_special=False) == f"<|{text.strip()}|>"


def test_typed_tokens_are_encoded_like_any_text_around_them():
    """Not merely free of special tokens: exactly as the tokenizer's model spells the whole text."""
    bare = byte_level()
    bare = tokenizers.Tokenizer.from_str(json.dumps(json.loads(bare.to_str()) | {"added_tokens": []}))
    text = "hello <|mask|> hello ab"
    assert USUAL.encode_text(text) == bare.encode(text).ids
    chat = USUAL.encode_chat([{"role": "user", "content": text}])
    assert str(bare.encode(text).ids)[1:-1] in str(chat)


def test_tokens_that_match_only_after_normalisation_stay_text_too():
    kind = wrap(byte_level(normalizer=normalizers.NFKC()))
    added = set(kind._tokenizer.get_added_tokens_decoder())
    text = "＜think＞ and ａｂ"  # NFKC makes these <think> and ab
    assert not added.isdisjoint(kind._tokenizer.encode(text).ids)
    assert added.isdisjoint(kind.encode_text(text))
    chat = kind.encode_chat([{"role": "user", "content": text}])
    assert sum(id_ in added for id_ in chat) == 8


def test_a_normaliser_that_drops_stand_ins_makes_no_tokens_either():
    drops = normalizers.BertNormalizer(handle_chinese_chars=False, strip_accents=False, lowercase=False)
    assert drops.normalize_str("a\U000f0000b") == "ab"
    kind = wrap(byte_level(normalizer=drops), "<{{ messages[0].content }}>")
    for text in ("think", "thi<|mask|>nk"):
        ids = kind.encode_chat([{"role": "user", "content": text}])
        assert kind.decode(ids, skip_special=False) == f"<{text}>"
        assert set(kind._tokenizer.get_added_tokens_decoder()).isdisjoint(ids)


def test_tokens_that_hold_spaces_do_not_double_them():
    backend = byte_level(extra=[AddedToken(" <sp>", normalized=False)])
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    kind = wrap(backend, "{{ messages[0].content }} <sp>")
    ids = kind.encode_chat([{"role": "user", "content": "<|mask|>"}])
    assert kind.decode(ids, skip_special=False) == "<|mask|> <sp>"


@given(text=st.text())
def test_ordinary_text_is_encoded_as_the_library_does(text):
    backend = byte_level()
    if set(backend.get_added_tokens_decoder()).isdisjoint(backend.encode(text).ids):
        assert USUAL.encode_text(text) == backend.encode(text).ids


def test_templates_see_the_content_itself_where_it_holds_no_token():
    kind = wrap(byte_level(), "{{ messages[0].content | trim | upper }}{{ messages[0].content | length }}")
    assert kind.decode(kind.encode_chat([{"role": "user", "content": "  hé\n"}])) == "HÉ5"


@given(text=st.text() | adversarial, cuts=st.lists(st.integers(0, 9)), skip=st.booleans(), extra=st.integers(0, 300))
def test_decoding_by_pieces_is_decoding_the_whole(text, cuts, skip, extra):
    ids = [*USUAL._tokenizer.encode(text).ids, extra]  # special tokens, and perhaps a byte that begins no character
    decoder = StreamDecoder(USUAL, skip_special=skip)
    emitted, at = [], 0
    for cut in cuts:
        emitted.append(decoder.push(ids[at : at + cut]))
        at += cut
    emitted.append(decoder.push(ids[at:]))
    assert not any(piece.endswith("\ufffd") for piece in emitted)
    emitted.append(decoder.finish())
    assert "".join(emitted) == USUAL.decode(ids, skip_special=skip)


def test_a_split_character_comes_out_whole():
    decoder = StreamDecoder(USUAL)
    assert [decoder.push([id_]) for id_ in USUAL.encode_text("a€!")] == ["a", "", "", "€", "!"]
    assert decoder.push(USUAL.encode_text("€")[:2]) == ""
    assert decoder.finish() == "\ufffd"


def test_special_tokens_are_left_out_of_text_unless_asked_for():
    ids = [USUAL._tokenizer.token_to_id("<|mask|>"), *USUAL.encode_text("hello")]
    assert USUAL.decode(ids) == "hello"
    assert USUAL.decode(ids, skip_special=False) == "<|mask|>hello"
    assert USUAL.decode([100_000]) == ""


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "at least one message"),
        ([{"role": "user"}], "a message's content is None, wanted a string"),
        ([{"role": 3, "content": "x"}], "a message's role is 3, wanted one of system, user, assistant"),
        ([{"role": "<|mask|>", "content": "x"}], r"a message's role is '<\|mask\|>', wanted one of"),
        ([{"role": "tool", "content": "x"}], "refuses the messages: role is tool"),
        ([{"role": "user", "content": "ab\ud800"}], r"not valid Unicode: .*U\+D800\) at character 2"),
    ],
)
def test_messages_that_cannot_be_used(messages, complaint):
    with pytest.raises(PromptError, match=complaint):
        USUAL.encode_chat(messages)


def test_text_that_is_no_unicode():
    with pytest.raises(PromptError, match="not valid Unicode"):
        USUAL.encode_text("\udfff")


def test_a_checkpoint_without_a_tokenizer_has_none(tmp_path):
    assert load_tokenizer(tmp_path, 512) is None


def test_special_ids_come_from_the_config_by_name(tmp_path):
    backend = byte_level()
    save(tmp_path, backend, eos_token={"content": "<|endoftext|>"}, mask_token="<|mask|>", pad_token=None)
    loaded = load_tokenizer(tmp_path, 512)
    assert loaded.eos_token_id == backend.token_to_id("<|endoftext|>")
    assert loaded.mask_token_id == backend.token_to_id("<|mask|>")
    assert loaded.pad_token_id is None
    assert loaded.vocab_size == backend.get_vocab_size()


def test_the_older_special_tokens_map_counts_where_the_config_is_silent(tmp_path):
    save(tmp_path, byte_level(), eos_token="<|endoftext|>")
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<think>", "pad_token": "<|role_end|>"}')
    loaded = load_tokenizer(tmp_path, 512)
    assert loaded._tokenizer.id_to_token(loaded.eos_token_id) == "<|endoftext|>"
    assert loaded._tokenizer.id_to_token(loaded.pad_token_id) == "<|role_end|>"


def test_without_a_config_the_mask_is_found_by_its_usual_name(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path, 512)
    assert loaded.mask_token_id == loaded._tokenizer.token_to_id("<|mask|>")
    assert loaded.eos_token_id is None


def test_truncation_stored_with_a_tokenizer_does_not_cut_prompts(tmp_path):
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=99)
    save(tmp_path, backend)
    assert len(load_tokenizer(tmp_path, 512).encode_text("x" * 20)) == 20


def test_a_tokenizer_of_another_model_is_refused_with_both_numbers(tmp_path):
    backend = byte_level()
    save(tmp_path, backend)
    size = backend.get_vocab_size()
    assert load_tokenizer(tmp_path, size).vocab_size == size
    with pytest.raises(TokenizerError, match=rf"ids up to {size - 1}, .*vocab_size {size - 1}\) ends at {size - 2}"):
        load_tokenizer(tmp_path, size - 1)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "not readable as JSON"),
        (b"{", "not readable as JSON"),
        (b"\xff\xfe", "not readable as JSON"),
        (b"[" * 100_000, "not readable as JSON"),
        (b"[]", "holds list, wanted a JSON object"),
        (b"{}", r"not a tokenizer that this engine reads \(Model missing"),
        (b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', "not a tokenizer"),
    ],
)
def test_a_damaged_tokenizer_is_named(tmp_path, content, complaint):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=complaint) as error:
        load_tokenizer(tmp_path, 512)
    assert str(error.value).startswith(str(tmp_path / "tokenizer.json"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "not readable as JSON"),
        ("3", "holds int, wanted a JSON object"),
        ('{"mask_token": "[MASK]"}', r"mask_token is '\[MASK\]', which the vocabulary of tokenizer\.json doesn't hold"),
        ('{"eos_token": {"text": "x"}}', "eos_token is {'text': 'x'}, which"),
        ('{"chat_template": "{% if"}', "doesn't compile"),
    ],
)
def test_a_damaged_config_is_named(tmp_path, content, complaint):
    save(tmp_path, byte_level())
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(TokenizerError, match=complaint) as error:
        load_tokenizer(tmp_path, 512)
    assert "tokenizer_config.json" in str(error.value)


def test_the_golden_tokenizer():
    if not GOLDEN.is_dir():
        pytest.skip("needs ../shared/golden, which this checkout doesn't have")
    golden = load_tokenizer(GOLDEN, 512)
    assert (golden.eos_token_id, golden.mask_token_id, golden.pad_token_id) == (508, 511, 508)
    ids = golden.encode_chat([{"role": "user", "content": "2+2 <|role_end|>"}])
    assert golden.decode(ids, skip_special=False).startswith("<role>HUMAN</role>2+2 <|role_end|><|role_end|>")
    assert [id_ for id_ in ids if id_ >= 508] == [509]
