"""The commands and their options; what they do is in modules of their own, imported when it is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from offload_engine.cli.errors import ReportingCommand, ReportingGroup
from offload_engine.cli.options import (
    common_options,
    echo_version,
    engine_options,
    sampling_options,
    take_engine_config,
    take_sampling_params,
    version_option,
)
from offload_engine.cli.prompts import read_prompts

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.command("run", cls=ReportingCommand, context_settings=_SETTINGS)
@click.argument("files", nargs=-1, metavar="[PROMPT_FILE|-]...")
@click.option("-p", "--prompt", "texts", multiple=True, metavar="TEXT", help="A prompt; may be given several times.")
@click.option("--raw", is_flag=True, help="Leave the chat template out: continue the prompt as it stands.")
@click.option("--token-ids", is_flag=True, help="Prompts are lists of token ids, and so are the answers.")
@engine_options
@sampling_options
@click.option("--stats", is_flag=True, help="Show the memory plan and all counters on stderr.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per prompt instead of the text.")
@click.option(
    "--trace", type=click.Path(path_type=Path), metavar="FILE", help="Append every routing decision to this file."
)
@click.option("--watch", is_flag=True, help="Watch the block being denoised on stderr.")
@common_options
def run(files: tuple[str, ...], texts: tuple[str, ...], **options: Any) -> int:
    """Answer prompts with a diffusion language model under a memory budget.

    Prompts are files of UTF-8 text, - for standard input, or given with -p. Answers go to standard output as their
    blocks finish, everything else to standard error.
    """
    config, params = take_engine_config(options), take_sampling_params(options)
    prompts = read_prompts(texts, files, token_ids=options["token_ids"])
    from offload_engine.cli.run import Request, answer_prompts

    return answer_prompts(config, Request(prompts=prompts, params=params, **options))


@click.command("plan", cls=ReportingCommand, context_settings=_SETTINGS)
@engine_options
@click.option("--json", "as_json", is_flag=True, help="Print the plan as a JSON object.")
@common_options
def plan(as_json: bool, **options: Any) -> None:
    """Show how a memory budget would be divided, without loading weights.

    --model may also be a config.json, or a directory that holds nothing else. --device auto plans for a GPU if this
    machine has one, else for the CPU; cuda plans for a GPU anywhere.
    """
    config = take_engine_config(options)
    from offload_engine.cli.plan import show_plan

    show_plan(config, as_json=as_json)


@click.group("dmoe", cls=ReportingGroup, context_settings=_SETTINGS, no_args_is_help=False)
@version_option
def dmoe() -> None:
    """Memory-constrained inference for Mixture-of-Experts diffusion language models."""


@dmoe.command("version")
def version() -> None:
    """Show the version."""
    echo_version()


dmoe.add_command(run)
dmoe.add_command(plan)


def run_main() -> None:
    """The program `dmoe-run`."""
    run.main(prog_name="dmoe-run")


def main() -> None:
    """The program `dmoe`."""
    dmoe.main(prog_name="dmoe")
