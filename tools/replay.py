"""Replays a routing trace through the production cache, eviction, predictor and scheduler, and prints a table.

    python -m tools.replay TRACE --slots 16 --slots 50 --eviction next-use --eviction lru --predictor none

One row per combination. Misses are beside Belady's, the fewest any eviction has that fetches on demand; with a
predictor, what is compared is every load, prefetches that nobody asked for included.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

if __package__ in (None, ""):  # run as a script: the repository's root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from offload_engine.errors import OffloadError
from offload_engine.experts.scheduling.cache import ExpertCache
from offload_engine.experts.scheduling.eviction import EVICTION, make_eviction
from offload_engine.experts.scheduling.predictor import PREDICTORS, make_predictor
from offload_engine.experts.scheduling.scheduler import ExpertScheduler
from offload_engine.simulate.belady import belady_misses
from offload_engine.simulate.forwards import ForwardRun, forwards
from offload_engine.simulate.replay import Costs, Replay, ReplayResult
from offload_engine.trace import read_trace

COLUMNS = (
    "slots/layer",
    "eviction",
    "predictor",
    "Belady",
    "misses",
    "loads",
    "loads/Belady",
    "precision",
    "recall",
    "early",
    "hidden",
    "stalled",
    "s/step",
)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("trace", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--slots", type=click.IntRange(1), multiple=True, default=(8, 16, 32, 50, 70, 100), help="Per layer.")
@click.option("--eviction", type=click.Choice([*EVICTION]), multiple=True, default=("next-use",))
@click.option("--predictor", type=click.Choice([*PREDICTORS]), multiple=True, default=("none",))
@click.option("--depth", type=click.IntRange(1), default=1, help="Layers to prefetch ahead.")
@click.option("--transfer-ms", type=click.FloatRange(0), default=4.0, help="One expert's transfer.")
@click.option("--compute-ms", type=click.FloatRange(0), default=0.4, help="One expert's compute.")
@click.option("--attention-ms", type=click.FloatRange(0), default=3.0, help="The rest of a layer.")
def main(
    trace: Path,
    slots: Sequence[int],
    eviction: Sequence[str],
    predictor: Sequence[str],
    depth: int,
    transfer_ms: float,
    compute_ms: float,
    attention_ms: float,
) -> None:
    """Replay TRACE (JSON Lines, or gzipped under a name ending in .gz)."""
    costs = Costs(transfer_ms / 1000, compute_ms / 1000, attention_ms / 1000)
    try:
        header, records = read_trace(trace)
        runs = list(forwards(records))
    except OffloadError as error:
        raise click.ClickException(str(error)) from None
    if not runs:
        raise click.ClickException(f"{trace}: holds no records, so there is nothing to replay")
    table = Table(*COLUMNS, title=f"{header.routing}; {header.model}")
    demands = [layer.keys for run in runs for layer in run.layers]
    bounds = {count: sum(belady_misses(demands, count * len(header.layers))) for count in slots}
    for row in _rows(runs, header.layers, costs, depth, itertools.product(slots, eviction, predictor), bounds):
        table.add_row(*row)
    Console(width=160).print(table)


def _rows(
    runs: Sequence[ForwardRun],
    layers: Sequence[int],
    costs: Costs,
    depth: int,
    combinations: Iterator[tuple[int, str, str]],
    bounds: dict[int, int],
) -> Iterator[tuple[str, ...]]:
    for count, eviction, predictor in combinations:
        scheduler = ExpertScheduler(ExpertCache(count * len(layers), make_eviction(eviction)))
        result = Replay(scheduler, make_predictor(predictor), layers, costs, depth).run(runs)
        yield (str(count), eviction, predictor, str(bounds[count]), *_figures(result, bounds[count]))


def _figures(result: ReplayResult, bound: int) -> tuple[str, ...]:
    predictions = result.predictions
    return (
        str(result.counters.misses),
        str(result.loads),
        f"{result.loads / bound:.3f}",
        f"{predictions.precision:.3f}",
        f"{predictions.recall:.3f}",
        f"{result.share_early:.3f}",
        f"{result.share_hidden:.3f}",
        f"{result.stall_seconds / result.seconds:.3f}",
        f"{result.seconds / max(result.steps, 1):.3f}",
    )


if __name__ == "__main__":
    main()
