"""Options can't drift from the fields they stand for."""

from __future__ import annotations

import click
import pytest

import offload_engine
from offload_engine import EngineConfig, SamplingParams
from offload_engine.cli.commands import bench, conversion, evaluation, plan, run, serving
from offload_engine.cli.options import EVALUATION_NAMES, SAMPLING_NAMES, take_engine_config, take_sampling_params
from offload_engine.errors import OffloadError
from tests.cli.command_line import ROOT, dmoe_command

OTHERS = {"files", "texts", "raw", "token_ids", "config_file", "stats", "as_json", "trace", "watch", "debug", "version"}
OF_EVALUATION = {"task", "count", "seed", "subject", "data", "out", "grade_only", "compare"}


def names(command: click.Command) -> set[str]:
    return {str(parameter.name) for parameter in command.params}


def test_every_field_is_an_option_and_no_other_is():
    sampling = {SAMPLING_NAMES.get(name, name) for name in SamplingParams.model_fields}
    assert names(run) == set(EngineConfig.model_fields) | sampling | OTHERS
    sampling = {EVALUATION_NAMES.get(name, name) for name in SamplingParams.model_fields}
    common = {"config_file", "as_json", "debug", "version"}
    assert names(evaluation) == set(EngineConfig.model_fields) | sampling | common | OF_EVALUATION
    assert names(plan) == set(EngineConfig.model_fields) | {"config_file", "as_json", "debug", "version"}


def test_what_is_given_arrives_with_its_type():
    words = "--gpu-mem 2GB --host-mem none --threads 3 --top-p 0.5 --device CUDA:1 --routing Top_K --dtype float32"
    words += " --temperature 0.5 --sample-top-p 0.9 --stop a --stop b --seed 7"
    context = run.make_context("dmoe-run", words.split())
    options = dict(context.params)
    config, params = take_engine_config(options), take_sampling_params(options)
    assert config == EngineConfig(
        gpu_mem="2GB", threads=3, top_p=0.5, device="cuda:1", routing="top-k", dtype="float32", host_mem="none"
    )
    assert params == SamplingParams(temperature=0.5, top_p=0.9, stop=("a", "b"), seed=7)


def test_what_is_not_given_is_the_default():
    options = dict(run.make_context("dmoe-run", []).params)
    assert take_engine_config(options) == EngineConfig()
    assert take_sampling_params(options) == SamplingParams()


@pytest.mark.parametrize(
    "command", [run, serving, plan, evaluation, bench, conversion], ids=lambda command: command.name
)
def test_every_option_is_explained_here_and_in_the_manual(command):
    manual = (ROOT / "docs" / "command-line.md").read_text()
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help
            assert f"`{option.opts[-1]}" in manual, f"docs/command-line.md lacks {option.opts[-1]}"


def test_defaults_are_shown():
    shown = " ".join(dmoe_command("run", "--help").stdout.split())
    for text in ("[default: next-use]", "[default: 0.95]", "[default: the planner decides]"):
        assert text in shown


def test_the_version_is_the_packages():
    for arguments in (["version"], ["--version"], ["run", "--version"], ["plan", "--version"]):
        assert dmoe_command(*arguments).stdout == f"offload_engine {offload_engine.__version__}\n"


def test_the_public_names_are_there():
    for name in offload_engine.__all__:
        assert getattr(offload_engine, name) is not None
    assert "Engine" in dir(offload_engine)
    with pytest.raises(AttributeError, match="no attribute 'Bogus'"):
        _ = offload_engine.Bogus
    from offload_engine import errors

    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, OffloadError)}
    assert kinds <= set(offload_engine.__all__)
