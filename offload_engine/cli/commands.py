"""The commands and their options; what they do is in modules of their own, imported when it is done."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from offload_engine.cli.chat_command import chat
from offload_engine.cli.completion import completion
from offload_engine.cli.errors import ReportingCommand, ReportingGroup
from offload_engine.cli.help import examples
from offload_engine.cli.machine_commands import doctor, tuning
from offload_engine.cli.options import (
    EVALUATION_NAMES,
    common_options,
    echo_version,
    engine_options,
    sampling_options,
    take_engine_config,
    take_sampling_params,
    version_option,
)
from offload_engine.cli.options import PATH as _PATH
from offload_engine.cli.options import SETTINGS as _SETTINGS
from offload_engine.cli.prompts import read_prompts
from offload_engine.cli.serve_command import serving
from offload_engine.cli.simulate_command import simulation
from offload_engine.config import EngineConfig, parse_bytes
from offload_engine.errors import UsageError


@click.command(
    "run",
    cls=ReportingCommand,
    context_settings=_SETTINGS,
    epilog=examples(
        "dmoe-run --gpu-mem 8GB prompt.txt",
        "dmoe-run --model DIR --gpu-mem 8GB --routing dmoe --stats -p 'How many are 2 and 2?'",
        "dmoe-run --model owner/name --config configs/gpu-8gb.toml --watch prompt.txt",
        "cat prompt.txt | dmoe-run --json - | jq .text",
    ),
)
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


@click.command(
    "plan",
    cls=ReportingCommand,
    context_settings=_SETTINGS,
    epilog=examples(
        "dmoe plan --gpu-mem 8GB",
        "dmoe plan --model config.json --device cuda --gpu-mem 8GB --host-mem 24GB",
    ),
)
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


@click.command(
    "eval",
    cls=ReportingCommand,
    context_settings=_SETTINGS,
    epilog=examples(
        "dmoe eval --task tiny-arithmetic --n 100 --gpu-mem 8GB",
        "dmoe eval --task gsm8k --model DIR --routing dmoe --out runs/dmoe",
        "dmoe eval --compare runs/original runs/dmoe",
    ),
)
@click.option("--task", metavar="NAME", help="tiny-arithmetic, gsm8k, math500, arc-c, mmlu or mmlu:SUBJECT.")
@click.option(
    "--n", "count", type=click.INT, metavar="N", help="Only the first N samples.  [default: all; 1000 if generated]"
)
@click.option("--seed", type=click.INT, metavar="N", help="Seed of generated problems.  [default: 2]")
@click.option("--subject", metavar="TEXT", help="mmlu: the subject, or all.  [default: high_school_mathematics]")
@click.option("--data", type=_PATH, metavar="FILE", help="JSON lines or parquet of the dataset.  [default: the hub's]")
@click.option(
    "--out", type=_PATH, metavar="DIR", help="Keep every answer here; a run that was cut off goes on from there."
)
@click.option(
    "--grade-only", type=_PATH, metavar="FILE", help="Grade saved answers: JSON lines with generation and gold."
)
@click.option(
    "--compare", type=_PATH, nargs=2, metavar="DIR_A DIR_B", help="Compare two runs of the same samples, B against A."
)
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as one JSON object.")
@engine_options
@partial(sampling_options, names=EVALUATION_NAMES)
@common_options
def evaluation(**options: Any) -> int:
    """Measure accuracy, unique experts and speed on a task, grade saved answers, or compare two runs.

    The outcome goes to standard output, progress to standard error. Decoding is LLaDA2's official unless told
    otherwise: greedy, blocks of 32 tokens in at most 32 steps, threshold 0.95, at most 2048 tokens.
    """
    config, params = take_engine_config(options), take_sampling_params(options, EVALUATION_NAMES)
    if params.temperature > 0 and params.seed is None:  # what is measured should be measurable again
        params = params.model_copy(update={"seed": 0})
    as_json, compare, answers = options["as_json"], options["compare"], options["grade_only"]
    if compare is not None:
        _refuse_beside("--compare", {"compare"})
    elif answers is not None:
        _refuse_beside("--grade-only", {"grade_only", "task"})
    if compare is not None:
        from offload_engine.cli.grade import show_comparison

        show_comparison(*compare, as_json=as_json)
        return 0
    if answers is not None:
        from offload_engine.cli.grade import show_grades

        show_grades(options["task"] or "gsm8k", answers, as_json=as_json)
        return 0
    from offload_engine.cli.eval import Request, run_task
    from offload_engine.evaluate.tasks import NAMES, make_task

    wanted = {name: options[name] for name in ("seed", "subject", "data")}
    if options["task"] is None:
        raise UsageError(f"--task is missing; there are {', '.join(NAMES)} (and mmlu:SUBJECT)")
    task = make_task(options["task"], n=options["count"], **wanted)
    return run_task(config, Request(task=task, params=params, out=options["out"], as_json=as_json))


@click.command(
    "bench",
    cls=ReportingCommand,
    context_settings=_SETTINGS,
    epilog=examples(
        "dmoe bench --preset llada2-2gb --limit 2GB --routing dmoe --out results",
        "dmoe bench --model DIR --limit 8GB --only engine --rounds 3",
    ),
)
@click.option("--preset", metavar="NAME", help="The checkpoint that tools/make_checkpoint wrote to checkpoints/NAME.")
@click.option("--layers", type=click.IntRange(min=1), metavar="N", help="Of --preset: its version with N layers.")
@click.option("--limit", metavar="SIZE", help="Most memory of each contender, page cache included.  [default: none]")
@click.option(
    "--budget", "budgets", multiple=True, metavar="SIZE", help="A budget of the engine; may be given several times."
)
@click.option(
    "--packed",
    multiple=True,
    type=_PATH,
    metavar="DIR",
    help="The same model in another weight format; may be several.",
)
@click.option(
    "--only", multiple=True, metavar="PATTERN", help="Contenders to run, such as engine/* or bandwidth; may be several."
)
@click.option("--rounds", type=click.IntRange(min=1), default=2, show_default=True, help="Times that each one runs.")
@click.option("--blocks", type=click.IntRange(min=1), default=6, show_default=True, help="Blocks measured in a run.")
@click.option("--warm-up", type=click.IntRange(min=1), default=1, show_default=True, help="Blocks before them.")
@click.option("--steps", type=click.IntRange(1, 32), default=8, show_default=True, help="Denoising steps per block.")
@click.option(
    "--prompt-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Length of the prompt."
)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seed", type=click.INT, default=0, show_default=True, help="Of the prompt, and of the sampler.")
@click.option(
    "--patience",
    type=click.FloatRange(min=1),
    default=900.0,
    show_default=True,
    metavar="SECONDS",
    help="A contender that takes longer is cut short, and what it measured counts.",
)
@click.option("--out", type=_PATH, metavar="DIR", help="Write bench.json, bench.md and bench.png here.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
@click.option("--check", is_flag=True, help="Exit with 1 if a bar does not hold or a contender failed.")
@engine_options
@common_options
def bench(**options: Any) -> int:
    """Measure the engine against memory-mapped weights, an unlimited budget, peers and the machine's own limits.

    Contenders take turns, each in a process of its own within --limit. Tables go to standard output, progress to
    standard error. The engine's options apply to the engine and, as far as they mean anything there, to its rivals.
    """
    config = take_engine_config(options)
    from offload_engine.bench.lineup import Request
    from offload_engine.bench.spec import Workload
    from offload_engine.cli.bench import Wanted, preset_directory, run_benchmark

    preset, layers = options.pop("preset"), options.pop("layers")
    if preset is not None and config.model is not None:
        raise UsageError("--preset and --model both name the model; leave one of them out")
    if preset is None and layers is not None:
        raise UsageError("--layers has no effect without --preset; leave it out")
    if preset is not None:
        chosen = {"model": str(preset_directory(preset, layers))}
        config = EngineConfig(**config.model_dump(exclude_unset=True) | chosen)
    limit = options.pop("limit")
    request = Request(
        config=config,
        workload=Workload(**{name: options.pop(name) for name in Workload.model_fields if name in options}),
        limit=None if limit is None else parse_bytes(limit, "--limit"),
        budgets=[parse_bytes(budget, "--budget") for budget in options.pop("budgets")],
        **{name: options.pop(name) for name in ("packed", "only", "rounds", "patience")},
    )
    return run_benchmark(request, Wanted(**options))


@click.command(
    "convert",
    cls=ReportingCommand,
    context_settings=_SETTINGS,
    epilog=examples(
        "dmoe convert --model DIR --out DIR-int4 --experts int4",
        "dmoe convert --model DIR --out DIR-packed --evaluate 100",
    ),
)
@click.option("--model", metavar="TEXT", help="Checkpoint directory or hub id.  [default: the built-in model]")
@click.option("--out", type=_PATH, required=True, metavar="DIR", help="New directory; written as DIR.partial first.")
@click.option(
    "--experts",
    type=click.Choice(["stored", "bf16", "int8", "int4"]),
    default="stored",
    show_default=True,
    help="What expert weights are kept as; stored: as they are.",
)
@click.option("--group-size", type=click.INT, metavar="N", help="int4: columns that share a scale.  [default: 32]")
@click.option(
    "--evaluate", type=click.INT, metavar="N", help="Ask both models N generated problems and compare the answers."
)
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as one JSON object.")
@common_options
def conversion(**options: Any) -> None:
    """Pack a checkpoint's experts so that each is one direct read, in fewer bits if wanted.

    The new directory is a model like any other: dmoe-run --model DIR. Progress goes to standard error, what came of it
    to standard output.
    """
    from offload_engine.cli.convert import Request, convert_model

    convert_model(Request(**options))


def _refuse_beside(option: str, allowed: set[str]) -> None:
    """Refuse what else was given on the command line, and would be ignored; `allowed` are parameters' names."""
    context = click.get_current_context()
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if given and parameter.name not in allowed | {"as_json", "debug"}:
            raise UsageError(f"{parameter.opts[0]} has no effect beside {option}; leave one of them out")


@click.group(
    "dmoe",
    cls=ReportingGroup,
    context_settings=_SETTINGS,
    no_args_is_help=False,
    epilog="`dmoe COMMAND --help` says more; `dmoe-run` is `dmoe run`.",
)
@version_option
def dmoe() -> None:
    """Memory-constrained inference for Mixture-of-Experts diffusion language models."""


@dmoe.command("version")
def version() -> None:
    """Show the version."""
    echo_version()


dmoe.add_command(run)
dmoe.add_command(chat)
dmoe.add_command(plan)
dmoe.add_command(serving)
dmoe.add_command(evaluation)
dmoe.add_command(bench)
dmoe.add_command(conversion)
dmoe.add_command(doctor)
dmoe.add_command(tuning)
dmoe.add_command(simulation)
dmoe.add_command(completion)


def run_main() -> None:
    """The program `dmoe-run`."""
    run.main(prog_name="dmoe-run")


def main() -> None:
    """The program `dmoe`."""
    dmoe.main(prog_name="dmoe")
