from __future__ import annotations

import json

import pytest

from offload_engine import Engine, SamplingParams, TransferError
from offload_engine.experts.storage.store import SafetensorsStore
from offload_engine.trace import read_trace
from tests.checkpoints import GOLDEN, needs_golden
from tests.cli.command_line import FAST, SHORT, complaint, dmoe_run
from tests.golden_cases import tensors

PARAMS = SamplingParams(max_new_tokens=48, block_length=16, steps=4)
SUMMARY = "tokens/s, "


@pytest.fixture(scope="module")
def answer(speaking):
    """What the engine itself answers."""
    with Engine.from_pretrained(speaking, gpu_mem="4GB", max_context=512) as engine:
        return engine.generate("How many?", PARAMS)


def test_stdout_has_the_answer_alone_and_stderr_the_rest(speaking, answer):
    done = dmoe_run("--model", speaking, *SHORT, "-p", "How many?")
    assert done.exit_code == 0
    assert done.stdout_bytes.decode() == answer.text.rstrip("\n") + "\n"
    lines = done.stderr.splitlines()
    assert lines[0].startswith("loaded ")
    assert lines[1].startswith("plan: ")
    assert SUMMARY in lines[-1]
    assert "hit rate" in lines[-1]
    assert len(lines) == 3


def test_a_file_less_its_last_newline_is_the_same_prompt(speaking, answer, tmp_path):
    file = tmp_path / "prompt.txt"
    for content in (b"How many?\n", b"How many?\r\n", b"\xef\xbb\xbfHow many?"):
        file.write_bytes(content)
        assert dmoe_run("--model", speaking, *SHORT, file).stdout_bytes.decode() == answer.text.rstrip("\n") + "\n"
    file.write_bytes(b"How many?\n\n")
    assert dmoe_run("--model", speaking, *SHORT, file).stdout_bytes.decode() != answer.text.rstrip("\n") + "\n"


def test_standard_input_is_a_prompt(speaking, answer):
    done = dmoe_run("--model", speaking, *SHORT, "-", stdin="How many?\n")
    assert done.stdout_bytes.decode() == answer.text.rstrip("\n") + "\n"


def test_json_is_one_object_with_the_answer_and_what_it_took(speaking, answer):
    done = dmoe_run("--model", speaking, *SHORT, "--json", "-p", "How many?", "--routing", "dmoe", "--top-p", "1")
    found = json.loads(done.stdout)
    assert found["routing"] == "dmoe"
    assert found["model"] == str(speaking)
    assert found["source"] == "-p"
    assert found["finish_reason"] == "length"
    assert len(found["token_ids"]) == 48 == found["stats"]["new_tokens"]
    assert found["plan"]["total"] <= found["plan"]["budget"] == 4_000_000_000
    plain = json.loads(dmoe_run("--model", speaking, *SHORT, "--json", "-p", "How many?").stdout)
    assert (plain["text"], plain["token_ids"]) == (answer.text, answer.token_ids)
    assert plain["routing"] == "original"


def test_several_prompts_are_answered_in_order(speaking, tmp_path):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("How many?")
    second.write_text("And now?")
    done = dmoe_run("--model", speaking, *SHORT, "--json", first, second)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["source"] for one in found] == [str(first), str(second)]
    assert found[0]["token_ids"] != found[1]["token_ids"]
    assert f"[2/2] {second}" in done.stderr
    assert found[0]["stats"]["prompts"] == found[1]["stats"]["prompts"] == 1


def test_token_ids_in_any_spelling_are_answered_in_token_ids(mute, tmp_path):
    file = tmp_path / "ids.json"
    file.write_text("[1, 2, 3]")
    with Engine.from_pretrained(mute, gpu_mem="4GB", max_context=512) as engine:
        expected = engine.generate([1, 2, 3], PARAMS).token_ids
    for prompt in (["-p", "1,2, 3"], ["-p", "1 2\n3"], [file]):
        done = dmoe_run("--model", mute, *SHORT, "--token-ids", *prompt)
        assert done.stdout == " ".join(map(str, expected)) + "\n"


def test_options_of_sampling_and_of_the_engine_reach_it(speaking):
    def tokens(*options):
        return json.loads(dmoe_run("--model", speaking, *SHORT, "--json", "-p", "a", *options).stdout)["token_ids"]

    sampled = [tokens("--temperature", 1, "--seed", seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    greedy = tokens()
    assert tokens("--temperature", 1, "--seed", 1, "--top-k", 1) == greedy != sampled[0]
    assert tokens("--raw") != greedy
    assert tokens("--expert-mem", "100KB", "--eviction", "lru", "--predictor", "none") == greedy
    assert tokens("--eos-token-id", greedy[5])[-1] == greedy[5]


def test_a_preset_is_read_and_options_win_over_it(speaking, tmp_path):
    preset = tmp_path / "preset.toml"
    preset.write_text(f"model = {str(speaking)!r}\ngpu_mem = '5GB'\nmax_context = 256\n")
    options = ["--config", preset, "--max-context", 512, "--max-new-tokens", 8, "--json", "-p", "a"]
    plan = json.loads(dmoe_run(*options).stdout)["plan"]
    assert (plan["budget"], plan["context"]) == (5_000_000_000, 512)


def test_the_answer_ends_before_a_stop_string(speaking, answer):
    stop = next(letter for letter in answer.text[3:] if letter.isprintable() and letter != "\ufffd")
    done = dmoe_run("--model", speaking, *SHORT, "--stop", stop, "-p", "How many?", "--json")
    found = json.loads(done.stdout)
    assert found["finish_reason"] == "stop"
    assert found["text"] == answer.text[: answer.text.index(stop)]


def test_stats_show_the_whole_plan_and_every_counter(speaking):
    done = dmoe_run("--model", speaking, *SHORT, "--expert-mem", "100KB", "--stats", "-p", "a")
    assert "expert slots" in done.stderr
    assert "planned peak" in done.stderr
    for name in ("forwards", "expert requests", "prefetches", "read from disk", "unique experts"):
        assert f"\n{name} " in done.stderr
    assert "per layer, 1: " in done.stderr


def test_a_trace_holds_what_was_routed(speaking, tmp_path):
    path = tmp_path / "run.jsonl"
    done = dmoe_run("--model", speaking, *SHORT, "--trace", path, "-p", "a", "-p", "b")
    assert done.exit_code == 0
    header, records = read_trace(path)
    found = list(records)
    assert header.block_length == 16
    assert {record.sequence for record in found} == {0, 1}
    assert {record.layer for record in found} == {1, 2}


def test_a_full_disk_costs_the_trace_but_not_the_answer(speaking, answer):
    done = dmoe_run("--model", speaking, *SHORT, "--trace", "/dev/full", "-p", "How many?")
    assert done.exit_code == 1
    assert done.stdout_bytes.decode() == answer.text.rstrip("\n") + "\n"
    *_, summary, error = done.stderr.splitlines()
    assert SUMMARY in summary
    assert error.startswith("error: /dev/full: the trace can't be written (No space left on device)")


def test_a_trace_that_cannot_be_begun_is_refused_before_the_answer(speaking, tmp_path):
    done = dmoe_run("--model", speaking, *SHORT, "--trace", tmp_path / "no" / "trace", "-p", "a")
    assert "can't be opened for a trace" in complaint(done)
    assert done.exit_code == 1


def test_a_reader_that_fails_mid_run_is_one_line_after_the_text_so_far(speaking, monkeypatch):
    reads = iter(range(10**9))
    read = SafetensorsStore.read

    def failing(self, key, slab):
        if next(reads) > 40:
            raise TransferError(f"expert {key.expert} of layer {key.layer}: the disk is gone")
        return read(self, key, slab)

    monkeypatch.setattr(SafetensorsStore, "read", failing)
    done = dmoe_run("--model", speaking, *SHORT, "--expert-mem", "30KB", "-p", "a")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].endswith("the disk is gone")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("escape", [b"\x1b[31m", b"\x9b2J", b"\x07", "\u202e".encode()])
def test_a_name_cannot_steer_the_terminal(escape, tmp_path):
    done = dmoe_run(tmp_path / escape.decode("utf-8", "replace").replace("\ufffd", "\x9b"))
    assert done.exit_code == 2
    assert not set(complaint(done)) & set("\x1b\x9b\x07\u202e")


@needs_golden
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gen_45_0.3_original", ["--routing", "original"]),
        ("gen_45_0.3_dmoe_0.6", ["--routing", "dmoe", "--top-p", "0.6"]),
        ("gen_7_0.3_original_eos282", ["--routing", "original", "--eos-token-id", "282"]),
    ],
)
def test_the_golden_checkpoint_gives_the_reference_answer(name, options):
    prompt = tensors()[f"prompt_{name.split('_')[1]}"].tolist()
    done = dmoe_run(
        *("--model", GOLDEN, *FAST, "--max-new-tokens", 64, "--threshold", 0.3, "--eos-token-id", 508),
        *("--mask-token-id", 511, *options, "--token-ids", "-p", prompt),
    )
    assert [int(word) for word in done.stdout.split()] == tensors()[name].tolist()


def test_the_built_in_model_needs_no_option():
    done = dmoe_run("--gpu-mem", "8GB", "-p", "A box holds 12 pencils. How many pencils are in 7 boxes?")
    assert done.exit_code == 0
    assert "\\boxed{" in done.stdout


def test_prompts_answered_together_come_in_their_order_and_read_the_same(speaking):
    words = [word for text in ("How many?", "A", "", "Maria has 14 apples.") for word in ("-p", text) if text]
    alone = dmoe_run("--model", speaking, *SHORT, *words)
    together = dmoe_run("--model", speaking, *SHORT, *words, "--batch-size", "2")
    assert together.exit_code == 0
    assert together.stdout == alone.stdout
    assert [line for line in together.stderr.splitlines() if line.startswith("[")][-1].startswith("[3/3] ")
    assert "2 sequences" in dmoe_run("--model", speaking, *SHORT, *words, "--batch-size", "2", "--stats").stderr
    found = dmoe_run("--model", speaking, *SHORT, *words, "--batch-size", "2", "--json").stdout.splitlines()
    assert [json.loads(line)["text"] for line in found] == [
        json.loads(line)["text"] for line in dmoe_run("--model", speaking, *SHORT, *words, "--json").stdout.splitlines()
    ]


def test_watching_takes_one_prompt_at_a_time(speaking):
    refused = dmoe_run("--model", speaking, *SHORT, "-p", "a", "-p", "b", "--batch-size", "2", "--watch")
    assert refused.exit_code == 2
    assert complaint(refused) == "--watch shows one answer at a time, but --batch-size is 2; leave one of them out"
