"""Writes a LLaDA2-MoE checkpoint of random weights, laid out as the hub publishes them, for tests and benchmarks.

How its routing spreads and changes is set by options (`tools.checkpoint_maker.weights`), and measured at the end by
running the engine. Nothing is held in memory but a few MB of one tensor, nothing left in the page cache.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import click
import torch

if __package__ in (None, ""):  # run as a script: the repository's root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from offload_engine.cli.progress import Progress
from offload_engine.cli.terminal import note
from offload_engine.config import format_bytes, parse_bytes
from offload_engine.errors import MemoryBudgetError, OffloadError, UsageError
from offload_engine.experts.storage.packed_header import SOURCE_KEY
from offload_engine.model.config import ModelConfig
from offload_engine.model.partial_directory import partial_directory
from tools.checkpoint_maker.measure import measure
from tools.checkpoint_maker.packed import describe, packed_bytes, write_experts
from tools.checkpoint_maker.presets import PRESETS, config_of
from tools.checkpoint_maker.tensors import blanks
from tools.checkpoint_maker.weights import RoutingStatistics, Weights
from tools.sharded_writer import header, shards, write_json, write_shards

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
DEFAULTS = RoutingStatistics()


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
    out: Path,
    config: dict[str, Any],
    *,
    seed: int,
    shard_bytes: int,
    tokenizer: Path | None,
    statistics: RoutingStatistics = DEFAULTS,
    packed: str | None = None,
) -> int:
    """Write a checkpoint to the new folder `out`, and return its weights' bytes. `out` appears when all is written.

    `packed`: keep experts as `dmoe convert` would (stored, bf16, int8 or int4), without the published layout between.
    Raises `UsageError` if `out` exists, `OUT.partial` is not ours to remove or the tokenizer does not fit,
    `OffloadError` if the disk is too small or fails.
    """
    out = out.resolve()
    if out.exists():
        raise UsageError(f"--out {out}: exists already; choose another folder, or remove this one")
    if tokenizer is not None:
        config = config | special_ids(tokenizer, config["vocab_size"])
    model = ModelConfig.from_dict(config)
    dtype = getattr(torch, config["torch_dtype"])
    weights = Weights(model, seed, statistics)
    description = None if packed is None else describe(config, packed, seed, statistics)
    tensors = [blank for blank in blanks(model, dtype) if description is None or ".mlp.experts." not in blank.name]
    total = sum(blank.nbytes for blank in tensors)
    total += 0 if description is None else packed_bytes(description, model)
    with partial_directory(out, tokenizer) as partial:
        split = shards(tensors, shard_bytes)
        needed = total + sum(len(header(shard)) for shard in split) + 256 * len(tensors)  # the index
        free = shutil.disk_usage(partial).free
        if needed > free:
            raise OffloadError(
                f"--out {out}: needs {format_bytes(needed, round_up=True)} of disk, but {format_bytes(free)} are free; "
                "free some, choose a smaller preset, or fewer --layers"
            )
        metadata = {}
        with Progress("writing weights", total) as progress:
            if description is not None:
                write_experts(partial, description, model, dtype, weights, progress)
                metadata = {SOURCE_KEY: description.source}
            write_shards(partial, split, weights.draw, progress, metadata)
        write_json(partial / "config.json", config)
        if tokenizer is not None:
            for name in TOKENIZER_FILES:
                shutil.copyfile(tokenizer / name, partial / name)
    note(progress.line())
    return total


def report(out: Path, blocks: int, gpu_mem: str) -> None:
    """Print what the checkpoint's routing is like."""
    if not ModelConfig.from_file(out / "config.json").moe_layers:
        click.echo("no MoE layer, so no routing to measure")
        return
    try:
        for measured in measure(out, blocks, gpu_mem):
            click.echo(measured)
    except MemoryBudgetError as error:
        click.echo(f"routing not measured: {error}", err=True)


@click.command()
@click.option("--preset", type=click.Choice(list(PRESETS)), required=True, help="Which size.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New folder; written as OUT.partial first.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random weights.")
@click.option("--layers", type=click.IntRange(min=1, max=1024), help="Instead of the preset's; the first is dense.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bf16", show_default=True, help="Of the weights.")
@click.option("--shard-size", default="1GB", show_default=True, help="Largest shard, such as 500MB.")
@click.option("--tokenizer", type=click.Path(path_type=Path, file_okay=False, exists=True), help="Folder to copy from.")
@click.option(
    "--packed",
    type=click.Choice(["stored", "bf16", "int8", "int4"]),
    help="Write the layout of `dmoe convert` at once, its experts as this.",
)
@click.option(
    "--similarity",
    type=float,
    default=DEFAULTS.similarity,
    show_default=True,
    help="Of routing from one denoising step to the next: higher is more alike.",
)
@click.option(
    "--bias-spread",
    type=float,
    default=DEFAULTS.bias_spread,
    show_default=True,
    help="Of the experts' popularity: higher is fewer experts per block, the same in all.",
)
@click.option(
    "--topic",
    type=float,
    default=DEFAULTS.topic,
    show_default=True,
    help="Share of the text in what a block's positions agree on: higher is less alike from block to block.",
)
@click.option("--measure/--no-measure", "measured", default=True, help="Run the engine on it, and print its routing.")
@click.option(
    "--blocks", type=click.IntRange(1, 100), default=3, show_default=True, help="Blocks of each answer measured."
)
@click.option("--gpu-mem", default="auto", show_default=True, help="The engine's budget for the measurement.")
def main(
    preset: str,
    out: Path,
    seed: int,
    layers: int | None,
    dtype: str,
    shard_size: str,
    tokenizer: Path | None,
    packed: str | None,
    similarity: float,
    bias_spread: float,
    topic: float,
    measured: bool,
    blocks: int,
    gpu_mem: str,
) -> None:
    """Write a LLaDA2-MoE checkpoint of random weights, as the hub would publish it."""
    torch.set_num_threads(1)  # drawing is serial, and handing the small rest to threads costs more than it saves
    try:
        shard_bytes = parse_bytes(shard_size, "--shard-size")
        statistics = RoutingStatistics(similarity, bias_spread, topic)
        if gpu_mem != "auto":
            parse_bytes(gpu_mem, "--gpu-mem")
        total = make_checkpoint(
            out,
            config_of(PRESETS[preset], DTYPES[dtype], layers),
            seed=seed,
            shard_bytes=shard_bytes,
            tokenizer=tokenizer,
            statistics=statistics,
            packed=packed,
        )
        click.echo(f"{out}: {format_bytes(total)} of tensors")
        if measured:
            report(out, blocks, gpu_mem)
    except OffloadError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
