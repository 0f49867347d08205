"""The commands that look at a machine and at what fits it: `dmoe doctor` and `dmoe tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from offload_engine.cli.errors import ReportingCommand
from offload_engine.cli.help import examples
from offload_engine.cli.options import PATH, SETTINGS, common_options, engine_options, take_engine_config
from offload_engine.errors import UsageError


@click.command(
    "doctor",
    cls=ReportingCommand,
    context_settings=SETTINGS,
    epilog=examples(
        "dmoe doctor --model DIR --gpu-mem 8GB",
        "dmoe doctor --measure --out this-machine.toml",
    ),
)
@click.option("--measure", is_flag=True, help="Also measure disk, memory and products, and write them as a profile.")
@click.option(
    "--out",
    type=PATH,
    metavar="FILE",
    help="Where --measure writes its profile, in TOML.  [default: hardware-profile.toml]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as one JSON object.")
@engine_options
@common_options
def doctor(**options: Any) -> int:
    """Look at what of this machine helps or hinders a run, and say the way out of what hinders.

    Each line is ok, a warning or a problem. Exits with 0 where all is well, 5 with warnings, 6 with a problem.
    """
    config = take_engine_config(options)
    if options["out"] is not None and not options["measure"]:
        raise UsageError("--out has no effect without --measure; leave it out")
    from offload_engine.cli.doctor import Request, examine

    return examine(config, Request(**options | {"out": options["out"] or Path("hardware-profile.toml")}))


@click.command(
    "tune",
    cls=ReportingCommand,
    context_settings=SETTINGS,
    epilog=examples(
        "dmoe tune --gpu-mem 8GB",
        "dmoe tune trace.jsonl --gpu rtx4060 --out tuned.toml && dmoe-run --config tuned.toml prompt.txt",
    ),
)
@click.argument("traces", nargs=-1, metavar="[TRACE]...", type=PATH)
@click.option(
    "--gpu",
    metavar="NAME|FILE",
    help="Hardware profile, such as rtx4060, or a .toml file.  [default: measure this machine]",
)
@click.option(
    "--try-top-p",
    "top_ps",
    type=click.FloatRange(0, 1, min_open=True),
    multiple=True,
    default=(0.5, 0.6, 0.7, 0.8),
    show_default=True,
    metavar="X",
    help="dMoE's share of votes to try on traces of original routing; may be given several times.",
)
@click.option(
    "--try-hold-steps",
    "holds",
    type=click.IntRange(1, 4096),
    multiple=True,
    default=(1, 2),
    show_default=True,
    metavar="N",
    help="Steps to hold a coreset for, to try likewise.",
)
@click.option(
    "--least-kept",
    type=click.FloatRange(0, 1),
    metavar="X",
    help="Allow any routing that keeps this share of original routing's votes.  [default: routing as recorded]",
)
@click.option(
    "--out", type=PATH, default=Path("tuned.toml"), show_default=True, metavar="FILE", help="The config to write."
)
@click.option("--plot", type=PATH, metavar="FILE", help="Also draw the frontier, as a PNG.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
@engine_options
@common_options
def tuning(**options: Any) -> None:
    """Search for the options that a budget is best spent with, and write them as a config.

    TRACEs are recorded with dmoe-run --trace, of one model; without any a few short answers are recorded now. They are
    replayed on a virtual clock: every time is simulated.
    """
    config = take_engine_config(options)
    from offload_engine.cli.tune import Request, tune

    tune(config, Request(**options))
