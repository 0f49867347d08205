"""Trains the built-in model's byte-level BPE on generated problems; the same settings give the same files."""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

if __package__ in (None, ""):  # run as a script: the repository's root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from offload_engine.evaluate.arithmetic import drill, generate

END, MASK = "<|endoftext|>", "<|mask|>"
SPECIAL_TOKENS = (END, MASK, "<role>", "</role>", "<|role_end|>")
"""Their ids are the last of the vocabulary, in this order."""

ROLES = {"system": "SYSTEM", "user": "HUMAN", "assistant": "ASSISTANT"}
WORDS = r" ?\\boxed\{| ?\p{L}+|'s\b| ?[^\s\p{L}\p{N}]|\s+(?!\S)|\s+"
"""What may become one token: a word or a sign with the space before it; the start of the box counts as a word."""

VOCABULARY_MULTIPLE = 64
BYTES = 256

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    + "".join(
        f"{{%- {'if' if not number else 'elif'} message['role'] == '{role}' -%}}{{{{- '<role>{name}</role>' -}}}}"
        for number, (role, name) in enumerate(ROLES.items())
    )
    + "{%- else -%}{{- raise_exception('Unknown role: ' ~ message['role']) -}}{%- endif -%}"
    "{{- message['content'] -}}{{- '<|role_end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<role>ASSISTANT</role>' -}}{%- endif -%}"
)


def corpus(seed: int, count: int) -> Iterator[str]:
    """Questions, answers and some drills, with the names of the roles often enough to become single tokens."""
    rng = random.Random(f"tokenizer:{seed}")
    for number, made in enumerate(generate(seed, count)):
        yield made.question
        yield made.answer
        if number % 8 == 0:
            yield from ROLES.values()
            yield drill(rng)[0]


def train(vocab_size: int, seed: int, count: int) -> Tokenizer:
    """A tokenizer of exactly `vocab_size` tokens that encodes any UTF-8 text, each digit by itself.

    Raises ValueError where the size is not a multiple of 64 or the corpus is too small to fill it.
    """
    if vocab_size % VOCABULARY_MULTIPLE or vocab_size < BYTES + VOCABULARY_MULTIPLE:
        raise ValueError(f"the vocabulary must be a multiple of {VOCABULARY_MULTIPLE} above {BYTES}, not {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(seed, count), trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"{count} problems are too few to fill {vocab_size} tokens")
    return tokenizer


def config() -> dict[str, object]:
    """The contents of tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END,
        "mask_token": MASK,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def sequence(question: str, answer: str) -> str:
    """A problem as the model sees it: prompt, answer, end."""
    return f"<role>HUMAN</role>{question}<|role_end|><role>ASSISTANT</role>{answer}{END}"


def report(tokenizer: Tokenizer, seed: int, count: int) -> str:
    """Tokens per question, answer and whole sequence: mean, median, 90th and 99th percentile, most."""
    problems = list(generate(seed, count))
    texts = {
        "question": [made.question for made in problems],
        "answer": [made.answer for made in problems],
        "sequence": [sequence(made.question, made.answer) for made in problems],
    }
    lines = []
    for name, batch in texts.items():
        lengths = sorted(len(encoding.ids) for encoding in tokenizer.encode_batch(batch))
        at = {share: lengths[min(len(lengths) - 1, len(lengths) * share // 100)] for share in (50, 90, 99)}
        mean = sum(lengths) / len(lengths)
        lines.append(f"{name:9s} mean {mean:.1f}, median {at[50]}, 90% {at[90]}, 99% {at[99]}, most {lengths[-1]}")
    return "\n".join(lines)


@click.command()
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for the two files."
)
@click.option("--vocab-size", type=click.IntRange(min=BYTES), default=1024, show_default=True, help="Multiple of 64.")
@click.option("--seed", type=int, default=1, show_default=True, help="Seed of the problems to train on.")
@click.option("--problems", "count", type=click.IntRange(min=1), default=20_000, show_default=True)
def main(out: Path, vocab_size: int, seed: int, count: int) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    try:
        tokenizer = train(vocab_size, seed, count)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps(config(), indent=2) + "\n")
    click.echo(report(tokenizer, seed + 1, min(count, 5_000)))


if __name__ == "__main__":
    main()
