"""Fine-tuning's objective: against a naive dense float64 model, written from the words of REFERENCE §4 alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload_engine.core import ForwardInfo, Phase, RoutingDecision
from offload_engine.model.attention import MaskedSequence
from offload_engine.model.checkpoint import Checkpoint
from offload_engine.model.config import ModelConfig
from offload_engine.model.llada2 import Forward
from offload_engine.model.moe import ResidentExperts
from offload_engine.routing import Coreset, RouterShape, RoutingOptions, RoutingPolicy
from tests.checkpoints import tiny_config, write_checkpoint
from tools.finetuning.batches import Batches
from tools.finetuning.dataset import Dataset, Overlong, Shape
from tools.finetuning.parallel import ALONE
from tools.finetuning.tuner import Optimisation, Tuner
from tools.finetuning.weights import load_network
from tools.training.diffusion import Batch, BlockAttention, Noise, pack_seeded
from tools.training.routing import FastCoreset, FastTopK, training_policy
from tools.training.trainer import Network

BLOCK, LENGTH = 8, 32
CONFIG = ModelConfig.from_dict(tiny_config())
EOS, MASK = 94, 95
SHAPE = Shape(LENGTH, CONFIG.vocab_size, EOS, MASK)
POLICY = Coreset(CONFIG.router, top_p=0.6, min_experts=6)


def dataset(count: int = 7, shape: Shape = SHAPE, seed: int = 0) -> Dataset:
    """Prompts of 1 to 20 tokens with answers of 1 to 20, some of which are cut at 32."""
    rng = np.random.default_rng(seed)
    made = Dataset(shape)
    for _ in range(count):
        prompt, answer = (rng.integers(0, EOS, rng.integers(1, 21)).tolist() for _ in range(2))
        made.add(prompt, [*answer, EOS], Overlong.CUT, "here")
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base"), tiny_config(), dtype=torch.bfloat16)


@pytest.fixture
def network(source: Path) -> Network:
    return load_network(CONFIG, Checkpoint.open(source), ALONE)


def tuner(network: Network, policy: RoutingPolicy = POLICY, **options: float) -> Tuner:
    rates = Optimisation(steps=10, **{"lr": 1e-2, "final_lr": 1e-3, **options})
    return Tuner(network, policy, rates, block_length=BLOCK, dtype=torch.float32)


# --- the oracle: [noisy L | clean L], token by token ---------------------------------------------------------------


def dense_mask(length: int, block: int) -> Tensor:
    """[2L, 2L] bool, from the words of REFERENCE §4."""
    mask = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    for row, column in itertools.product(range(2 * length), repeat=2):
        own, other = row % length // block, column % length // block
        if row < length:  # noisy: its own noisy block, and strictly earlier clean blocks
            mask[row, column] = own == other if column < length else other < own
        else:  # clean: the same and earlier clean blocks; never noisy
            mask[row, column] = column >= length and other <= own
    return mask


def noisy_half(batch: Batch, tokens: np.ndarray, prompt: int, rows: slice) -> np.ndarray:
    """The noisy half [L] of a sample, from the rows of a batch that hold it: unseen blocks are as in the clean half."""
    noisy = tokens.copy()
    first = prompt // BLOCK * BLOCK
    noisy[first:] = batch.tokens[rows][len(tokens) - BLOCK :]
    return noisy


def rows_of(data: Dataset, samples: list[int]) -> Iterator[tuple[int, slice]]:
    """(sample, its rows) in a batch of one noising each: all clean blocks but the last, then the noisy ones."""
    start = 0
    for sample in samples:
        length = len(data.example(sample).tokens)
        size = length - BLOCK + length - data.prompts[sample] // BLOCK * BLOCK
        yield sample, slice(start, start + size)
        start += size


def dense_loss(network: Network, data: Dataset, samples: list[int], batch: Batch, policy: RoutingPolicy) -> Tensor:
    """The sum of cross-entropies over masked tokens, each sample's 2L positions in one plain forward."""
    total = torch.zeros((), dtype=torch.float64)
    for sample, rows in rows_of(data, samples):
        tokens = data.example(sample).tokens
        length = len(tokens)
        noisy = noisy_half(batch, tokens, data.prompts[sample], rows)
        forward = Forward(
            ForwardInfo(Phase.SCORE),
            torch.arange(length).repeat(2),
            torch.arange(2 * length) // BLOCK,
            MaskedSequence(dense_mask(length, BLOCK)),
            policy,
            ResidentExperts(network.experts.weights),
        )
        hidden = network.model(torch.from_numpy(np.concatenate((noisy, tokens))), forward)
        masked = torch.from_numpy(np.flatnonzero(noisy == MASK))
        logits = F.linear(hidden[masked], network.model.lm_head.weight)  # not `logits`, which rounds to float32
        total = total + F.cross_entropy(logits, torch.from_numpy(tokens)[masked], reduction="sum")
    return total


def test_loss_and_gradients_are_those_of_the_whole_noisy_and_clean_sequence(network: Network) -> None:
    data = dataset()
    batches = Batches(data, seed=3, batch=5, micro_batch=2, block_length=BLOCK)
    step, made = tuner(network), list(batches.of_step(1))
    scale = 1 / sum(len(batch.masked) for batch in made)
    mine = sum(float(step._accumulate(batch, POLICY, scale)[0]) for batch in made) * scale
    gradients = {name: weight.grad.double() for name, weight in network.named_weights() if weight.grad is not None}
    network.double().zero_grad()
    samples = [[batches.sample(1, place) for place in places] for places in ((0, 1), (2, 3), (4,))]
    exact = sum(
        dense_loss(network, data, part, batch, POLICY) * scale for part, batch in zip(samples, made, strict=True)
    )
    assert isinstance(exact, Tensor)
    exact.backward()
    assert mine == pytest.approx(exact.item(), rel=1e-5)
    for name, weight in network.named_weights():
        torch.testing.assert_close(
            gradients[name], weight.grad, rtol=2e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@settings(max_examples=60)
@given(
    blocks=st.integers(1, 4),
    block=st.sampled_from([2, 3, 4]),
    copies=st.integers(1, 2),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_construction_follows_the_words_of_the_paper(
    blocks: int, block: int, copies: int, seed: int, data: st.DataObject
) -> None:
    """What stands where, and what each block sees, for every layout of prompt and answer."""
    length = blocks * block
    prompt = data.draw(st.integers(0, length - 1))
    answer = data.draw(st.integers(1, length - prompt))
    made = Dataset(Shape(length, CONFIG.vocab_size, EOS, MASK))
    made.add(list(range(prompt)), list(range(50, 50 + answer)), Overlong.ERROR, "here")
    example = made.example(0)
    batch = pack_seeded([(example, copies, np.random.default_rng(seed))], Noise(MASK, 0.3, 0.8, 0.0), block)
    clean = [*range(prompt), *range(50, 50 + answer), *[EOS] * (length - prompt - answer)]
    assert example.tokens.tolist() == clean
    rows = batch.tokens.reshape(-1, block)
    places = batch.positions.reshape(-1, block)
    kinds = [0] * (blocks - 1) + [1 + i for i in range(copies) for _ in range(prompt // block, blocks)]
    assert len(rows) == len(kinds)
    full = dense_mask(length, block)
    for row, (tokens, positions, kind) in enumerate(zip(rows, places, kinds, strict=True)):
        assert (np.diff(positions) == 1).all()
        assert positions[0] % block == 0
        for token, position in zip(tokens, positions, strict=True):
            hidden = kind and position >= prompt and token == MASK
            assert hidden or token == clean[position]
        seen = {(kinds[other], int(places[other, 0]) // block) for other in batch.visible[row].tolist() if other >= 0}
        wanted = set()
        at = int(positions[0]) + (0 if kind else length)
        for other in range(blocks):
            if full[at, other * block]:
                wanted.add((kind, other))
            if full[at, length + other * block]:
                wanted.add((0, other))
        assert seen == wanted
    assert batch.targets.tolist() == [clean[position] for position in batch.positions[batch.masked]]
    assert set(np.flatnonzero(batch.tokens == MASK)) == set(batch.masked)


def test_answers_with_their_pads_are_masked_at_one_rate_a_sample_and_prompts_never() -> None:
    data = dataset(40, Shape(1024, CONFIG.vocab_size, EOS, MASK))
    batches = Batches(data, seed=1, batch=1, micro_batch=1)
    rates = []
    for step in range(60):
        (batch,) = batches.of_step(step)
        prompt = data.prompts[batches.sample(step, 0)]
        masked = np.zeros(1024, dtype=bool)
        masked[batch.positions[batch.masked]] = True
        assert not masked[:prompt].any()
        halves = np.array_split(masked[prompt:], 2)
        rates.append([half.mean() for half in halves])
    first, second = np.array(rates).T
    assert np.abs(first - second).max() < 0.15  # a rate per token or per block would differ more, one per sample less
    means = (first + second) / 2
    assert means.min() > 0.3 - 0.06
    assert means.max() < 0.8 + 0.06
    assert np.abs(np.quantile(means, [0.25, 0.5, 0.75]) - [0.425, 0.55, 0.675]).max() < 0.08


def test_pads_behind_the_answer_are_in_the_loss() -> None:
    data = dataset(3)
    (batch,) = Batches(data, seed=0, batch=3, micro_batch=3, block_length=BLOCK).of_step(0)
    prompts = {sample: data.prompts[sample] for sample in range(3)}
    assert (batch.targets == EOS).sum() > len(prompts)


def test_accumulation_equals_one_big_batch(source: Path) -> None:
    data, results = dataset(12), []
    start = {
        name: weight.detach() for name, weight in load_network(CONFIG, Checkpoint.open(source), ALONE).named_weights()
    }
    for micro_batch in (6, 4, 1):
        network = load_network(CONFIG, Checkpoint.open(source), ALONE)
        batches = Batches(data, seed=0, batch=6, micro_batch=micro_batch, block_length=BLOCK)
        step = tuner(network)
        count = batches.micro_batches()
        reports = [step.step(batches.of_step(number), [POLICY] * count) for number in range(3)]
        results.append((reports, {name: weight.detach() for name, weight in network.named_weights()}))
    (whole, weights), *others = results
    for reports, theirs in others:
        for mine, other in zip(whole, reports, strict=True):
            assert mine.loss == pytest.approx(other.loss, rel=1e-4)
            assert mine.masked == other.masked
        apart = sum(float((weight - theirs[name]).norm()) for name, weight in weights.items())
        moved = sum(float((weight - start[name]).norm()) for name, weight in weights.items())
        assert apart < 1e-3 * moved


def test_padding_to_the_block_leaves_out_nothing_but_blocks_of_pads() -> None:
    whole = dataset(9)
    short = dataset(9, Shape(LENGTH, CONFIG.vocab_size, EOS, MASK, pad_multiple=BLOCK))
    for index in range(9):
        mine, theirs = short.example(index), whole.example(index)
        length = len(mine.tokens)
        assert length % BLOCK == 0
        np.testing.assert_array_equal(mine.tokens, theirs.tokens[:length])
        np.testing.assert_array_equal(mine.maskable, theirs.maskable[:length])
        assert (theirs.tokens[length:] == EOS).all()


# --- routing -------------------------------------------------------------------------------------------------------


class Recorded:
    """A policy that keeps what it was asked."""

    name = "recorded"

    def __init__(self, policy: RoutingPolicy) -> None:
        self.policy = policy
        self.calls: list[tuple[Tensor, Tensor | None, Tensor, RoutingDecision]] = []

    def __call__(self, logits: Tensor, bias: Tensor | None, block_ids: Tensor) -> RoutingDecision:
        decision = self.policy(logits, bias, block_ids)
        self.calls.append((logits.detach(), bias, block_ids, decision))
        return decision


def test_every_block_of_every_sample_has_the_coreset_that_the_policy_gives_it_alone(network: Network) -> None:
    data = dataset(4)
    (batch,) = Batches(data, seed=0, batch=4, micro_batch=4, block_length=BLOCK).of_step(0)
    policy = Recorded(FastCoreset(POLICY))
    network(batch, policy, BLOCK)
    assert [len(call[0]) for call in policy.calls[:-1]] == [len(batch.tokens)] * (len(CONFIG.moe_layers) - 1)
    for logits, bias, block_ids, decision in policy.calls:
        assert logits.dtype == torch.float32
        assert bias is not None
        assert decision.coreset is not None
        assert torch.equal(block_ids, torch.arange(len(logits)) // BLOCK)
        for block, rows in enumerate(torch.arange(len(logits)).split(BLOCK)):
            alone = POLICY(logits[rows], bias, torch.zeros(BLOCK, dtype=torch.int64))
            assert alone.coreset is not None
            assert torch.equal(decision.coreset[block], alone.coreset[0])
            assert torch.equal(decision.experts[rows].sort(dim=1).values, alone.experts.sort(dim=1).values)


@settings(max_examples=80)
@given(
    groups=st.sampled_from([(1, 1), (4, 2), (8, 3)]),
    top_p=st.sampled_from([0.05, 0.4, 0.6, 1.0]),
    least=st.integers(1, 16),
    spread=st.sampled_from([0.0, 1.0, 4.0]),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_fast_coreset_is_the_dmoe_policy(
    groups: tuple[int, int], top_p: float, least: int, spread: float, bias: bool, seed: int
) -> None:
    shape = RouterShape(32, 4, *groups, routed_scaling_factor=2.5)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(40, 32, generator=generator) + spread * torch.randn(32, generator=generator)
    offsets = torch.randn(32, generator=generator) * 0.2 if bias else None
    exact = Coreset(shape, top_p, least)
    mine, theirs = (policy(logits, offsets, torch.arange(40) // BLOCK) for policy in (FastCoreset(exact), exact))
    assert mine.coreset is not None
    assert theirs.coreset is not None
    assert torch.equal(mine.coreset, theirs.coreset)
    assert torch.equal(mine.experts, theirs.experts)
    torch.testing.assert_close(mine.weights, theirs.weights)


def test_policies_are_trained_under_in_their_fast_form() -> None:
    fast = training_policy("dmoe", CONFIG, RoutingOptions(top_p=0.5, min_experts=7))
    assert fast == FastCoreset(Coreset(CONFIG.router, 0.5, 7))
    assert training_policy("original", CONFIG, RoutingOptions()) == FastTopK(CONFIG.router)
    assert training_policy("des-seq", CONFIG, RoutingOptions()).name == "des-seq"


# --- the step ------------------------------------------------------------------------------------------------------


def test_fused_attention_is_the_one_written_out(network: Network) -> None:
    (batch,) = Batches(dataset(3), seed=0, batch=3, micro_batch=3, block_length=BLOCK).of_step(0)
    attention = BlockAttention(torch.from_numpy(batch.visible), BLOCK, torch.float32)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(len(batch.tokens), 4, 8, generator=generator)
    key, value = (torch.randn(len(batch.tokens), 2, 8, generator=generator) for _ in range(2))
    plain = attention.attend(0, query, key, value)
    assert not attention.fused
    attention.fused = True  # what a GPU gets
    torch.testing.assert_close(attention.attend(0, query, key, value), plain)


def test_learning_rate_rises_then_follows_half_a_cosine() -> None:
    rates = Optimisation(steps=101, lr=1e-3, final_lr=1e-4, warmup=0.2)
    assert rates.rate(0) == pytest.approx(1e-3 / 20)
    assert rates.rate(19) == rates.rate(20) == pytest.approx(1e-3)
    assert rates.rate(60) == pytest.approx((1e-3 + 1e-4) / 2)
    assert rates.rate(100) == pytest.approx(1e-4)


def test_bias_stays_and_matrices_alone_decay(network: Network) -> None:
    biases = {layer: router.expert_bias.clone() for layer, router in network.routers()}
    norm = network.model.model.norm.weight
    head = network.model.lm_head.weight
    step = tuner(network, lr=1e-2, weight_decay=0.5)
    assert not any(router.expert_bias.requires_grad for _, router in network.routers())
    decays = {id(weight): group["weight_decay"] for group in step.adam.param_groups for weight in group["params"]}
    assert decays[id(norm)] == 0
    assert decays[id(head)] == 0.5
    assert len(decays) == len(list(network.parameters()))
    step.step(Batches(dataset(), seed=0, batch=4, micro_batch=4, block_length=BLOCK).of_step(0), [POLICY])
    assert all(torch.equal(router.expert_bias, biases[layer]) for layer, router in network.routers())


def test_gradient_is_clipped_to_its_norm(network: Network) -> None:
    step, seen = tuner(network, clip=0.01), []
    step.adam.register_step_pre_hook(
        lambda adam, *_: seen.append(torch.nn.utils.get_total_norm([w.grad for w in network.parameters()]).item())
    )
    report = step.step(Batches(dataset(), seed=0, batch=4, micro_batch=4, block_length=BLOCK).of_step(0), [POLICY])
    assert report.norm > 0.01
    assert seen == [pytest.approx(0.01, rel=1e-4)]


def test_training_in_bfloat16_learns_and_routes_in_float32(network: Network) -> None:
    policy = Recorded(FastCoreset(POLICY))
    step = Tuner(network, policy, Optimisation(steps=100, lr=1e-2, final_lr=1e-2), block_length=BLOCK)
    batches = list(Batches(dataset(), seed=0, batch=6, micro_batch=6, block_length=BLOCK).of_step(0))
    losses = [step.step(batches, [policy]).loss for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]
    assert all(weight.dtype == torch.float32 for weight in network.parameters())
    hidden = torch.randn(5, CONFIG.hidden_size)
    _, router = next(network.routers())
    with step.autocast:
        inside = router(hidden)
    assert torch.equal(inside, F.linear(hidden, router.weight))
    with step.autocast:
        low = network(batches[0], policy, BLOCK)
    high = network(batches[0], policy, BLOCK)
    assert 0 < (low - high).norm() < 0.1 * high.norm()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_anything_changes(
    network: Network, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = tuner(network)
    batches = Batches(dataset(), seed=0, batch=4, micro_batch=4, block_length=BLOCK)
    step.step(batches.of_step(0), [POLICY])
    if where == "loss":
        with torch.no_grad():
            network.model.lm_head.weight[0, 0] = torch.nan
    else:
        network.model.model.norm.weight.register_hook(lambda grad: grad * torch.inf)
    before = {name: weight.detach().clone() for name, weight in network.named_weights()}
    with pytest.raises(FloatingPointError, match=f"step 1: the {where}"):
        step.step(batches.of_step(1), [POLICY])
    for name, weight in network.named_weights():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=0, equal_nan=True)
        assert weight.grad is None
    assert step.steps == 1
