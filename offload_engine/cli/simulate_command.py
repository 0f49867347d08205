"""The command `dmoe simulate` and its options."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import click

from offload_engine.cli.errors import ReportingCommand
from offload_engine.cli.help import examples
from offload_engine.cli.options import common_options
from offload_engine.simulate.gate import ACCURACY

SETTINGS: Final = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.command(
    "simulate",
    cls=ReportingCommand,
    context_settings=SETTINGS,
    epilog=examples(
        "dmoe-run --trace trace.jsonl prompt.txt && dmoe simulate trace.jsonl --gpu rtx4060 --gpu rtx4090",
    ),
)
@click.argument("trace", type=click.Path(path_type=Path))
@click.option(
    "--gpu",
    "gpus",
    multiple=True,
    required=True,
    metavar="NAME|FILE",
    help="Hardware profile, such as rtx4060, or a .toml file; may be several.",
)
@click.option(
    "--gpu-mem",
    "budgets",
    multiple=True,
    metavar="SIZE",
    help="Budget of fast memory; may be several.  [default: 90 %]",
)
@click.option("--slots", multiple=True, type=click.IntRange(min=2), metavar="N", help="Expert slots, without a plan.")
@click.option("--host-mem", metavar="SIZE", help="Pinned host memory, or none.  [default: 60 % of the profile's RAM]")
@click.option("--max-context", type=click.INT, metavar="N", help="Positions of prompt and answer together.")
@click.option("--top-p", type=click.FLOAT, multiple=True, metavar="X", help="Confine an original trace as dMoE would.")
@click.option("--min-experts", type=click.IntRange(min=1), metavar="N", help="Beside --top-p.  [default: 16]")
@click.option("--eviction", multiple=True, metavar="NAME", help="lru, lfu, score-aware or next-use; may be several.")
@click.option("--predictor", multiple=True, metavar="NAME", help="As of dmoe-run; may be several.")
@click.option("--prefetch-depth", type=click.INT, metavar="N", help="MoE layers to prefetch ahead.")
@click.option("--transfers-in-flight", type=click.INT, metavar="N", help="1 or 2.")
@click.option(
    "--cpu-experts", multiple=True, metavar="off|auto|X", help="As of dmoe-run; may be several.  [default: off]"
)
@click.option("--pageable", is_flag=True, help="Host memory that is not pinned.")
@click.option(
    "--gate-accuracy",
    type=click.FloatRange(0, 1),
    default=ACCURACY,
    show_default=True,
    help="Share of a layer's experts that its preview names rightly.",
)
@click.option("--warm-up", type=click.IntRange(min=0), default=1, show_default=True, help="Blocks that don't count.")
@click.option("--model", metavar="TEXT", help="Checkpoint or config.json.  [default: what the trace says]")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
@common_options
def simulation(**options: Any) -> None:
    """Predict how fast a machine would run a recorded TRACE (dmoe-run --trace), memory and link included.

    The engine's own cache, eviction, prediction and scheduling run on a virtual clock. Nothing is measured.
    """
    from offload_engine.cli.simulate import Request, simulate

    simulate(Request(**options))
