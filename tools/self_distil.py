"""Makes training data of a model's own answers (self-distillation, REFERENCE §4).

    python -m tools.self_distil --prompts prompts.jsonl --out data/answers --workers 2

Killed or interrupted, the same command goes on where it was. The dataset is `shard-*.jsonl`, a line per kept answer
(`id, prompt, prompt_ids, answer, answer_ids, steps`; `answer_ids` ends with the eos), and `manifest.json`, whose
`complete` is true once all is there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

if __package__ in (None, ""):  # run as a script: the repository's root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from offload_engine.cli.errors import ReportingCommand
from offload_engine.cli.options import (
    common_options,
    engine_options,
    sampling_options,
    take_engine_config,
    take_sampling_params,
)
from offload_engine.cli.terminal import note


@click.command(cls=ReportingCommand, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--prompts",
    "files",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="JSON lines, or a .txt with a prompt a line; may be given several times.",
)
@click.option("--field", metavar="NAME", help="JSON field that holds the prompt.  [default: question, else prompt]")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Take the first N prompts only.")
@click.option("--skip-bad", is_flag=True, help="Count prompts that can't be used instead of refusing them.")
@click.option(
    "--out", "directory", required=True, type=click.Path(path_type=Path), metavar="DIR", help="The dataset's directory."
)
@click.option(
    "--shard-size", type=click.IntRange(min=1), default=256, show_default=True, metavar="N", help="Prompts per shard."
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Processes that answer; each has an engine, and a --gpu-mem, of its own.",
)
@click.option(
    "--ray",
    is_flag=False,
    flag_value="local",
    metavar="[ADDRESS]",
    help="Let the workers be actors of the Ray cluster at ADDRESS (auto: the one running here), or, without ADDRESS, "
    "of one started for this job. All must see --out at the same path.",
)
@engine_options
@sampling_options
@common_options
def main(**options: Any) -> None:
    """Answer prompts with a model and keep the answers that end, as training data for the same model.

    Each prompt has a seed of its own, made of its place and --seed, which is 0 here unless given. --threads counts for
    each worker; without it local workers share the cores, and Ray's have one each.
    """
    config, params = take_engine_config(options), take_sampling_params(options)
    from tools.distillation.run import Request, self_distil

    request = Request(config=config, params=params, **options)
    counts = self_distil(request)
    dropped = ", ".join(f"{count} dropped: {reason}" for reason, count in counts["dropped"].items())
    note(f"{request.directory}: {counts['kept']} answers to {counts['prompts']} prompts{dropped and '; ' + dropped}")


if __name__ == "__main__":
    main()
