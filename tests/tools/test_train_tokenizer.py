"""The tokenizer: exact for any text, digits one by one, specials last, LLaDA2's chat format, short sequences."""

import json
from pathlib import Path

import jinja2
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from offload_engine.evaluate.arithmetic import generate
from tools.train_tokenizer import SPECIAL_TOKENS, main, sequence, train

ASSETS = Path(__file__).resolve().parents[2] / "offload_engine" / "assets" / "tiny"
SHIPPED = Tokenizer.from_file(str(ASSETS / "tokenizer.json"))
CONFIG = json.loads((ASSETS / "tokenizer_config.json").read_text())


def render(messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
    """The chat template as the transformers library renders it."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    template = environment.from_string(CONFIG["chat_template"])
    return template.render(messages=messages, add_generation_prompt=add_generation_prompt)


@given(st.text())
def test_any_text_survives(text: str) -> None:
    assert SHIPPED.decode(SHIPPED.encode(text).ids, skip_special_tokens=False) == text


@given(st.integers(0, 10**12), st.sampled_from(["", " ", "$", "x", "é"]))
def test_digits_are_tokens_of_their_own(number: int, before: str) -> None:
    text = f"{before}{number}."
    encoding = SHIPPED.encode(text)
    for token, (start, end) in zip(encoding.tokens, encoding.offsets, strict=True):
        if any(character.isdigit() for character in text[start:end]):
            assert token == text[start:end]
            assert end - start == 1


def test_no_token_holds_a_digit_among_others() -> None:
    digits = [token for token in SHIPPED.get_vocab() if any(character in "0123456789" for character in token)]
    assert sorted(digits) == list("0123456789")


def test_special_tokens_have_the_last_ids() -> None:
    size = SHIPPED.get_vocab_size()
    assert size == 1024
    assert [SHIPPED.id_to_token(size - len(SPECIAL_TOKENS) + index) for index in range(5)] == list(SPECIAL_TOKENS)
    for token in SPECIAL_TOKENS:
        assert SHIPPED.encode(f"a{token}b").tokens == ["a", token, "b"]
        assert SHIPPED.decode(SHIPPED.encode(f"a{token}b").ids) == "ab"


@pytest.mark.parametrize(
    "word",
    [
        "SYSTEM",
        "HUMAN",
        "ASSISTANT",
        " \\boxed{",
        " apples",
        " dollars",
        " How",
        " many",
        " gives",
        " left",
        " more",
        " each",
    ],
)
def test_common_words_are_single_tokens(word: str) -> None:
    assert len(SHIPPED.encode(word).ids) == 1


def test_chat_template() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " What is 2 + 3?\n"},
        {"role": "assistant", "content": "2+3=5. \\boxed{5}"},
    ]
    assert render(messages) == (
        "<role>SYSTEM</role>Be brief.<|role_end|><role>HUMAN</role> What is 2 + 3?\n<|role_end|>"
        "<role>ASSISTANT</role>2+3=5. \\boxed{5}<|role_end|>"
    )
    assert render(messages[1:2], add_generation_prompt=True) == (
        "<role>HUMAN</role> What is 2 + 3?\n<|role_end|><role>ASSISTANT</role>"
    )
    assert render([], add_generation_prompt=True) == "<role>ASSISTANT</role>"


def test_chat_template_refuses_an_unknown_role() -> None:
    with pytest.raises(jinja2.TemplateError, match="tool"):
        render([{"role": "tool", "content": ""}])


def test_a_training_sequence_is_the_rendered_prompt_and_the_answer() -> None:
    prompt = render([{"role": "user", "content": "Q?"}], add_generation_prompt=True)
    assert sequence("Q?", "A.") == f"{prompt}A.<|endoftext|>"


def test_config() -> None:
    assert CONFIG["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert CONFIG["eos_token"] == CONFIG["pad_token"] == "<|endoftext|>"
    assert CONFIG["mask_token"] == "<|mask|>"
    assert CONFIG["clean_up_tokenization_spaces"] is False


def test_sequences_are_short() -> None:
    texts = [sequence(made.question, made.answer) for made in generate(2, 3_000)]
    lengths = sorted(len(encoding.ids) for encoding in SHIPPED.encode_batch(texts))
    assert lengths[len(lengths) // 2] <= 80
    assert lengths[len(lengths) * 99 // 100] <= 128


def test_training_is_deterministic(tmp_path: Path) -> None:
    for name in ("one", "two"):
        arguments = ["--out", str(tmp_path / name), "--vocab-size", "448", "--problems", "400", "--seed", "9"]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        assert "sequence" in result.output
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    made = Tokenizer.from_file(str(tmp_path / "one" / "tokenizer.json"))
    assert made.get_vocab_size() == 448
    assert made.token_to_id("<|role_end|>") == 447


@pytest.mark.parametrize("size", [1000, 256])
def test_vocabulary_size_is_checked(size: int, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--out", str(tmp_path), "--vocab-size", str(size)])
    assert result.exit_code == 1
    assert "multiple of 64" in result.output
    assert not list(tmp_path.iterdir())


def test_too_small_a_corpus_is_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        train(2048, seed=0, count=5)
