"""Options of the command line, made from the fields of `EngineConfig` and `SamplingParams`, so that none is missing.

An option that isn't given stays None and leaves the preset's or the default value as it is. What a value may be is
judged by the two classes alone, so that a preset, a keyword and an option are refused in the same words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Final, Literal, TypeVar, Union, get_args, get_origin

import click
from click.shell_completion import CompletionItem
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import offload_engine
from offload_engine.cli.help import SectionOption
from offload_engine.config import EngineConfig
from offload_engine.core import SamplingParams

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

ENGINE_HELP: Final = {
    "model": "Checkpoint directory or hub id (owner/name, owner/name@revision).  [default: the built-in model]",
    "device": "auto, cpu, cuda or cuda:N.",
    "dtype": "What is computed in; auto: as stored, but float32 on a CPU for fp16 and small models.",
    "gpu_mem": "Budget of fast memory: VRAM, or this process's RAM on a CPU. 8GB, 7.5GiB, 900MB, or auto.",
    "host_mem": "Budget of pinned host memory beside a GPU: a size, auto, or none.",
    "expert_mem": "Cap on the expert slots alone.  [default: what --gpu-mem leaves]",
    "max_context": "Positions of prompt and answer together.  [default: the planner decides]",
    "routing": "original, top-k, dmoe, des-seq, des-vote or block-capacity.  "
    "[default: what the checkpoint was made for]",
    "top_p": "dmoe: share of a block's votes its experts must hold.  [default: the checkpoint's, else 0.6]",
    "min_experts": "dmoe: fewest experts a block may choose from.  [default: the checkpoint's, else 16]",
    "top_k_experts": "top-k: experts per token.",
    "des_k": "des-seq: experts each token brings into its block's choice.",
    "des_beta": "des-vote: share of a layer's experts a block may choose from.",
    "expert_capacity": "block-capacity: experts a block may choose from.  [default: the checkpoint's, else 48]",
    "residency_bonus": "dmoe: how much more votes for experts in fast memory count; above 0 they sway answers.",
    "hold_steps": "dmoe: denoising steps that a block keeps its choice of experts.",
    "eviction": "Which expert makes room for another.",
    "predictor": "What guesses a layer's experts before its router has spoken.",
    "prefetch_depth": "MoE layers to prefetch ahead; 0: none.",
    "hot_set": "Remember the experts used most, and start with them.",
    "tuned": "Whether --gpu-mem auto follows what dmoe tune found.",
    "transfers_in_flight": "Transfers started and not finished, 1 or 2.",
    "cpu_experts": "Beside a GPU: missing experts that the CPU computes while others are copied; a share, or by time.",
    "reader_threads": "Threads that read experts from disk.",
    "verify": "When a converted checkpoint's experts are held against their checksums.",
    "cuda_graphs": "Whether a GPU replays attention and routers from CUDA graphs.",
    "prefill_chunk": "Prompt tokens that attend together in a prefill.",
    "batch_size": "Prompts answered together; each takes a KV cache.",
    "lanes_together": "Of these, how many share forwards.",
    "prefix_reuse": "Begin with what an earlier prompt left of the same first blocks; auto: when serving.",
    "fused_commit": "Commit a finished block in the next block's first step.",
    "threads": "Compute threads.  [default: torch's choice; 1 for small models]",
    "mask_token_id": "Id of an undecided position.  [default: the checkpoint's]",
    "eos_token_id": "Id that ends an answer.  [default: the checkpoint's]",
}
SAMPLING_HELP: Final = {
    "max_new_tokens": "Longest answer, in tokens.",
    "block_length": "Tokens denoised together.",
    "steps": "Denoising steps a block may take.",
    "threshold": "Tokens surer than this are taken at once; 1: the schedule alone decides.",
    "temperature": "0 is greedy.",
    "top_k": "Sample among the k most probable tokens; 0: all.",
    "top_p": "Sample among the most probable tokens that together reach this probability.",
    "seed": "Seed of the sampler.  [default: a fresh one]",
    "sample_seed": "Seed of the sampler; sample i takes it plus i.  [default: 0]",
    "stop": "End the answer before this text; may be given several times.",
}
SAMPLING_NAMES: Final = {"top_p": "sample_top_p"}
"""Parameters whose option has another name: --top-p is dMoE's."""
EVALUATION_NAMES: Final = SAMPLING_NAMES | {"seed": "sample_seed"}
"""The same for `dmoe eval`, whose --seed chooses the problems."""

ENGINE, DECODING = "The engine", "Decoding"
"""Headings of options in --help."""
CHOICES: Final[Mapping[str, tuple[str, ...]]] = {
    "model": ("DIR",),
    "device": ("auto", "cpu", "cuda"),
    "gpu_mem": ("auto",),
    "host_mem": ("auto", "none"),
    "routing": ("original", "top-k", "dmoe", "des-seq", "des-vote", "block-capacity"),
}
"""What a shell may offer for options whose type doesn't say it."""

PATH: Final = click.Path(path_type=Path)
SETTINGS: Final = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
"""Of every command."""

_SIZES = frozenset({"gpu_mem", "host_mem", "expert_mem"})


def engine_options(command: Decorated) -> Decorated:
    """Give a command every field of `EngineConfig`, and --config."""
    for name in reversed(EngineConfig.model_fields):
        command = _option(EngineConfig, name, name, ENGINE_HELP[name], section=ENGINE)(command)
    return click.option(
        "--config",
        "config_file",
        cls=SectionOption,
        section=ENGINE,
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="TOML file of these options, or the name of a preset, such as gpu-8gb.",
    )(command)


def sampling_options(command: Decorated, names: Mapping[str, str] = SAMPLING_NAMES) -> Decorated:
    """Give a command every field of `SamplingParams`; `names` are those that are called differently."""
    for field in reversed(SamplingParams.model_fields):
        name = names.get(field, field)
        text = SAMPLING_HELP.get(name, SAMPLING_HELP[field])
        command = _option(SamplingParams, field, name, text, section=DECODING)(command)
    return command


def common_options(command: Decorated) -> Decorated:
    """Give a command --debug and --version."""
    command = click.option(
        "--debug", is_flag=True, is_eager=True, expose_value=False, callback=_debug, help="Show tracebacks of errors."
    )(command)
    return version_option(command)


def version_option(command: Decorated) -> Decorated:
    """Give a command --version."""
    return click.option(
        "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version."
    )(command)


def take_engine_config(options: dict[str, Any]) -> EngineConfig:
    """Remove what `engine_options` added to `options`, and make an `EngineConfig` of it; raises `ConfigError`."""
    values = {name: options.pop(name) for name in EngineConfig.model_fields}
    return EngineConfig.build(options.pop("config_file"), **values)


def take_sampling_params(options: dict[str, Any], names: Mapping[str, str] = SAMPLING_NAMES) -> SamplingParams:
    """Remove what `sampling_options` added to `options`, and make `SamplingParams` of it; raises `UsageError`."""
    values = {name: options.pop(names.get(name, name)) for name in SamplingParams.model_fields}
    return SamplingParams(**{name: value for name, value in values.items() if value not in (None, ())})


def _option(owner: type[BaseModel], field: str, name: str, text: str, section: str) -> Callable[[Decorated], Decorated]:
    info = owner.model_fields[field]
    of_section: dict[str, Any] = {"cls": SectionOption, "section": section, "default": None}
    if info.annotation is bool:
        text = f"{text}  [default: {'yes' if info.default else 'no'}]"
        flag = name.replace("_", "-")
        return click.option(f"--{flag}/--no-{flag}", name, help=text, **of_section)
    kind, metavar, multiple = _parameter(field, info.annotation)
    if info.default not in (None, (), PydanticUndefined):
        text = f"{text}  [default: {info.default}]"
    words = CHOICES.get(name, metavar.split("|") if "|" in metavar else ())
    return click.option(
        f"--{name.replace('_', '-')}",
        name,
        type=kind,
        metavar=metavar,
        multiple=multiple,
        help=text,
        shell_complete=_completes(words),
        **of_section,
    )


def _completes(words: Iterable[str]) -> Callable[..., list[CompletionItem]]:
    """What a shell offers for an option's value: those of `words` that begin as it does; "DIR": directories."""
    kinds = {"DIR": "dir"}

    def complete(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [
            CompletionItem(incomplete if word in kinds else word, type=kinds.get(word, "plain"))
            for word in words
            if word in kinds or word.startswith(incomplete)
        ]

    return complete


def _parameter(field: str, annotation: Any) -> tuple[click.ParamType[Any], str, bool]:
    """Click's type of a field, how it is shown, and whether it may be given several times."""
    if field in _SIZES:
        return click.STRING, "SIZE", False
    if field == "cpu_experts":
        return click.STRING, "off|auto|X", False
    choices = get_args(annotation) if get_origin(annotation) is Literal else ()
    if choices:
        return click.STRING, "|".join(choices), False
    kinds = _alternatives(annotation)
    number = _NUMBERS.get(next(iter(kinds))) if len(kinds) == 1 else None
    if number is not None:
        return (*number, False)
    return click.STRING, "TEXT", get_origin(annotation) is tuple


_NUMBERS: Mapping[Any, tuple[click.ParamType[Any], str]] = {int: (click.INT, "N"), float: (click.FLOAT, "X")}


def _alternatives(annotation: Any) -> set[Any]:
    """The types an annotation allows, None left out."""
    if get_origin(annotation) in (Union, UnionType):
        return set().union(*map(_alternatives, get_args(annotation))) - {type(None)}
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    return {annotation}


def _debug(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(dict)["debug"] = True


def _version(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        echo_version()
        context.exit()


def echo_version() -> None:
    """Print the package's version."""
    click.echo(f"offload_engine {offload_engine.__version__}")
