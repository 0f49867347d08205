"""Writes a LLaDA2-MoE checkpoint of random weights, laid out as the hub publishes them, for tests and benchmarks.

Every tensor is drawn from a generator seeded by (seed, tensor name): equal seeds give equal bytes on one kind of CPU
and build of torch, whatever the shard size, and fewer layers are the first layers of more. Nothing is held in memory
but a few MB of one tensor.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import zlib
from collections.abc import Iterator
from math import prod, sqrt
from pathlib import Path
from typing import IO, Any, NamedTuple

import click
import torch
from torch import Tensor

if __package__ in (None, ""):  # run as a script: the repository's root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from offload_engine.config import format_bytes, parse_bytes
from offload_engine.errors import OffloadError, UsageError
from offload_engine.model.config import ModelConfig
from offload_engine.model.llada2 import LLaDA2Model
from tools.sharded_writer import Blank, Progress, header, shards, write_shards

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
CHUNK = 2**20
"""Elements drawn at a time; part of what the bytes depend on."""
ROUTER_GAIN = 1.0
"""Standard deviation of the router's logits."""
BIAS_SPREAD = 0.1
"""Standard deviation of `expert_bias`: makes some experts popular, as training does.

With these two a block's unique experts come near REFERENCE §3's 69.5 (original) and 16.6 (dMoE): measured on llada2-2gb
with 8 steps per block and temperature 1, 70 and 16 on average over the steps, rising from 31 to 98 and from 11 to 25 as
masks, which look alike, turn into tokens. Greedy answers of random weights repeat a few tokens: 51 and 14.
"""


class Preset(NamedTuple):
    """What distinguishes one size from another; the rest is LLaDA2's."""

    layers: int
    hidden: int
    dense_ffn: int
    expert_ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


PRESETS = {  # layers, hidden, dense and expert FFN, heads, KV heads, head_dim, vocab
    "llada2-nano": Preset(4, 256, 640, 32, 4, 1, 64, 8192),
    "llada2-micro": Preset(6, 512, 1280, 128, 4, 1, 128, 8192),
    "llada2-2gb": Preset(6, 1024, 2560, 256, 8, 2, 128, 8192),
}


def config_of(preset: Preset, dtype: torch.dtype, layers: int | None = None) -> dict[str, Any]:
    """A config.json (REFERENCE §1). The special ids end the vocabulary, as the golden one's do."""
    return {
        "architectures": ["LLaDA2MoeModelLM"],
        "model_type": "llada2_moe",
        "vocab_size": preset.vocab,
        "hidden_size": preset.hidden,
        "intermediate_size": preset.dense_ffn,
        "num_hidden_layers": layers or preset.layers,
        "num_attention_heads": preset.heads,
        "num_key_value_heads": preset.kv_heads,
        "head_dim": preset.head_dim,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": preset.expert_ffn,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "router_dtype": "fp32",
        "rms_norm_eps": 1e-6,
        "rope_theta": 600000,
        "rope_scaling": None,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 16384,
        "use_bias": False,
        "use_qkv_bias": False,
        "use_qk_norm": True,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "pad_token_id": preset.vocab - 4,
        "eos_token_id": preset.vocab - 4,
        "mask_token_id": preset.vocab - 1,
    }


def blanks(config: ModelConfig, dtype: torch.dtype) -> Iterator[Blank]:
    """Every tensor by its published name, in the model's order; a layer's experts come before its router."""
    with torch.device("meta"):
        resident = LLaDA2Model(config).state_dict()
    gates = {f"model.layers.{layer}.mlp.gate.weight": layer for layer in config.moe_layers}
    hidden, width = config.hidden_size, config.moe_intermediate_size
    shapes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    for name, tensor in resident.items():
        if name in gates:
            for expert, (matrix, shape) in itertools.product(range(config.num_experts), shapes.items()):
                yield Blank(f"model.layers.{gates[name]}.mlp.experts.{expert}.{matrix}.weight", shape, dtype)
        kept_wide = name.endswith("expert_bias")  # selection scores are compared in float32
        yield Blank(name, tuple(tensor.shape), torch.float32 if kept_wide else dtype)


def spread(blank: Blank) -> float:
    """Standard deviation of a tensor: 1 / sqrt(fan_in), an embedding's fan-in being its one hot token."""
    if blank.name.endswith("expert_bias"):
        return BIAS_SPREAD
    if blank.name.endswith("word_embeddings.weight"):
        return 1.0
    gain = ROUTER_GAIN if blank.name.endswith("mlp.gate.weight") else 1.0
    return gain / sqrt(blank.shape[-1])


def draw(blank: Blank, seed: int) -> Iterator[Tensor]:
    """The tensor's elements in order, in pieces; norms are 1."""
    count = prod(blank.shape)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{blank.name}".encode()))
    for start in range(0, count, CHUNK):
        piece = torch.empty(min(CHUNK, count - start))
        if "norm" in blank.name:
            piece.fill_(1.0)
        else:
            piece.normal_(std=spread(blank), generator=generator)
        yield piece.to(blank.dtype)


def special_ids(tokenizer: Path, vocab: int) -> dict[str, int]:
    """Mask, eos and pad ids of a folder's tokenizer; refuses one with more tokens than the model has rows for."""
    from tokenizers import Tokenizer

    try:
        parsed = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        named = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
    except Exception as error:  # the library raises nothing narrower
        raise UsageError(
            f"--tokenizer {tokenizer}: wanted tokenizer.json and tokenizer_config.json ({error})"
        ) from None
    largest = max(parsed.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab:
        raise UsageError(f"--tokenizer {tokenizer}: has ids up to {largest}, but the preset's vocabulary has {vocab}")
    tokens = {key: named.get(f"{key}_token") for key in ("mask", "eos", "pad")}
    contents = {key: token["content"] if isinstance(token, dict) else token for key, token in tokens.items()}
    ids = {key: parsed.token_to_id(token) for key, token in contents.items() if token is not None}
    return {f"{key}_token_id": number for key, number in ids.items() if number is not None}


def make_checkpoint(
    out: Path, config: dict[str, Any], *, seed: int, shard_bytes: int, tokenizer: Path | None, log: IO[str]
) -> int:
    """Write a checkpoint to the new folder `out`, and return its tensors' bytes. `out` appears when all is written.

    Raises `UsageError` if `out` exists or the tokenizer does not fit, `OffloadError` if the disk is too small or fails.
    """
    out = out.resolve()
    if out.exists():
        raise UsageError(f"--out {out}: exists already; choose another folder, or remove this one")
    if tokenizer is not None:
        config = config | special_ids(tokenizer, config["vocab_size"])
    tensors = list(blanks(ModelConfig.from_dict(config), getattr(torch, config["torch_dtype"])))
    total = sum(blank.nbytes for blank in tensors)
    partial = out.with_name(out.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # what a killed run left
        partial.mkdir(parents=True)
        split = shards(tensors, shard_bytes)
        needed = total + sum(len(header(shard)) for shard in split) + 256 * len(tensors)  # the index
        free = shutil.disk_usage(partial).free
        if needed > free:
            raise OffloadError(
                f"--out {out}: needs {format_bytes(needed, round_up=True)} of disk, but {format_bytes(free)} are free; "
                "free some, choose a smaller preset, or fewer --layers"
            )
        progress = Progress(total, log)
        write_shards(partial, split, lambda blank: draw(blank, seed), progress)
        (partial / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        if tokenizer is not None:
            for name in TOKENIZER_FILES:
                shutil.copyfile(tokenizer / name, partial / name)
        partial.rename(out)
    except OSError as error:
        raise OffloadError(f"--out {out}: can't be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    progress.finish()
    return total


@click.command()
@click.option("--preset", type=click.Choice(list(PRESETS)), required=True, help="Which size.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New folder; written as OUT.partial first.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random weights.")
@click.option("--layers", type=click.IntRange(min=1, max=1024), help="Instead of the preset's; the first is dense.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bf16", show_default=True, help="Of the weights.")
@click.option("--shard-size", default="1GB", show_default=True, help="Largest shard, such as 500MB.")
@click.option("--tokenizer", type=click.Path(path_type=Path, file_okay=False, exists=True), help="Folder to copy from.")
def main(
    preset: str, out: Path, seed: int, layers: int | None, dtype: str, shard_size: str, tokenizer: Path | None
) -> None:
    """Write a LLaDA2-MoE checkpoint of random weights, as the hub would publish it."""
    torch.set_num_threads(1)  # drawing is serial, and handing the small rest to threads costs more than it saves
    try:
        shard_bytes = parse_bytes(shard_size, "--shard-size")
        config = config_of(PRESETS[preset], DTYPES[dtype], layers)
        total = make_checkpoint(out, config, seed=seed, shard_bytes=shard_bytes, tokenizer=tokenizer, log=sys.stderr)
    except OffloadError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from None
    click.echo(f"{out}: {format_bytes(total)} of tensors")


if __name__ == "__main__":
    main()
