"""Bad input from the command line: one line that names the thing, and the exit code of its kind."""

from __future__ import annotations

import json
import shutil

import pytest

from offload_engine.cli import run as run_module
from offload_engine.errors import InternalError
from tests.checkpoints import tiny_config, write_checkpoint
from tests.cli.command_line import FAST, SHORT, complaint, dmoe_command, dmoe_run, write_speaking_checkpoint


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "there is no prompt"),
        (["-p", "a", "file.txt"], "'file.txt'"),
        (["-", "-"], "standard input (-) is named more than once"),
        (["-p", "a", "--bogus"], "--bogus"),
        (["-p"], "'-p' requires an argument"),
        (["-p", "a", "--threads", "many"], "'--threads': 'many'"),
        (["-p", "a", "--threads", "0"], "'threads': found 0"),
        (["-p", "a", "--gpu-mem", "0"], "'gpu_mem': found '0'"),
        (["-p", "a", "--gpu-mem", "-1GB"], "'gpu_mem': found '-1GB'"),
        (["-p", "a", "--gpu-mem", "much"], "'gpu_mem': found 'much'"),
        (["-p", "a", "--gpu-mem", "1GB", "--expert-mem", "2GB"], "expert_mem is 2.00 GB"),
        (["-p", "a", "--eviction", "fifo"], "'eviction': found 'fifo'"),
        (["-p", "a", "--device", "tpu"], "'device': found 'tpu'"),
        (["-p", "a", "--top-p", "1.5"], "'top_p': found 1.5"),
        (["-p", "a", "--sample-top-p", "0"], "'top_p'"),
        (["-p", "a", "--threshold", "nan"], "'threshold'"),
        (["-p", "a", "--max-new-tokens", "0"], "'max_new_tokens'"),
        (["-p", "a", "--stop", ""], "'stop'"),
        (["-p", "a", "--config", "/no/such.toml"], "/no/such.toml: not found"),
        (["-p", ""], "-p: the prompt is empty"),
        (["-p", " \n"], "-p: the prompt is empty"),
        (["-p", "a", "-p", ""], "-p (prompt 2): the prompt is empty"),
        (["-p", "a\udcff"], "-p: character 1"),
        (["-p", "1 two", "--token-ids"], "-p: token 1 is 'two'"),
        (["-p", "[1, true]", "--token-ids"], "-p: token 1 is True"),
        (["-p", "[1, 2", "--token-ids"], "-p: not a JSON list"),
        (["-p", "[]", "--token-ids"], "-p: the prompt is empty"),
    ],
)
def test_usage_is_refused_before_a_model_is_looked_for(arguments, named):
    done = dmoe_run("--model", "/no/such/model", *arguments)
    message = complaint(done)
    assert named in message
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "the prompt is empty"),
        (b"\n", "the prompt is empty"),
        (b"abc\xff\xfe", "byte 3 (0xff) is not UTF-8"),
        (b"abc\0def", "byte 3 is 0"),
    ],
)
def test_a_file_that_is_no_text_is_refused_by_name_and_place(content, named, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes(content)
    for done, source in ((dmoe_run(file), str(file)), (dmoe_run("-", stdin=content), "standard input")):
        assert done.exit_code == 2
        assert complaint(done).startswith(f"{source}: {named}")


def test_files_that_cannot_be_read(tmp_path):
    missing = dmoe_run(tmp_path / "missing.txt")
    directory = dmoe_run(tmp_path)
    endless = dmoe_run("/dev/zero")
    assert f"{tmp_path / 'missing.txt'}: no such file" in complaint(missing)
    assert f"{tmp_path}: is a directory" in complaint(directory)
    assert "/dev/zero: longer than" in complaint(endless)
    assert missing.exit_code == directory.exit_code == endless.exit_code == 2


def test_prompts_the_model_cannot_take(speaking, mute, tmp_path):
    file = tmp_path / "long.txt"
    file.write_text("many words " * 100)
    long = dmoe_run("--model", speaking, *SHORT, "-p", "short enough", "-p", file.read_text())
    assert complaint(long).startswith("-p (prompt 2): the prompt has ")
    by_name = dmoe_run("--model", speaking, *SHORT, file)
    assert complaint(by_name).startswith(f"{file}: the prompt has ")
    outside = dmoe_run("--model", mute, *SHORT, "--token-ids", "-p", "1 96")
    assert "-p: prompt token 1 is 96; wanted an id from 0 to 95" in complaint(outside)
    text = dmoe_run("--model", mute, *SHORT, "-p", "text")
    assert "--token-ids" in complaint(text)
    assert long.exit_code == by_name.exit_code == outside.exit_code == text.exit_code == 2


def without_config(model):
    (model / "config.json").unlink()
    return "config.json"


def other_architecture(model):
    (model / "config.json").write_text(json.dumps({"model_type": "llama\x1b[2J"}))
    return "model_type is 'llama\\x1b[2J'"


def missing_key(model):
    config = json.loads((model / "config.json").read_text())
    del config["hidden_size"]
    (model / "config.json").write_text(json.dumps(config))
    return "'hidden_size' is missing"


def truncated(model):
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])
    return "model.safetensors"


def lying_header(model):
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + data[8:])
    return "model.safetensors"


def no_weights(model):
    (model / "model.safetensors").unlink()
    return "holds no weights"


def missing_tensor(model):
    write_checkpoint(model, tiny_config(vocab_size=261))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    return "model.layers.3."


def wrong_shape(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidden_size": 48}))
    return "shape"


def small_vocabulary(model):
    write_checkpoint(model, tiny_config())
    return "tokenizer.json: holds ids up to 260"


def damaged_tokenizer(model):
    (model / "tokenizer.json").write_text("{")
    return "tokenizer.json"


@pytest.mark.parametrize(
    "damage",
    [
        without_config,
        other_architecture,
        missing_key,
        truncated,
        lying_header,
        no_weights,
        missing_tensor,
        wrong_shape,
        small_vocabulary,
        damaged_tokenizer,
    ],
)
def test_a_model_that_cannot_be_loaded(damage, speaking, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(speaking, model)
    named = damage(model)
    done = dmoe_run("--model", model, *SHORT, "-p", "a")
    message = complaint(done)
    assert named in message
    assert str(model) in message
    assert "\x1b" not in done.stderr
    assert done.exit_code == 3


def test_paths_that_are_no_model(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = tmp_path / "file"
    file.write_text("")
    for model in (tmp_path / "missing", tmp_path, file, "no-owner"):
        done = dmoe_run("--model", model, "-p", "a")
        assert str(model) in complaint(done)
        assert done.exit_code == 3


def test_a_budget_that_is_too_small_shows_the_table_and_the_smallest_that_works(speaking):
    done = dmoe_run("--model", speaking, "--gpu-mem", "1MB", "-p", "a")
    message = complaint(done)
    assert done.exit_code == 4
    assert "short by" in done.stderr
    assert "expert slots" in done.stderr
    smallest = int(message.split("(")[1].split(" bytes")[0])
    assert smallest > 1_000_000
    tight = dmoe_run("--model", speaking, *SHORT, "--expert-mem", "1KB", "-p", "a")
    assert complaint(tight).startswith("expert_mem is 1.00 KB, but 2 expert slots take ")
    assert tight.exit_code == 4


def test_what_this_version_or_model_does_not_know(speaking):
    cuda = dmoe_run("--model", speaking, "--device", "cuda", "-p", "a")
    assert "'cuda'" in complaint(cuda)
    assert cuda.exit_code == 4
    routing = dmoe_run("--model", speaking, *FAST, "--routing", "random", "-p", "a")
    assert "routing is 'random'; choose one of original, top-k, dmoe" in complaint(routing)
    experts = dmoe_run("--model", speaking, *FAST, "--routing", "top-k", "--top-k-experts", "99", "-p", "a")
    assert "top_k_experts is 99" in complaint(experts)
    assert routing.exit_code == experts.exit_code == 2


def test_a_preset_with_an_unknown_key(tmp_path):
    preset = tmp_path / "preset.toml"
    preset.write_text("gpu_men = '8GB'\n")
    done = dmoe_run("--config", preset, "-p", "a")
    assert complaint(done) == f"{preset}: option: unknown key 'gpu_men'; did you mean 'gpu_mem'?"
    assert done.exit_code == 2


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ZeroDivisionError("division\nby zero"), 1, "internal error: ZeroDivisionError: division by zero; run with"),
        (InternalError("a slot is lost"), 1, "a slot is lost"),
        (MemoryError(), 4, "the system refused memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 4, "the system refused memory"),
    ],
)
def test_defects_and_exhaustion_are_one_line_and_a_traceback_only_when_asked(error, code, said, speaking, monkeypatch):
    def fail(*_args, **_keywords):
        raise error

    monkeypatch.setattr(run_module.Engine, "from_pretrained", fail)
    done = dmoe_run("--model", speaking, "-p", "a")
    assert complaint(done).startswith(said)
    assert done.exit_code == code
    debugged = dmoe_run("--debug", "--model", speaking, "-p", "a")
    assert "Traceback (most recent call last)" in debugged.stderr
    assert debugged.exit_code == code


def test_ctrl_c_while_loading(speaking, monkeypatch):
    def interrupt(*_args, **_keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module.Engine, "from_pretrained", interrupt)
    done = dmoe_run("--model", speaking, "-p", "a")
    assert done.exit_code == 130
    assert done.stderr.split() == ["interrupted"]


def test_the_group_reports_as_its_commands_do(tmp_path):
    for arguments in ([], ["bogus"], ["run", "--bogus"], ["plan", "surplus"]):
        done = dmoe_command(*arguments)
        assert done.exit_code == 2
        assert "--help'" in complaint(done)
    model = write_speaking_checkpoint(tmp_path / "model")
    assert dmoe_command("run", "--model", model, *SHORT, "-p", "a").stdout.strip()
    assert "Traceback" in dmoe_command("run", "--debug", "--model", tmp_path, "-p", "a").stderr
