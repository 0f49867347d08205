"""Training batches: word problems and drills, tokenised. The batch of a step is a function of (recipe, step) alone."""

from __future__ import annotations

import multiprocessing
import random
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from offload_engine.evaluate.arithmetic import drill, problem
from tools.training.diffusion import Batch, Example, Noise, pack

QUESTION, ANSWER = "<role>HUMAN</role>", "<|role_end|><role>ASSISTANT</role>"
"""What stands before a question, and between it and its answer: the built-in model's chat template."""
EOS, MASK = "<|endoftext|>", "<|mask|>"
STRIDE = 1024
"""Problem indices set aside for each step, so that no step's batch depends on how many another one took."""


@dataclass(frozen=True)
class Recipe:
    """Everything that a step's batch depends on but the step."""

    tokenizer: str
    """Path of a tokenizer.json."""
    seed: int
    blocks: int = 192
    """Blocks of a batch, clean and noisy together."""
    block_length: int = 32
    copies: int = 2
    """Noisings of each problem."""
    drill_share: float = 0.75
    """Share of the batch's blocks that are drills at first ..."""
    final_drill_share: float = 0.06
    """... and from step `drill_steps` on; linear in between."""
    drill_steps: int = 1800
    full_share: float = 0.3
    """See `Noise`."""
    longest: int = 160
    """Problems of more tokens are passed over."""

    def share_of_drills(self, step: int) -> float:
        """Share of the batch's blocks that are drills."""
        done = min(1.0, step / max(1, self.drill_steps))
        return self.drill_share + done * (self.final_drill_share - self.drill_share)


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer and the ids that training needs."""

    tokenizer: Tokenizer
    eos: int
    mask: int

    def encode(self, text: str) -> list[int]:
        """Token ids, special tokens recognised, none added."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids  # type: ignore[no-any-return]


@lru_cache(maxsize=4)
def vocabulary(path: str) -> Vocabulary:
    """The tokenizer at a path; read once per process."""
    tokenizer = Tokenizer.from_file(path)
    eos, mask = (tokenizer.token_to_id(token) for token in (EOS, MASK))
    if eos is None or mask is None:
        raise ValueError(f"{path}: has no {EOS if eos is None else MASK} token")
    return Vocabulary(tokenizer, eos, mask)


def prompt_text(question: str) -> str:
    """The prompt of one question."""
    return f"{QUESTION}{question}{ANSWER}"


def _padded(ids: list[int], eos: int, block_length: int) -> NDArray[np.int64]:
    return np.array(ids + [eos] * (-len(ids) % block_length), dtype=np.int64)


def answer_example(prompt: list[int], answer: list[int], eos: int, block_length: int) -> Example:
    """A prompt with its answer, an eos, and eos up to the end of the block that the answer ends in.

    Decoding stops after that block, so padding further would teach nothing.
    """
    tokens = _padded([*prompt, *answer, eos], eos, block_length)
    return Example(tokens, np.arange(len(tokens)) >= len(prompt))


def problem_example(words: Vocabulary, seed: int, index: int, block_length: int) -> Example:
    """One word problem."""
    given = problem(seed, index)
    prompt = words.encode(prompt_text(given.question))
    return answer_example(prompt, words.encode(given.answer), words.eos, block_length)


def drill_example(words: Vocabulary, rng: random.Random, block_length: int) -> Example:
    """One block of a drill line; only its results may be masked."""
    text, spans = drill(rng)
    encoding = words.tokenizer.encode(text, add_special_tokens=False)
    ids, offsets = encoding.ids[:block_length], encoding.offsets[:block_length]
    tokens = _padded(ids, words.eos, block_length)
    maskable = np.zeros(len(tokens), dtype=np.bool_)
    for index, (start, end) in enumerate(offsets):
        maskable[index] = any(first <= start and end <= last for first, last in spans)
    return Example(tokens, maskable)


def make_batch(recipe: Recipe, step: int) -> Batch:
    """The batch of one step."""
    words = vocabulary(recipe.tokenizer)
    rng = np.random.default_rng((recipe.seed, step))
    drill_rng = random.Random(f"drills {recipe.seed} {step}")
    samples: list[tuple[Example, int]] = []
    left = recipe.blocks
    reserved = round(recipe.share_of_drills(step) * recipe.blocks)
    for index in range(step * STRIDE, (step + 1) * STRIDE):
        example = problem_example(words, recipe.seed, index, recipe.block_length)
        if len(example.tokens) > recipe.longest:
            continue
        blocks = len(example.tokens) // recipe.block_length
        noisy = blocks - int(example.maskable.argmax()) // recipe.block_length
        size = blocks - 1 + recipe.copies * noisy
        if left - size < reserved:
            break
        left -= size
        samples.append((example, recipe.copies))
    samples += [(drill_example(words, drill_rng, recipe.block_length), 1) for _ in range(left)]  # exactly full
    noise = Noise(words.mask, full_share=recipe.full_share)
    return pack(samples, noise, rng, recipe.block_length)


def batches(recipe: Recipe, first_step: int, ahead: int = 8) -> Generator[Batch, None, None]:
    """The batches of `first_step`, `first_step + 1`, …, made by a worker process `ahead` of their use."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as pool:
        queue: deque[Future[Batch]] = deque()
        step = first_step
        try:
            while True:
                while len(queue) <= ahead:
                    queue.append(pool.submit(make_batch, recipe, step))
                    step += 1
                yield queue.popleft().result()
        finally:
            for future in queue:
                future.cancel()
