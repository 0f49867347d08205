"""Times one expert on the CPU: torch's F.linear in bf16 beside our kernel on bf16, int8 and int4 weights, in one run;
linear layers, F.linear beside our kernel; and a layer's routing decision, torch beside our kernel.

`python -m tools.bench_kernels`. Weights lie in arenas of more than `--megabytes` and are used in turn, so that their
weights come from DRAM; contenders alternate product by product, and medians are told. Decisions are timed with warm
caches, and with caches that 128 MB of other data has just gone through: in a run it is between the two.
"""

from __future__ import annotations

import json
import mmap
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from offload_engine import kernels
from offload_engine.experts.ranked import ranked_experts
from offload_engine.kernels import Matrix, selection
from offload_engine.kernels.library import KernelStatus
from offload_engine.routing import RouterShape, make_policy

Expert = tuple[Matrix, Matrix, Matrix]
CONTENDERS = ("F.linear", "bf16", "int8", "int4")


class Arena:
    """Memory that tensors are cut from: one mapping, like the engine's slots, in huge pages if asked for and had."""

    def __init__(self, size: int, huge: bool) -> None:
        mapping = mmap.mmap(-1, size)
        if huge:
            mapping.madvise(mmap.MADV_HUGEPAGE)
        self.memory = torch.frombuffer(mapping, dtype=torch.uint8)
        self.used = 0

    def put(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor` in here, on a cache line."""
        size = tensor.numel() * tensor.element_size()
        place = self.memory[self.used : self.used + size].view(tensor.dtype).view(tensor.shape)
        self.used += -(-size // 64) * 64
        return place.copy_(tensor)


def quantised(weights: Tensor, form: str, group: int) -> Matrix:
    """`weights` [rows, cols] in the format that `offload_engine.kernels.Matrix` describes."""
    if form == "bf16":
        return Matrix(weights.bfloat16())
    if form == "int8":
        scales = weights.abs().amax(1) / 127
        return Matrix((weights / scales[:, None]).round().to(torch.int8), scales)
    grouped = weights.unflatten(1, (-1, group))
    scales = (grouped.abs().amax(2) / 7).bfloat16()
    values = ((grouped / scales.float()[..., None]).round().clamp(-8, 7) + 8).to(torch.uint8)
    return Matrix((values[..., : group // 2] | values[..., group // 2 :] << 4).flatten(1), scales)


def experts(form: str, hidden: int, inner: int, group: int, megabytes: int, huge: bool) -> list[Expert]:
    """As many experts as fill `megabytes`; all of them the same numbers at different places."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    one = [quantised(torch.randn(shape, generator=generator) * shape[1] ** -0.5, form, group) for shape in shapes]
    size = weight_bytes((one[0], one[1], one[2]))
    count = -(-megabytes * 10**6 // size)
    arena = Arena(count * (size + 6 * 64), huge)
    made = []
    for _ in range(count):
        copies = [Matrix(*(None if part is None else arena.put(part) for part in matrix)) for matrix in one]  # type: ignore[arg-type]
        made.append((copies[0], copies[1], copies[2]))
    return made


def weight_bytes(expert: Expert) -> int:
    """What has to be read of an expert."""
    return sum(part.numel() * part.element_size() for matrix in expert for part in matrix if part is not None)


def by_torch(hidden: Tensor, expert: Expert) -> Tensor:
    """The same by F.linear."""
    gate, up, down = (matrix.values for matrix in expert)
    return F.linear(F.silu(F.linear(hidden, gate)) * F.linear(hidden, up), down)


def dram_rate() -> float:
    """GB/s of summing 512 MB with torch on the threads set, best of seven."""
    memory = torch.ones(2**27)
    times = []
    for _ in range(7):
        began = time.perf_counter()
        memory.sum()
        times.append(time.perf_counter() - began)
    return memory.numel() * 4 / min(times) / 1e9


def measure(tokens: int, stores: dict[str, list[Expert]], rounds: int) -> dict[str, float]:
    """Median seconds per expert and contender."""
    width = stores["bf16"][0][0].values.shape[1]
    hidden = torch.randn(tokens, width).bfloat16()
    calls: dict[str, Callable[[int], Tensor]] = {
        "F.linear": lambda i: by_torch(hidden, stores["F.linear"][i]),
        **{form: lambda i, form=form: kernels.expert_ffn(hidden, *stores[form][i]) for form in CONTENDERS[1:]},  # type: ignore[misc]
    }
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for turn in range(rounds + 5):
        for name, call in calls.items():
            began = time.perf_counter()
            call(turn % len(stores[name]))
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(spent[5:]) for name, spent in times.items()}


def measure_linear(outputs: int, columns: int, tokens: int, megabytes: int, rounds: int) -> dict[str, float]:
    """Median seconds per layer of `outputs` x `columns` and contender; each has weights of its own."""
    count = max(1, megabytes * 10**6 // (2 * outputs * columns))
    one = (torch.randn(outputs, columns) * columns**-0.5).bfloat16()
    calls: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"F.linear": F.linear, "kernel": kernels.linear}
    arenas = {name: Arena(count * one.nbytes + 64 * count, huge=False) for name in calls}
    weights = {name: [arena.put(one) for _ in range(count)] for name, arena in arenas.items()}
    x = torch.randn(tokens, columns).bfloat16()
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for turn in range(rounds + 2):
            for name, call in calls.items():
                began = time.perf_counter()
                call(x, weights[name][turn % count])
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(spent[2:]) for name, spent in times.items()}


def tell_linear(
    threads: int, layers: list[tuple[int, int]], tokens: list[int], megabytes: int, rounds: int
) -> list[dict[str, float | str]]:
    """Print and return what `measure_linear` finds; a layer as large as all weights together is timed less often."""
    rows: list[dict[str, float | str]] = []
    for outputs, columns in layers:
        size = 2 * outputs * columns
        for number in tokens:
            turns = rounds if size < megabytes * 10**6 else max(5, rounds // 10)
            medians = measure_linear(outputs, columns, number, megabytes, turns)
            cells = []
            for name, seconds in medians.items():
                what = f"linear {outputs}x{columns}, {name}"
                rates = {"GB/s": size / seconds / 1e9, "GFLOP/s": number * size / seconds / 1e9}
                rows.append({"threads": threads, "tokens": number, "what": what, "seconds": seconds, **rates})
                told = f"{seconds * 1e3:.3f} ms ({rates['GB/s']:.1f} GB/s, {rates['GFLOP/s']:.0f} GFLOP/s)"
                cells.append(f"{name} {told}")
            ratio = medians["F.linear"] / medians["kernel"]
            click.echo(f"linear {outputs}x{columns}, {number:3d} tokens: " + "   ".join(cells) + f" {ratio:.2f}x")
    return rows


def measure_selection(routing: str, rounds: int, flush: Tensor | None) -> dict[str, float]:
    """Median seconds from a layer's logits, of LLaDA2.0-mini's shape and one block, to its decision and the order of
    its experts; `flush` is read before each.
    """
    policy = make_policy(routing, RouterShape(256, 8, 8, 4, True, 2.5))
    logits, bias, block_ids = torch.randn(32, 256), torch.randn(256) * 0.05, torch.zeros(32, dtype=torch.long)
    contenders = {"torch": KernelStatus(None, "to be timed without"), "kernel": kernels.status()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 5):
        for name, status in contenders.items():
            with patch.object(selection, "status", lambda status=status: status), torch.inference_mode():
                if flush is not None:
                    flush.sum()
                began = time.perf_counter()
                ranked_experts(policy(logits, bias, block_ids))
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(spent[5:]) for name, spent in times.items()}


def tell_selection(threads: int, rounds: int) -> list[dict[str, float | str]]:
    """Print and return what `measure_selection` finds."""
    rows: list[dict[str, float | str]] = []
    for caches, flush in (("warm", None), ("cold", torch.ones(2**25))):
        for routing in ("original", "dmoe"):
            medians = measure_selection(routing, rounds, flush)
            for name, seconds in medians.items():
                what = f"selection, {routing}, {caches}, {name}"
                rows.append({"threads": threads, "tokens": 32, "what": what, "seconds": seconds})
            ratio = medians["torch"] / medians["kernel"]
            told = "   ".join(f"{name} {seconds * 1e6:.0f} us" for name, seconds in medians.items())
            click.echo(f"selection, {routing}, {caches} caches: {told} {ratio:.2f}x")
    return rows


@click.command(help=__doc__)
@click.option("--hidden", default=2048, show_default=True, help="The model's width.")
@click.option("--inner", default=512, show_default=True, help="The expert's width.")
@click.option("--group", default=128, show_default=True, help="Columns per int4 scale.")
@click.option("--tokens", default="1,4,8,16,32,64", show_default=True, help="Tokens per expert.")
@click.option("--threads", default="1,2", show_default=True, help="Numbers of threads to try.")
@click.option("--rounds", default=120, show_default=True, help="Experts per contender and number of tokens.")
@click.option("--megabytes", default=300, show_default=True, help="Weights to go round, per contender.")
@click.option("--huge/--small", default=False, show_default=True, help="Ask for huge pages.")
@click.option(
    "--layers",
    default="3072x2048,2048x2048,157184x2048",
    show_default=True,
    help="Linear layers, outputs x inputs: LLaDA2.0-mini's projections and head.",
)
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the figures here as well.")
def main(
    hidden: int,
    inner: int,
    group: int,
    tokens: str,
    threads: str,
    rounds: int,
    megabytes: int,
    huge: bool,
    layers: str,
    output: Path | None,
) -> None:
    """Measure and print."""
    torch.manual_seed(0)
    stores = {form: experts(form, hidden, inner, group, megabytes, huge) for form in CONTENDERS[1:]}
    stores["F.linear"] = experts("bf16", hidden, inner, group, megabytes, huge)
    status = kernels.status()
    click.echo(f"kernel: {status.variant} ({status.reason}); torch {torch.__version__}; {platform.machine()}")
    numbers = [int(part) for part in tokens.split(",")]
    shapes = [
        (int(outputs), int(columns)) for outputs, columns in (part.split("x") for part in layers.split(",") if part)
    ]
    rows: list[dict[str, float | str]] = []
    for count in (int(part) for part in threads.split(",")):
        torch.set_num_threads(count)
        click.echo(f"\n{count} thread(s), DRAM read {dram_rate():.1f} GB/s; ms per expert (GB/s of weights) x F.linear")
        for number in numbers:
            medians = measure(number, stores, rounds)
            cells = []
            for name, seconds in medians.items():
                rate = weight_bytes(stores[name][0]) / seconds / 1e9
                ratio = medians["F.linear"] / seconds
                rows.append({"threads": count, "tokens": number, "what": name, "seconds": seconds, "GB/s": rate})
                cells.append(f"{name} {seconds * 1e3:.3f} ({rate:4.1f}) {ratio:.2f}x")
            click.echo(f"{number:4d} tokens  " + "   ".join(cells))
        rows += tell_linear(count, shapes, numbers, megabytes, rounds)
        rows += tell_selection(count, rounds)
    if output is not None:
        output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
