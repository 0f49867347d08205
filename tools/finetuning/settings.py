"""The settings of a run of fine-tuning, and what follows from them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload_engine.config import parse_bytes
from offload_engine.errors import TokenizerError, UsageError
from offload_engine.model.config import ModelConfig
from tools.finetuning.batches import Batches
from tools.finetuning.dataset import Dataset, Overlong, Shape
from tools.finetuning.parallel import Processes
from tools.finetuning.tuner import Optimisation

NOT_RECORDED = ("data", "out", "log_every", "save_minutes", "shard_size", "served_min_experts")
"""Settings that don't change what is learned, and may differ on resumption."""


@dataclass(frozen=True)
class Settings:
    """The command's options, as `tools.finetune` describes them."""

    model: str
    data: Path
    out: Path
    length: int = 1024
    overlong: Overlong = Overlong.CUT
    limit_samples: int | None = None
    pad_to: str = "length"
    noisings: int = 1
    sigma: tuple[float, float] = (0.3, 0.8)
    block_length: int = 32
    batch: int = 4
    micro_batch: int | None = None
    epochs: float = 2
    steps: int | None = None
    lr: float = 2e-6
    final_lr: float = 1e-7
    warmup: float = 0.03
    weight_decay: float = 0.01
    clip: float = 1.0
    routing: str = "dmoe"
    top_p: float = 0.6
    min_experts: int = 12
    served_min_experts: int | None = None
    original_share: float = 0.0
    teacher_share: float = 0.0
    teacher: str | None = None
    dtype: str = "bfloat16"
    seed: int = 0
    shard_size: str = "4GB"
    log_every: int = 10
    save_minutes: float = 5.0

    def check(self, processes: Processes) -> None:
        """Raise `UsageError` for options that can't be, or don't go together."""
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"--{name.replace('_', '-')} is {value}, wanted a finite number")
        parse_bytes(self.shard_size, "--shard-size")
        if self.length % self.block_length:
            near = -(-self.length // self.block_length) * self.block_length
            raise UsageError(f"--length is {self.length}, no multiple of --block-length {self.block_length}; {near} is")
        if not 0 <= self.sigma[0] <= self.sigma[1] <= 1 or not self.sigma[1]:
            raise UsageError(f"--sigma is {self.sigma[0]:g} {self.sigma[1]:g}; wanted two rising shares from 0 to 1")
        if self.batch % processes.count:
            near = -(-self.batch // processes.count) * processes.count
            raise UsageError(
                f"--batch is {self.batch}, no multiple of the {processes.count} processes; {near} is, or start fewer"
            )
        if self.final_lr > self.lr:
            raise UsageError(f"--final-lr is {self.final_lr:g}, above --lr {self.lr:g}")
        if self.teacher is not None and not self.teacher_share:
            raise UsageError(
                f"--teacher is {self.teacher}, but --teacher-share is 0, so nothing would be learned from it; give a "
                "share, such as --teacher-share 0.9"
            )

    def recorded(self, dataset: Dataset, models: Mapping[str, str], processes: Processes) -> dict[str, Any]:
        """What a resumed run must have in common with the one it goes on with; `models`: fingerprints by option."""
        values = {name: value for name, value in vars(self).items() if name not in NOT_RECORDED}
        values["overlong"] = str(self.overlong)
        content = zlib.crc32(dataset.prompts.tobytes(), zlib.crc32(dataset.ids.tobytes()))
        values |= {f"fingerprint of --{option}": found for option, found in models.items()}
        return values | {"samples": len(dataset), "content of the data": content, "processes": processes.count}

    def optimisation(self, batches: Batches) -> Optimisation:
        """AdamW and its schedule over the run's length."""
        steps = self.steps or batches.steps(self.epochs)
        if not steps:
            raise UsageError(
                f"--epochs {self.epochs:g} over {len(batches.dataset)} samples makes no whole batch of {self.batch}; "
                "lower --batch or raise --epochs"
            )
        return Optimisation(steps, self.lr, self.final_lr, self.warmup, self.weight_decay, self.clip)

    def batches(self, dataset: Dataset) -> Batches:
        """What each step trains on."""
        return Batches(
            dataset,
            self.seed,
            self.batch,
            self.micro_batch or self.batch,
            self.block_length,
            self.sigma,
            self.noisings,
        )

    def shape(self, config: ModelConfig, eos: int | None, mask: int | None) -> Shape:
        """What samples become for a model with these special ids. Raises `OffloadError`s where it can't take them."""
        for kind, token in (("eos", eos), ("mask", mask)):
            if token is None:
                raise TokenizerError(
                    f"{self.model}: neither tokenizer nor config.json says what the {kind} token's id is; "
                    f"add {kind}_token_id to its config.json"
                )
        most = config.max_position_embeddings
        if self.length > most:
            raise UsageError(f"--length is {self.length}, but {self.model} has {most} positions; wanted at most that")
        multiple = self.block_length if self.pad_to == "block" else None
        return Shape(self.length, config.vocab_size, eos, mask, multiple)  # type: ignore[arg-type]
