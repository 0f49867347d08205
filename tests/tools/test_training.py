"""Training: what a batch is, what its positions see, the experts' gradients, and runs that resume as if unbroken."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from offload_engine.core import ForwardInfo, Phase, RoutingDecision
from offload_engine.model.attention import MaskedSequence
from offload_engine.model.checkpoint import Checkpoint
from offload_engine.model.config import ModelConfig
from offload_engine.model.llada2 import Forward
from offload_engine.model.moe import ResidentExperts
from offload_engine.model.weights import load_resident
from offload_engine.routing import Coreset, RouterShape, TopK
from tools.train import main as train_command
from tools.training import checkpoint, data
from tools.training.checkpoint import Clock, Schedule
from tools.training.data import Recipe, drill_example, make_batch, vocabulary
from tools.training.diffusion import Batch, Example, Noise, Span, last_layer_rows, masked_logits, pack
from tools.training.experts import bucket_height, make_layout
from tools.training.export import config_json, export, from_published, published_tensors
from tools.training.muon import Muon, orthogonalise
from tools.training.routing import FastTopK
from tools.training.trainer import Network, Optimisation, Trainer, initialise

BLOCK = 8
MASK = 63

SMALL = {
    "model_type": "llada2_moe",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 8,
    "num_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "partial_rotary_factor": 0.5,
}
CONFIG = ModelConfig.from_dict(SMALL)


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> Network:
    made = Network(CONFIG)
    initialise(made, seed)
    generator = torch.Generator().manual_seed(seed)
    for _, router in made.routers():
        router.expert_bias = torch.randn(CONFIG.num_experts, generator=generator) * 0.1
    return made.cast(dtype)


def example(length: int, prompt: int, seed: int) -> Example:
    rng = np.random.default_rng(seed)
    return Example(rng.integers(0, MASK, length), np.arange(length) >= prompt)


def small_batch(seed: int = 0) -> Batch:
    samples = [(example(24, 10, 1), 2), (example(8, 0, 2), 1), (example(16, 9, 3), 2), (example(24, 3, 4), 1)]
    return pack(samples, Noise(MASK), np.random.default_rng(seed), BLOCK)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One token per byte, and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([data.EOS, data.MASK, "<role>", "</role>", "<|role_end|>"])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return str(path)


@pytest.fixture
def recipe(tokenizer: str) -> Recipe:
    return Recipe(tokenizer, seed=5, blocks=40, drill_share=0.5, drill_steps=10, longest=320)


# --- what a batch is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "blocks", "copies"), [*itertools.product((0, 1, 2), (3, 4), (1, 2))])
def test_block_mask_follows_the_rules_of_the_paper(first: int, blocks: int, copies: int) -> None:
    span = Span(first, blocks, copies)
    rows, mask = span.rows(), span.block_mask()
    for (row, (copy, block)), (column, (other_copy, other_block)) in itertools.product(enumerate(rows), repeat=2):
        clean, other_clean = copy == 0, other_copy == 0
        if clean:
            visible = other_clean and other_block <= block
        else:
            own = other_copy == copy and other_block == block
            visible = own or (other_clean and other_block < block)
        assert mask[row, column] == visible


def test_pruned_layout_predicts_what_the_whole_noisy_and_clean_sequence_does() -> None:
    """[noisy L | clean L] with the mask of REFERENCE §4, token by token, against the batch that training computes."""
    sample = example(32, 13, 7)
    batch = pack([(sample, 1)], Noise(MASK), np.random.default_rng(3), BLOCK)
    noisy = sample.tokens.copy()
    noisy[batch.positions[batch.masked]] = MASK
    length = len(noisy)
    mask = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    for row, column in itertools.product(range(2 * length), repeat=2):
        row_noisy, column_noisy = row < length, column < length
        row_block, column_block = row % length // BLOCK, column % length // BLOCK
        if row_noisy:
            mask[row, column] = row_block == column_block if column_noisy else column_block < row_block
        else:
            mask[row, column] = not column_noisy and column_block <= row_block
    net, policy = network(), TopK(CONFIG.router, CONFIG.num_experts_per_tok)
    forward = Forward(
        ForwardInfo(Phase.SCORE),
        torch.arange(length).repeat(2),
        torch.arange(2 * length) // BLOCK,
        MaskedSequence(mask),
        policy,
        ResidentExperts(net.experts.weights),
    )
    hidden = net.model(torch.from_numpy(np.concatenate((noisy, sample.tokens))), forward)
    expected = net.model.logits(hidden[torch.from_numpy(batch.positions[batch.masked])])
    assert len(batch.tokens) < 2 * length
    torch.testing.assert_close(masked_logits(net.model, batch, policy, net.experts, BLOCK), expected)


def test_noise_masks_answers_only_and_targets_are_what_was_there() -> None:
    batch = small_batch()
    assert (batch.tokens[batch.masked] == MASK).all()
    assert (batch.targets != MASK).all()
    assert set(batch.masked) <= set(batch.noisy)
    assert set(np.flatnonzero(batch.tokens == MASK)) == set(batch.masked)


def test_a_drill_hides_nothing_but_results(tokenizer: str) -> None:
    words = vocabulary(tokenizer)
    for seed in range(20):
        drill = drill_example(words, random.Random(seed), 32)
        text = words.tokenizer.decode(drill.tokens.tolist(), skip_special_tokens=False).split(data.EOS)[0]
        hidden = "".join("_" if hide else letter for letter, hide in zip(text, drill.maskable, strict=False))
        for shown, whole in zip(hidden.split("."), text.split("."), strict=True):
            asked, equals, result = shown.partition("=")
            assert "_" not in asked
            assert set(result) <= {"_"}
            assert equals or not result
            assert whole.startswith(asked)


def test_last_layer_computes_whole_blocks_and_all_noisy_ones() -> None:
    batch = small_batch()
    rows = last_layer_rows(batch, BLOCK, step=4)
    assert set(batch.noisy) <= set(rows)
    assert len(rows) % (4 * BLOCK) == 0 or len(rows) == len(batch.tokens)
    assert (np.diff(rows) > 0).all()


def test_the_batch_of_a_step_depends_on_nothing_else(recipe: Recipe) -> None:
    again, other = make_batch(recipe, 3), make_batch(recipe, 4)
    for name in ("tokens", "positions", "masked", "targets", "visible"):
        np.testing.assert_array_equal(getattr(make_batch(recipe, 3), name), getattr(again, name))
    assert not np.array_equal(again.tokens, other.tokens)
    assert len(again.tokens) == len(other.tokens) == recipe.blocks * recipe.block_length
    streamed = data.batches(recipe, 3)
    np.testing.assert_array_equal(next(streamed).tokens, again.tokens)
    np.testing.assert_array_equal(next(streamed).tokens, other.tokens)
    streamed.close()


# --- experts -----------------------------------------------------------------------------------------------------


def routed(tokens: int, holes: bool) -> tuple[Tensor, Tensor, RoutingDecision]:
    """Hidden states, weights and a decision in which expert 0 is hot and some experts have nothing to do."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, CONFIG.hidden_size, generator=generator, dtype=torch.float64).requires_grad_()
    scores = torch.rand(tokens, CONFIG.num_experts, generator=generator)
    scores[:, 0] += 1
    scores[:, -3:] = -1
    experts = scores.topk(4, dim=1).indices
    weights = torch.rand(tokens, 4, generator=generator, dtype=torch.float64)
    if holes:
        experts[::3, 3] = -1
        weights[::3, 3] = 0
    weights.requires_grad_()
    return hidden, weights, RoutingDecision(experts, weights)


@pytest.mark.parametrize("holes", [False, True])
def test_experts_and_their_gradients_equal_a_plain_loop(holes: bool) -> None:
    net = network(dtype=torch.float64)
    hidden, weights, decision = routed(50, holes)
    leaves = [hidden, weights, net.experts.gate_up["1"], net.experts.down["1"]]
    toward = torch.randn(50, CONFIG.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out = net.experts.run(1, hidden, decision)
    gradients = torch.autograd.grad((out * toward).sum(), leaves)
    rows = []
    for token in range(50):
        total = torch.zeros(CONFIG.hidden_size, dtype=torch.float64)
        for choice, expert in enumerate(decision.experts[token].tolist()):
            if expert >= 0:
                gate, up, down = net.experts.weights(1, expert)
                active = torch.nn.functional.silu(gate @ hidden[token]) * (up @ hidden[token])
                total = total + weights[token, choice] * (down @ active)
        rows.append(total)
    plain = torch.stack(rows)
    torch.testing.assert_close(out, plain)
    expected = torch.autograd.grad((plain * toward).sum(), leaves)
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_layout_gives_every_choice_a_slot_of_its_own_in_its_experts_bucket() -> None:
    _, _, decision = routed(60, holes=True)
    layout = make_layout(decision.experts, CONFIG.num_experts)
    slots = layout.slots[decision.experts >= 0]
    assert slots.unique().numel() == slots.numel()
    assert (layout.slots[decision.experts < 0] == layout.size).all()
    tokens = torch.arange(60).unsqueeze(1).expand(-1, 4)[decision.experts >= 0]
    assert torch.equal(layout.tokens[slots], tokens)
    owner = torch.empty(layout.size, dtype=torch.int64)
    for b in layout.buckets:
        experts = layout.by_load[b.first : b.first + b.experts]
        owner[b.start : b.start + b.experts * b.height] = experts.repeat_interleave(b.height)
    assert torch.equal(owner[slots], decision.experts[decision.experts >= 0])


def test_bucket_heights_are_few() -> None:
    heights = [bucket_height(rows) for rows in range(1, 6000)]
    assert all(height >= rows for rows, height in enumerate(heights, start=1))
    assert len(set(heights)) < 32


def test_fast_top_k_is_the_original_policy() -> None:
    shape = RouterShape(num_experts=64, top_k=6, n_group=8, topk_group=3, routed_scaling_factor=2.5)
    logits = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    bias = torch.randn(64, generator=torch.Generator().manual_seed(1)) * 0.2
    blocks = torch.arange(200) // 8
    for one in (shape, RouterShape(64, 6)):
        mine, theirs = FastTopK(one)(logits, bias, blocks), TopK(one, 6)(logits, bias, blocks)
        assert torch.equal(mine.experts, theirs.experts)
        torch.testing.assert_close(mine.weights, theirs.weights)


# --- optimiser and runs ------------------------------------------------------------------------------------------


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    for shape in ((3, 16, 40), (40, 16)):
        matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        values = torch.linalg.svdvals(orthogonalise(matrices).float())
        assert values.min() > 0.4
        assert values.max() < 1.4


def test_stacked_matrices_are_orthogonalised_apart() -> None:
    start, grad = torch.zeros(2, 8, 12), torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(0))
    stacked, gate = start.clone().requires_grad_(), start[:, :4].clone().requires_grad_()
    stacked.stacked = 2  # type: ignore[attr-defined]
    stacked.grad, gate.grad = grad.clone(), grad[:, :4].clone()
    Muon([stacked, gate], lr=0.1).step()
    torch.testing.assert_close(stacked[:, :4], gate)


def small_trainer(policy: FastTopK | Coreset | None = None, dtype: torch.dtype = torch.bfloat16) -> Trainer:
    trainer = Trainer(CONFIG, policy or FastTopK(CONFIG.router), Optimisation(), dtype)
    trainer.initialise(1)
    return trainer


def test_a_resumed_run_repeats_the_unbroken_one_exactly(tmp_path: Path) -> None:
    batches = [small_batch(seed) for seed in range(6)]
    schedule = Schedule(warmup=2, decay_start=3, end=6)
    unbroken = small_trainer()
    losses = [unbroken.step(b, schedule.factor(i), BLOCK).loss for i, b in enumerate(batches)]
    first = small_trainer()
    for i in range(3):
        first.step(batches[i], schedule.factor(i), BLOCK)
    checkpoint.save(tmp_path / "last.pt", {"trainer": first.state_dict()})
    second = small_trainer()
    second.load_state_dict(checkpoint.load(tmp_path / "last.pt")["trainer"])
    assert [second.step(batches[i], schedule.factor(i), BLOCK).loss for i in range(3, 6)] == losses[3:]
    for name, weight in unbroken.average.items():
        assert torch.equal(weight, second.average[name])


def test_training_learns_one_batch_under_either_routing() -> None:
    for policy in (None, Coreset(CONFIG.router, 0.6, 6)):
        trainer = small_trainer(policy)
        losses = [trainer.step(small_batch(), 1.0, BLOCK).loss for _ in range(25)]
        assert losses[-1] < 0.6 * losses[0]


def test_bias_moves_against_load() -> None:
    trainer = small_trainer()
    trainer.step(small_batch(), 1.0, BLOCK)
    for layer, bias in trainer.biases().items():
        loads = trainer.network.experts.loads[int(layer)]
        assert bias[loads.argmax()] < 0 < bias[loads.argmin()]


def test_a_loss_that_is_not_finite_stops_before_anything_changes() -> None:
    trainer = small_trainer()
    with torch.no_grad():
        trainer.network.model.lm_head.weight[0, 0] = torch.nan
    before = {name: master.clone() for name, master in trainer.masters.items()}
    with pytest.raises(FloatingPointError, match="step 0"):
        trainer.step(small_batch(), 1.0, BLOCK)
    assert all(torch.equal(before[name], master) for name, master in trainer.masters.items())


def test_saving_keeps_the_old_checkpoint_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"x": torch.ones(3)})
    with pytest.raises(Exception, match="pickle"):
        checkpoint.save(path, {"x": lambda: None})
    assert torch.equal(checkpoint.load(path)["x"], torch.ones(3))
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_schedule_warms_up_holds_and_decays_by_the_clock() -> None:
    schedule = Schedule(warmup=10, floor=0.0)
    assert schedule.factor(0) == pytest.approx(0.1)
    assert schedule.factor(500) == 1.0
    clock = Clock(minutes=10, decay_share=0.25, started=100.0)
    assert clock.decay_steps(now=100 + 449, steps_done=900) is None
    assert clock.decay_steps(now=100 + 450, steps_done=900) == 300
    schedule.start_decay(900, 300)
    assert schedule.factor(1050) == pytest.approx(0.5)
    assert not schedule.finished(1199)
    assert schedule.finished(1200)
    assert Schedule(**schedule.as_dict()) == schedule


# --- export ------------------------------------------------------------------------------------------------------


def test_export_is_a_checkpoint_that_computes_what_the_trainer_does(tmp_path: Path) -> None:
    net = network(3, torch.bfloat16)
    for _, router in net.routers():  # as far out as training lets them drift, where bfloat16 would lose them
        router.expert_bias = router.expert_bias + 5
    biases = {str(layer): router.expert_bias for layer, router in net.routers()}
    export(tmp_path, SMALL, published_tensors(dict(net.named_weights()), biases))
    config = ModelConfig.from_file(tmp_path / "config.json")
    opened = Checkpoint.open(tmp_path)
    model = load_resident(config, opened, torch.bfloat16)
    policy, batch = TopK(config.router, 4), small_batch()
    weights, _ = from_published({name: opened.read(name) for name in opened.tensors}, config)
    again = Network(config).bfloat16()
    with torch.no_grad():
        for name, parameter in again.named_weights():
            parameter.copy_(weights[name])
        # Without gradients on either side: our kernel, which gives none, computes both.
        expected = masked_logits(net.model, batch, policy, net.experts, BLOCK)
        assert torch.equal(masked_logits(model, batch, policy, again.experts, BLOCK), expected)
    assert all(model.layers[layer].mlp.gate.expert_bias.min() == 0 for layer in config.moe_layers)
    assert not [file for file in tmp_path.iterdir() if file.suffix == ".part"]


def test_casting_a_network_leaves_its_biases_unrounded() -> None:
    exact = torch.linspace(5, 5.1, CONFIG.num_experts)
    net = network()
    for _, router in net.routers():
        router.expert_bias = exact.clone()
    net.cast(torch.bfloat16)
    assert all(torch.equal(router.expert_bias, exact) for _, router in net.routers())


def test_config_of_a_new_model_is_one_the_engine_reads(tokenizer: str) -> None:
    options = {"hidden": 160, "ffn": 640, "layers": 4, "heads": 6, "kv_heads": 2, "shared": 12, "expert_width": 16}
    raw = config_json(vocabulary(tokenizer), options)
    config = ModelConfig.from_dict(raw)
    assert config.router == RouterShape(256, 8, 8, 4, True, 2.5)
    assert config.mask_token_id == vocabulary(tokenizer).mask


def test_command_trains_resumes_and_stops_on_a_broken_loss(tokenizer: str, tmp_path: Path) -> None:
    shape = "--hidden 32 --ffn 32 --layers 2 --heads 1 --kv-heads 1 --expert-width 8 --shared 1 --blocks 8 --warmup 1"
    arguments = ["--out", str(tmp_path), "--tokenizer", tokenizer, "--steps", "3", "--threads", "1", *shape.split()]
    run = CliRunner()
    assert run.invoke(train_command, arguments).exit_code == 0
    state = checkpoint.load(tmp_path / "last.pt")
    assert state["trainer"]["steps"] == 3
    assert "exists; continue it with --resume" in run.invoke(train_command, arguments).output
    state["schedule"]["end"] = 5
    state["trainer"]["masters"]["model.lm_head.weight"][:] = torch.nan
    checkpoint.save(tmp_path / "last.pt", state)
    broken = run.invoke(train_command, [*arguments, "--resume"])
    assert broken.exit_code == 1
    assert "step 3: the loss is nan; the last good checkpoint is" in broken.output
    assert checkpoint.load(tmp_path / "last.pt")["trainer"]["steps"] == 3
