"""Fine-tune a LLaDA2-MoE checkpoint on its own answers under block-level routing (REFERENCE §4).

python -m tools.finetune --model offload_engine/assets/tiny --data runs/answers --out runs/distilled --length 160
torchrun --nproc-per-node 4 -m tools.finetune --model DIR --data runs/answers --out runs/distilled
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "20000")  # one per shape; read when torch loads

import click
import torch

from offload_engine.cli.errors import ReportingCommand
from offload_engine.cli.options import common_options
from tools.finetuning.dataset import Overlong
from tools.finetuning.parallel import known_device, processes
from tools.finetuning.run import build_run
from tools.finetuning.settings import Settings

FRACTION = click.FloatRange(0, 1)
COUNT = click.IntRange(min=1)


@click.command(cls=ReportingCommand)
@click.option("--model", required=True, help="Checkpoint to start from: a directory, or a hub id.")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Dataset of `tools.self_distil`.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory of the run.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --out, with the same options.")
@click.option("--export", is_flag=True, help="Make OUT/model of the last checkpoint in --out, without training on.")
@click.option("--length", type=COUNT, default=1024, show_default=True, help="Tokens of a sample, cut or padded.")
@click.option("--overlong", type=click.Choice([*Overlong]), default=Overlong.CUT, show_default=True)
@click.option(
    "--pad-to",
    type=click.Choice(["length", "block"]),
    default="length",
    show_default=True,
    help="What samples are padded to; block: the end of the block that the answer ends in.",
)
@click.option(
    "--sigma",
    type=(float, float),
    default=(0.3, 0.8),
    show_default=True,
    help="Range of the share of an answer that is masked.",
)
@click.option("--noisings", type=COUNT, default=1, show_default=True, help="Of each sample, in one forward.")
@click.option("--limit-samples", type=COUNT, help="Use only the first N samples.")
@click.option("--block-length", type=COUNT, default=32, show_default=True)
@click.option("--batch", type=COUNT, default=4, show_default=True, help="Samples per step, over all processes.")
@click.option("--micro-batch", type=COUNT, help="Samples per forward of a process.  [default: all of its share]")
@click.option("--epochs", type=click.FloatRange(0, min_open=True), default=2, show_default=True)
@click.option("--steps", type=COUNT, help="Length of the run, instead of --epochs.")
@click.option("--lr", type=click.FloatRange(0), default=2e-6, show_default=True, help="Peak learning rate.")
@click.option("--final-lr", type=click.FloatRange(0), default=1e-7, show_default=True, help="At the last step.")
@click.option("--warmup", type=FRACTION, default=0.03, show_default=True, help="Share of steps before the peak.")
@click.option("--weight-decay", type=click.FloatRange(0), default=0.01, show_default=True, help="Of matrices.")
@click.option("--clip", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True)
@click.option("--routing", default="dmoe", show_default=True, help="Routing policy to train under.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=0.6, show_default=True)
@click.option("--min-experts", type=COUNT, default=12, show_default=True, help="dMoE's smallest coreset.")
@click.option("--served-min-experts", type=COUNT, help="The same for whoever runs the result.  [default: the engine's]")
@click.option(
    "--original-share", type=FRACTION, default=0.0, show_default=True, help="Of micro-batches; routed as before."
)
@click.option(
    "--teacher-share",
    type=FRACTION,
    default=0.0,
    show_default=True,
    help="Of the loss: divergence from the teacher, under original routing.",
)
@click.option("--teacher", help="Another checkpoint to learn from.  [default: --model]")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--device", default=None, help="cpu or cuda.  [default: cuda where there is one]")
@click.option("--threads", type=COUNT, help="CPU threads of a process.")
@click.option("--shard-size", default="4GB", show_default=True, help="Largest safetensors file of the result.")
@click.option("--log-every", type=COUNT, default=10, show_default=True, help="Steps.")
@click.option(
    "--save-minutes",
    type=click.FloatRange(0),
    default=5.0,
    show_default=True,
    help="Between checkpoints; each has 12 bytes per parameter, and the one before stays until it is whole.",
)
@common_options
def main(**options: Any) -> int:
    """Train on a dataset of answers; the result is a checkpoint in OUT/model."""
    threads = options.pop("threads")
    if threads:
        torch.set_num_threads(threads)
    device = known_device(options.pop("device"))
    resume, export = options.pop("resume"), options.pop("export")
    with processes(device) as among:
        if among.first:
            print(f"reading {options['model']} and {options['data']}", file=sys.stderr, flush=True)
        run = build_run(Settings(**options), among, resume=resume or export)
        if among.first:
            print(run.describe(), file=sys.stderr, flush=True)
        if export:
            run.export()
            return 0
        return run.train()


if __name__ == "__main__":
    main()
