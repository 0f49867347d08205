"""From a published checkpoint to a network in training and back, one tensor at a time (names: REFERENCE §1)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload_engine.cli.progress import Progress
from offload_engine.cli.terminal import note
from offload_engine.model.checkpoint import Checkpoint
from offload_engine.model.config import ModelConfig
from offload_engine.model.weights import (
    MATRICES,
    all_expert_spans,
    expert_keys,
    merged_name,
    resident_infos,
    resident_shapes,
    split_name,
)
from tools.finetuning.parallel import Processes, copy_whole, shard, whole
from tools.sharded_writer import Blank, shards, write_model
from tools.training.trainer import Network

COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
"""What goes along with a checkpoint's weights unchanged, and the code that its JSON files name."""


def load_network(config: ModelConfig, checkpoint: Checkpoint, processes: Processes) -> Network:
    """The checkpoint in float32, sharded over the processes; either layout of experts.

    Raises `CheckpointError` where a tensor is missing or of another shape than config.json wants.
    """
    resident_infos(config, checkpoint)
    all_expert_spans(config, checkpoint)
    with torch.device("meta"):
        network = Network(config)
    network = shard(network, processes).to_empty(device=processes.device)
    if config.tie_word_embeddings:
        network.model.lm_head.weight = network.model.model.word_embeddings.weight
    with torch.no_grad():
        for name, weight in network.named_weights():
            copy_whole(training_weight(config, checkpoint, name), weight)
        for layer, router in network.routers():
            if router.expert_bias is not None:
                router.expert_bias.copy_(checkpoint.read(bias_name(layer), torch.float32))
    return network


def training_weight(config: ModelConfig, checkpoint: Checkpoint, name: str) -> Tensor:
    """A weight of `Network.named_weights`, float32."""
    if name.startswith("model."):
        return checkpoint.read(name.removeprefix("model."), torch.float32)
    _, kind, layer = name.split(".")
    stacks = [_stacked(config, checkpoint, int(layer), which) for which in _matrices(kind)]
    return torch.cat(stacks, dim=1) if len(stacks) > 1 else stacks[0]


def _matrices(kind: str) -> tuple[str, ...]:
    """The published matrices that make up a kind of training weight, top to bottom."""
    return {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}[kind]


def _stacked(config: ModelConfig, checkpoint: Checkpoint, layer: int, which: str) -> Tensor:
    """All experts' matrices of one kind, [E, ..]."""
    if merged_name(layer, which) in checkpoint.tensors:
        return checkpoint.read(merged_name(layer, which), torch.float32)
    names = (split_name(layer, expert, which) for expert in range(config.num_experts))
    return torch.stack([checkpoint.read(name, torch.float32) for name in names])


def bias_name(layer: int) -> str:
    """The published name of a router's expert bias."""
    return f"model.layers.{layer}.mlp.gate.expert_bias"


class Published:
    """A network's weights by published name, split layout: weights in `dtype`, expert biases in float32.

    Sharded weights are gathered, so every process must ask for the same names in the same order.
    """

    def __init__(self, network: Network, config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> None:
        self.weights, self.dtype, self.width = dict(network.named_weights()), dtype, config.moe_intermediate_size
        self.biases = {bias_name(layer): router.expert_bias for layer, router in network.routers()}
        self.sources: dict[str, tuple[str, int, slice]] = {}
        shapes = resident_shapes(config)
        for layer, expert in expert_keys(config):
            for which in MATRICES:
                kind = "down" if which == "down_proj" else "gate_up"
                rows = slice(self.width, None) if which == "up_proj" else slice(self.width)
                rows = slice(None) if kind == "down" else rows
                name = split_name(layer, expert, which)
                self.sources[name] = (f"experts.{kind}.{layer}", expert, rows)
                hidden = config.hidden_size
                shapes[name] = (hidden, self.width) if kind == "down" else (self.width, hidden)
        self.blanks = [
            Blank(name, shape, torch.float32 if name in self.biases else dtype) for name, shape in shapes.items()
        ]
        self._gather = lru_cache(maxsize=2)(self._gathered)  # a layer's two stacks, whose experts come in turn

    def __call__(self, blank: Blank) -> list[Tensor]:
        """The tensor that fills a blank, on the CPU, in one piece."""
        if blank.name in self.biases:
            return [self.biases[blank.name].float().cpu().contiguous()]
        if blank.name in self.sources:
            name, expert, rows = self.sources[blank.name]
            return [self._gather(name)[expert, rows].contiguous()]
        return [self._gathered(f"model.{blank.name}")]

    def _gathered(self, name: str) -> Tensor:
        return whole(self.weights[name]).detach().to(self.dtype).cpu().contiguous()


def distilled_config(raw: Mapping[str, Any], routing: str, top_p: float, min_experts: int | None) -> dict[str, Any]:
    """A config.json that says which routing its weights were trained for, and with what smallest coreset they are to
    be served (None: the engine's).
    """
    routed = {"mode", "core_threshold", "core_min_experts"}
    config = {key: value for key, value in raw.items() if key not in routed} | {"torch_dtype": "bfloat16"}
    if routing != "dmoe":
        return config
    least = {} if min_experts is None else {"core_min_experts": min_experts}
    return config | {"mode": "aggregate", "core_threshold": top_p, **least}


def companions(source: Path) -> tuple[list[str], list[str]]:
    """Names of the files of `source` that go along with its weights, and of those that it names but lacks: the modules
    in `auto_map`, by which transformers loads a model of foreign code (`trust_remote_code`).
    """
    code = set()
    for name in ("config.json", "tokenizer_config.json"):
        if not (source / name).is_file():
            continue
        named = json.loads((source / name).read_text(encoding="utf-8")).get("auto_map") or {}
        classes = named.values() if isinstance(named, dict) else [named]
        for path in (one for value in classes for one in (value if isinstance(value, list) else [value])):
            if isinstance(path, str) and "--" not in path and path.isascii() and path.replace(".", "_").isidentifier():
                code.add(f"{path.partition('.')[0]}.py")  # "REPOSITORY--module.Class" is fetched from there
    found = [name for name in (*COMPANIONS, *sorted(code)) if (source / name).is_file()]
    return found, sorted(code.difference(found))


def export(
    folder: Path, published: Published, raw: Mapping[str, Any], source: Path, shard_size: int, processes: Processes
) -> None:
    """Write a checkpoint to `folder`: aside first, then renamed, so that there is a whole one or none.

    Companions are copied from `source`. All processes take part, the first one writes.
    """
    split = shards(published.blanks, shard_size)
    if not processes.first:
        for blank in (blank for part in split for blank in part):
            published(blank)
        processes.wait()
        return
    aside, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("part", "old"))
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    aside.mkdir(parents=True)
    total = sum(blank.nbytes for blank in published.blanks)
    with torch.no_grad(), Progress("writing weights", total) as progress:
        write_model(aside, split, published, progress)
    note(progress.line())
    (aside / "config.json").write_text(json.dumps(dict(raw), indent=2) + "\n", encoding="utf-8")
    found, lacking = companions(source)
    for name in found:
        shutil.copyfile(source / name, aside / name)
    if lacking:
        note(f"{source} lacks {', '.join(lacking)}, which its auto_map names; transformers wants them in {folder} too")
    settle(aside)
    if folder.exists():
        folder.replace(old)
    aside.replace(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
    processes.wait()


def settle(folder: Path) -> None:
    """Have a directory's files, and their names, on the disk."""
    for path in (*folder.iterdir(), folder):
        sync(path)


def sync(path: Path) -> None:
    """Have a file's content, or a directory's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
