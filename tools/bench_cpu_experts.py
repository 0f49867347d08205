"""Times one expert on the CPU, token by token, beside what a copy of it to a GPU takes: what `cpu_experts` weighs.

`python -m tools.bench_cpu_experts`. The CPU's times are measured here, with the code that the engine runs, on experts
in more memory than caches hold; medians are told. The link's are computed from the profiles of `dmoe simulate`, and
nothing of them is measured.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import click
import torch

from offload_engine import kernels
from offload_engine.core import RoutingDecision
from offload_engine.experts.arena import SlotArena
from offload_engine.experts.storage.layout import packed_layout
from offload_engine.model.moe import ExpertOutputs, ExpertWeights, ExpertWork
from offload_engine.model.quantized import Bits, ExpertFormat, quantize_int4, quantize_int8
from offload_engine.simulate.profile import load_profile
from offload_engine.simulate.timing import ModelShape, Timing

FORMATS: dict[str, Bits | None] = {"bf16": None, "int8": 8, "int4": 4}
GROUP = 128
"""Columns per int4 scale."""
LINKS = {"PCIe 4.0 x8": "rtx4060-8gb", "PCIe 4.0 x16": "rtx4090-24gb"}
"""And the profile that each is computed from."""


class Experts:
    """Equal experts of one format in slabs of their own, and how many bytes each is moved with."""

    def __init__(self, form: str, hidden: int, inner: int, megabytes: int) -> None:
        group = GROUP if form == "int4" else 0
        layout, self.nbytes = packed_layout(ExpertFormat(torch.bfloat16, FORMATS[form], group), hidden, inner)
        count = max(2, -(-megabytes * 10**6 // layout.nbytes))
        self.arena = SlotArena(count, layout.nbytes)
        self.arena.wait_touched()
        first = layout.weights(self.arena.slab(0))
        generator = torch.Generator().manual_seed(0)
        for target in first:
            rows, columns = target.shape
            weights = torch.randn(rows, columns, generator=generator) * columns**-0.5
            if isinstance(target, torch.Tensor):
                target.copy_(weights)
            else:
                made = quantize_int8(weights) if form == "int8" else quantize_int4(weights, GROUP)
                target.values.copy_(made.values)
                target.scales.copy_(made.scales)
        for slot in range(1, count):
            self.arena.slab(slot).copy_(self.arena.slab(0))
        self.weights: list[ExpertWeights] = [layout.weights(self.arena.slab(slot)) for slot in range(count)]

    def seconds(self, tokens: int, hidden: int, rounds: int) -> float:
        """Median of one expert with so many tokens."""
        decision = RoutingDecision(torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1))
        outputs = ExpertOutputs(torch.randn(tokens, hidden).bfloat16(), decision)
        times = []
        for turn in range(rounds + 3):
            work = [ExpertWork(0, self.weights[turn % len(self.weights)])]
            began = time.perf_counter()
            outputs.compute(work)
            times.append(time.perf_counter() - began)
        return statistics.median(times[3:])


def copy_seconds(nbytes: int) -> dict[str, float]:
    """By link, what a copy of so many bytes from pinned memory is computed to take, its latency included."""
    found = {}
    for link, name in LINKS.items():
        profile = load_profile(name)
        shape = ModelShape(
            layers=1, moe_layers=1, hidden=1, heads=1, kv_heads=1, head_dim=1, dense_width=1, expert_width=1,
            shared_width=0, num_experts=1, top_k=1, vocabulary=1, expert_bytes=nbytes,
        )  # fmt: skip
        latency = 0.0 if profile.link_latency is None else profile.link_latency.value
        found[link] = Timing(shape, profile).link_seconds() + latency
    return found


def table(form: str, threads: int, nbytes: int, measured: dict[int, float]) -> list[str]:
    """Markdown."""
    copies = copy_seconds(nbytes)
    told = ", ".join(f"{link} {seconds * 1e3:.3f} ms" for link, seconds in copies.items())
    lines = [
        f"{form}, {nbytes / 1e6:.2f} MB per expert, {threads} thread(s); a copy, computed from profiles: {told}",
        "",
    ]
    lines += ["| tokens | CPU, ms (measured) | " + " | ".join(f"of a copy over {link}" for link in copies) + " |"]
    lines += ["|---" * (2 + len(copies)) + "|"]
    for tokens, seconds in measured.items():
        shares = " | ".join(f"{seconds / copy:.2f}" for copy in copies.values())
        lines.append(f"| {tokens} | {seconds * 1e3:.3f} | {shares} |")
    return lines


def numbers(text: str) -> Sequence[int]:
    """Those in a list with commas."""
    return [int(part) for part in text.split(",")]


@click.command(help=__doc__)
@click.option("--hidden", default=2048, show_default=True, help="The model's width.")
@click.option("--inner", default=512, show_default=True, help="The expert's width.")
@click.option("--tokens", default="1,2,4,8,12,16,24,32", show_default=True, help="Tokens per expert.")
@click.option("--threads", default="1,2", show_default=True, help="Numbers of threads to try.")
@click.option("--formats", default="bf16,int8,int4", show_default=True, help="How weights are stored.")
@click.option("--rounds", default=60, show_default=True, help="Experts per number of tokens.")
@click.option("--megabytes", default=150, show_default=True, help="Weights to go round, per format.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the figures here as well.")
def main(
    hidden: int, inner: int, tokens: str, threads: str, formats: str, rounds: int, megabytes: int, output: Path | None
) -> None:
    """Measure and print."""
    torch.manual_seed(0)
    status = kernels.status()
    click.echo(f"kernel: {status.variant} ({status.reason}); torch {torch.__version__}; {platform.machine()}")
    rows = []
    with torch.inference_mode():
        for form in formats.split(","):
            experts = Experts(form, hidden, inner, megabytes)
            for count in numbers(threads):
                torch.set_num_threads(count)
                measured = {number: experts.seconds(number, hidden, rounds) for number in numbers(tokens)}
                click.echo("\n" + "\n".join(table(form, count, experts.nbytes, measured)))
                rows += [
                    {"format": form, "threads": count, "tokens": number, "seconds": seconds, "bytes": experts.nbytes}
                    for number, seconds in measured.items()
                ]
    if output is not None:
        output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
