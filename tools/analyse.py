"""Every table and figure of the paper for another checkpoint, in one report.

    python -m tools.analyse --model DISTILLED --base BASE --task tiny-arithmetic --n 4000 --out DIR

Runs the evaluations and measurements that aren't in DIR yet, then writes DIR/report.html (one file, nothing else
needed), DIR/report.json, DIR/tables.md and DIR/figures/. Stopped, it goes on where it was when it is called again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from offload_engine.cli.errors import ReportingCommand
from offload_engine.config import bytes_of
from offload_engine.errors import UsageError
from offload_engine.evaluate.tasks import ARITHMETIC
from tools.analysis import measurements, report
from tools.analysis.evaluations import carry_out_all, load
from tools.analysis.figures import require_matplotlib
from tools.analysis.matching import search
from tools.analysis.sections import BY_NAME, SECTIONS, Section
from tools.analysis.study import QUICK_SAMPLES, TIGHT_SHARE, Study, check

GENERATED = 4000
"""Generated problems evaluated when nobody says how many."""


def gather(study: Study, sections: Sequence[Section], jobs: int) -> None:
    """Run whatever `sections` are made of and isn't there yet: evaluations first, measurements alone on the machine."""
    measurements.model_facts(study)
    carry_out_all(study, [run for section in sections for run in section.runs(study.effort)], jobs)
    if any(section.compares for section in sections):
        _match_compression(study, jobs)
    for name in dict.fromkeys(name for section in sections for name in section.measurements):
        measurements.ensure(study, name)


def _match_compression(study: Study, jobs: int) -> None:
    """Evaluate DES-Vote with coresets that should use as many experts as dMoE was found to, task by task."""
    experts = measurements.model_facts(study)["base"]["num_experts"]
    for task in study.tasks:
        while (following := search(partial(load, study, task), experts).following) is not None:
            carry_out_all(study, [following], jobs, tasks=[task])


def chosen(only: str | None) -> list[Section]:
    """The sections named, all if none is. Raises `UsageError`."""
    if only is None:
        return list(SECTIONS)
    names = [name.strip() for name in only.split(",")]
    for name in names:
        if name not in BY_NAME:
            raise UsageError(f"--only names {name!r}, which is no section; there are {', '.join(BY_NAME)}")
    return [section for section in SECTIONS if section.name in names]


def _files(values: Sequence[str]) -> dict[str, Path]:
    files = {}
    for value in values:
        task, equals, path = value.partition("=")
        if not equals or not task or not path:
            raise UsageError(f"--data is {value!r}; wanted TASK=FILE, such as gsm8k=test.jsonl")
        files[task] = Path(path)
    return files


def _size(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int | None:
    try:
        return None if value is None else bytes_of(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r}: {error}") from None


def _study(options: dict[str, Any]) -> Study:
    tasks, quick = options["task"] or (ARITHMETIC,), options["quick"]
    default = QUICK_SAMPLES if quick else GENERATED if tasks == (ARITHMETIC,) else None
    engine = {name: options[name] for name in ("gpu_mem", "threads", "dtype") if options[name] is not None}
    study = Study(
        model=options["model"],
        base=options["base"],
        out=options["out"],
        tasks=tasks,
        n=options["n"] or default,
        data=_files(options["data"]),
        config_file=options["config"],
        engine=engine,
        max_new_tokens=options["max_new_tokens"],
        tight_share=options["expert_share"],
        quick=quick,
    )
    check(study)
    return study


@click.command(cls=ReportingCommand, help=(__doc__ or "").replace("    python", "\b\n    python"))
@click.option("--model", metavar="MODEL", help="The distilled checkpoint.  [default: the built-in model]")
@click.option("--base", metavar="MODEL", help="What it was distilled from.  [default: the same model]")
@click.option("--task", multiple=True, metavar="TASK", help=f"May be given several times.  [default: {ARITHMETIC}]")
@click.option(
    "--n", type=click.IntRange(min=1), help=f"Problems per task.  [default: {GENERATED} generated ones, or all]"
)
@click.option("--data", multiple=True, metavar="TASK=FILE", help="A task's samples; by default the hub's.")
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder of all results.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Evaluations at a time.")
@click.option("--only", metavar="A,B", help=f"Run what these sections need and no more: {', '.join(BY_NAME)}.")
@click.option("--report-only", is_flag=True, help="Run nothing; report what there is.")
@click.option("--markdown", type=click.Path(path_type=Path, dir_okay=False), help="Write the tables here, too.")
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="TOML preset of the engine.")
@click.option("--gpu-mem", callback=_size, metavar="SIZE", help="Budget of fast memory of each engine.")
@click.option("--threads", type=int, help="Compute threads, as in dmoe-run.")
@click.option("--dtype", help="What is computed in, as in dmoe-run.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), help="Longest answer.  [default: 2048; 256 for arithmetic]"
)
@click.option(
    "--expert-share",
    type=float,
    default=TIGHT_SHARE,
    show_default=True,
    help="Share of the experts that the small expert cache holds.",
)
@click.option("--quick", is_flag=True, help="A handful of problems and repetitions, to try it out.")
def main(**options: Any) -> None:
    """See the module."""
    require_matplotlib()
    sections, study = chosen(options["only"]), _study(options)
    if not options["report_only"]:
        gather(study, sections, options["jobs"])
    made = report.build(study)
    report.write(made, options["markdown"])
    for name, lacking in made.missing.items():
        click.echo(f"{name}: {len(lacking)} not run, {lacking[0]}", err=True)
    click.echo(str(study.out / "report.html"))


if __name__ == "__main__":
    main()
