from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from offload_engine.config import EngineConfig
from offload_engine.core import SamplingParams
from offload_engine.engine.assembly import BUILT_IN
from offload_engine.engine.engine import Engine
from offload_engine.errors import ModelError, OffloadError, PromptError, UsageError
from tools.arithmetic_problems import main as arithmetic_problems
from tools.distillation.job import make_dataset
from tools.distillation.progress import Tally, Watch
from tools.distillation.prompts import Prompt, read_prompts, refuse_unusable
from tools.distillation.shards import DROPPED_PREFIX, WORK, Receipt, Record, Shard, cut, generate_shard, line_of
from tools.distillation.teacher import make_teacher
from tools.self_distil import main as self_distil

SETTINGS = {"sampling": {"threshold": 0.95}, "prompts": {"files": [{"name": "a.jsonl", "sha256": "f00"}]}}


def prompts(count: int) -> list[Prompt]:
    return [Prompt(i, f"p.jsonl:{i + 1}", f"question {i}") for i in range(count)]


def reply(prompt: Prompt) -> Record:
    """A stand-in for the engine: every third answer doesn't end."""
    if prompt.id % 3 == 1:
        return {"dropped": "length", "id": prompt.id}
    return {"id": prompt.id, "prompt": prompt.text, "answer": f"answer {prompt.id} – \u2028 ünïcode\n"}


def answer_in(directory: Path, answer: Callable[[Prompt], Record] = reply) -> Callable[[Sequence[Shard]], Any]:
    return lambda todo: (generate_shard(directory, shard, answer) for shard in todo)


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(self_distil, [str(one) for one in arguments])


def problems(path: Path, count: int) -> Path:
    result = CliRunner().invoke(arithmetic_problems, ["--n", str(count), "--seed", "7"])
    path.write_text(result.output)
    return path


class TestPrompts:
    def test_json_lines_of_several_files_with_either_field(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"question": "one", "prompt": "no"}\n\n{"prompt": "two"}\r\n')
        (tmp_path / "b.jsonl").write_text('{"question": "three"}')
        found = read_prompts([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
        assert [(one.id, one.text) for one in found.prompts] == [(0, "one"), (1, "two"), (2, "three")]
        assert found.prompts[1].source.endswith("a.jsonl:3")
        assert [(file.name, file.prompts) for file in found.files] == [("a.jsonl", 2), ("b.jsonl", 1)]
        assert found.files[0].sha256 != found.files[1].sha256

    def test_a_named_field(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"question": "one", "text": "two"}\n')
        assert read_prompts([tmp_path / "a.jsonl"], name="text").prompts[0].text == "two"

    def test_plain_text_is_taken_as_it_is(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text('\ufeff{"not": "JSON"\n  two  \n\n')
        assert [one.text for one in read_prompts([tmp_path / "a.txt"]).prompts] == ['{"not": "JSON"', "  two  "]

    def test_a_limit_counts_over_files(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("one\ntwo\n")
        (tmp_path / "b.txt").write_text("three\nfour\n")
        found = read_prompts([tmp_path / "a.txt", tmp_path / "b.txt"], limit=3)
        assert [file.prompts for file in found.files] == [2, 1]

    @pytest.mark.parametrize(
        ("line", "complaint"),
        [
            (b'{"question": "torn', "not JSON"),
            (b'["a list"]', "wanted a JSON object"),
            (b'{"answer": "two"}', "no field 'question' or 'prompt' among 'answer'; name it with --field"),
            (b'{"question": 5}', "field 'question' is 5, wanted text"),
            (b'{"question": " "}', "field 'question' is ' ', wanted text"),
            (b'{"question": "\\ud800"}', "not UTF-8 text"),
            (b'{"question": "\xff"}', "not UTF-8 text"),
        ],
    )
    def test_a_bad_line_is_refused_by_file_and_line(self, tmp_path: Path, line: bytes, complaint: str) -> None:
        (tmp_path / "a.jsonl").write_bytes(b'{"question": "fine"}\n' + line + b"\n")
        found = read_prompts([tmp_path / "a.jsonl"])
        with pytest.raises(PromptError) as caught:
            refuse_unusable(found.prompts)
        assert str(caught.value).startswith(f"{tmp_path / 'a.jsonl'}:2: ")
        assert complaint in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_files_without_prompts_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("\n \n")
        for path, complaint in [("a.txt", "no prompt in it"), ("b.txt", "no such file"), (".", "is a directory")]:
            with pytest.raises(PromptError, match=complaint):
                read_prompts([tmp_path / path])


class TestShards:
    @given(st.data())
    def test_an_attempt_goes_on_from_whatever_a_kill_left(
        self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        [shard] = cut(prompts(9), 9)
        whole = b"".join(line_of(reply(one)) for one in shard.prompts)
        whole_run = tmp_path_factory.mktemp("whole")
        expected = generate_shard(whole_run, shard, reply)
        directory = tmp_path_factory.mktemp("torn")
        (directory / WORK).mkdir()
        torn = [whole[: data.draw(st.integers(0, len(whole)))] for _ in range(2)]
        for number, left in enumerate(torn):
            (directory / WORK / f"shard-00000.{number}.part").write_bytes(left)
        asked: list[int] = []

        def answer(prompt: Prompt) -> Record:
            asked.append(prompt.id)
            return reply(prompt)

        assert generate_shard(directory, shard, answer) == expected
        assert asked == list(range(max(left.count(b"\n") for left in torn), 9))
        assert (directory / expected.file).read_bytes() == (whole_run / expected.file).read_bytes()
        assert [path.name for path in (directory / WORK).iterdir()] == ["shard-00000.json"]

    def test_a_journal_line_that_a_power_cut_spoilt_is_answered_again(self, tmp_path: Path) -> None:
        [shard] = cut(prompts(3), 3)
        (tmp_path / WORK).mkdir()
        spoilt = line_of(reply(shard.prompts[0])) + b"\0\0\0\n" + line_of(reply(shard.prompts[2]))
        (tmp_path / WORK / "shard-00000.x.part").write_bytes(spoilt)
        asked: list[int] = []
        generate_shard(tmp_path, shard, lambda one: asked.append(one.id) or reply(one))  # type: ignore[func-returns-value]
        assert asked == [1, 2]

    def test_two_attempts_at_once_put_the_same_shard_in_place(self, tmp_path: Path) -> None:
        [shard] = cut(prompts(6), 6)
        inner: list[Receipt] = []

        def answer(prompt: Prompt) -> Record:
            if prompt.id == 3 and not inner:
                inner.append(generate_shard(tmp_path, shard, reply))
            return reply(prompt)

        assert generate_shard(tmp_path, shard, answer) == inner[0]
        assert inner[0].kept == 4
        assert inner[0].dropped == {"length": 2}
        kept = [json.loads(line) for line in (tmp_path / inner[0].file).read_bytes().splitlines()]
        assert [record["id"] for record in kept] == [0, 2, 3, 5]


class TestJob:
    def test_counts_and_manifest(self, tmp_path: Path) -> None:
        counts = make_dataset(tmp_path, SETTINGS, cut(prompts(7), 3), answer_in(tmp_path))
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        assert counts == manifest["counts"] == {"prompts": 7, "kept": 5, "dropped": {"length": 2}}
        assert manifest["complete"] is True
        assert manifest["sampling"] == {"threshold": 0.95}
        assert [(shard["file"], shard["prompts"], shard["kept"]) for shard in manifest["shards"]] == [
            ("shard-00000.jsonl", 3, 2),
            ("shard-00001.jsonl", 3, 2),
            ("shard-00002.jsonl", 1, 1),
        ]
        assert sorted(files_of(tmp_path)) == ["manifest.json", *(shard["file"] for shard in manifest["shards"])]

    def test_a_run_that_fails_is_gone_on_with(self, tmp_path: Path) -> None:
        whole, broken = tmp_path / "whole", tmp_path / "broken"
        make_dataset(whole, SETTINGS, cut(prompts(9), 2), answer_in(whole))

        def full_disk(prompt: Prompt) -> Record:
            if prompt.id == 5:
                raise OSError(28, "No space left on device")
            return reply(prompt)

        with pytest.raises(OffloadError, match=r"can't be written \(No space left on device\); run again to go on"):
            make_dataset(broken, SETTINGS, cut(prompts(9), 2), answer_in(broken, full_disk))
        assert json.loads((broken / "manifest.json").read_text())["complete"] is False
        asked: list[int] = []
        answer = answer_in(broken, lambda one: asked.append(one.id) or reply(one))  # type: ignore[func-returns-value]
        make_dataset(broken, SETTINGS, cut(prompts(9), 2), answer)
        assert asked == [5, 6, 7, 8]
        assert files_of(broken) == files_of(whole)

    def test_a_complete_dataset_is_left_alone_but_a_damaged_shard_is_made_again(self, tmp_path: Path) -> None:
        shards = cut(prompts(6), 2)
        make_dataset(tmp_path, SETTINGS, shards, answer_in(tmp_path))
        before = files_of(tmp_path)

        def nobody(_todo: Sequence[Shard]) -> Iterator[Receipt]:
            raise AssertionError

        assert make_dataset(tmp_path, SETTINGS, shards, nobody)["prompts"] == 6
        (tmp_path / "shard-00001.jsonl").write_bytes(before["shard-00001.jsonl"][:-5])
        asked: list[int] = []
        answer = answer_in(tmp_path, lambda one: asked.append(one.id) or reply(one))  # type: ignore[func-returns-value]
        make_dataset(tmp_path, SETTINGS, shards, answer)
        assert asked == [2, 3]
        assert files_of(tmp_path) == before

    def test_other_settings_are_refused_by_name(self, tmp_path: Path) -> None:
        make_dataset(tmp_path, SETTINGS, cut(prompts(2), 2), answer_in(tmp_path))
        other = {**SETTINGS, "sampling": {"threshold": 0.9}}
        with pytest.raises(UsageError) as caught:
            make_dataset(tmp_path, other, cut(prompts(2), 2), answer_in(tmp_path))
        assert str(caught.value) == (
            f"{tmp_path}: begun with sampling.threshold = 0.95, but now it is 0.9; "
            "give --threshold as before, or another --out for a new dataset"
        )
        other = {**SETTINGS, "prompts": {"files": [{"name": "a.jsonl", "sha256": "ba5"}]}}
        with pytest.raises(UsageError, match=r"prompts\.files\.0\.sha256 = 'f00', but now it is 'ba5'; give --prompts"):
            make_dataset(tmp_path, other, cut(prompts(2), 2), answer_in(tmp_path))

    def test_a_prompt_file_may_be_renamed(self, tmp_path: Path) -> None:
        make_dataset(tmp_path, SETTINGS, cut(prompts(2), 2), answer_in(tmp_path))
        moved = {**SETTINGS, "prompts": {"files": [{"name": "b.jsonl", "sha256": "f00"}]}}
        assert make_dataset(tmp_path, moved, cut(prompts(2), 2), answer_in(tmp_path))["prompts"] == 2

    def test_a_directory_of_other_things_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").touch()
        with pytest.raises(UsageError, match=r"holds 'thesis.tex' but no manifest.json; choose an empty --out"):
            make_dataset(tmp_path, SETTINGS, cut(prompts(2), 2), answer_in(tmp_path))

    def test_a_second_run_in_the_same_directory_is_refused(self, tmp_path: Path) -> None:
        handle = os.open(tmp_path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            with pytest.raises(UsageError, match="another run is at work in it"):
                make_dataset(tmp_path, SETTINGS, cut(prompts(2), 2), answer_in(tmp_path))
        finally:
            os.close(handle)

    def test_progress_counts_receipts_and_journals(self, tmp_path: Path) -> None:
        first, second = cut(prompts(12), 6)
        generate_shard(tmp_path, first, reply)
        lines = [line_of(reply(one)) for one in second.prompts]
        (tmp_path / WORK / "shard-00001.a.part").write_bytes(b"".join(lines[:3]))
        (tmp_path / WORK / "shard-00001.b.part").write_bytes(lines[3] + lines[4][:5])
        assert Watch(tmp_path, Tally(10, 1)).tally() == Tally(10 + 4 + 3, 1 + 2 + 1)
        assert line_of(reply(prompts(2)[1])).startswith(DROPPED_PREFIX)


class TestTeacher:
    def test_a_prompt_too_long_for_the_context_is_a_problem_of_its_line(self) -> None:
        given = [Prompt(0, "p:1", "one " * 60), Prompt(1, "p:2", "one")]
        _, fitted = make_teacher(EngineConfig(max_context=64), SamplingParams(), given)
        assert fitted[0].problem is not None
        assert "tokens, but the context holds 64 with its answer" in fitted[0].problem
        assert fitted[1] == given[1]

    def test_the_context_holds_the_longest_prompt_and_answer(self) -> None:
        teacher, _ = make_teacher(EngineConfig(), SamplingParams(max_new_tokens=40), prompts(3))
        assert teacher.config.max_context is not None
        assert 40 < teacher.config.max_context <= 96
        assert teacher.config.max_context % 32 == 0

    def test_what_cannot_change_an_answer_is_no_setting(self) -> None:
        fast, slow = (
            make_teacher(EngineConfig(gpu_mem=size, threads=n, eviction=rule), SamplingParams(), prompts(1))[0]
            for size, n, rule in [("1GB", 1, "lru"), ("2GB", 2, "lfu")]
        )
        assert fast.settings() == slow.settings()
        routed, _ = make_teacher(EngineConfig(routing="dmoe", top_p=0.5), SamplingParams(), prompts(1))
        assert routed.settings()["routing"] == {"name": "dmoe", "top_p": 0.5, "min_experts": 23}

    def test_two_trainings_of_one_model_are_told_apart(self, tmp_path: Path) -> None:
        for path in BUILT_IN.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        of = lambda: make_teacher(EngineConfig(model=str(tmp_path)), SamplingParams(), prompts(1))[0]  # noqa: E731
        before = of()
        assert before.fingerprint == make_teacher(EngineConfig(), SamplingParams(), prompts(1))[0].fingerprint
        weights = bytearray((tmp_path / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (tmp_path / "model.safetensors").write_bytes(weights)
        assert of().fingerprint != before.fingerprint
        with pytest.raises(ModelError, match="give every worker the same checkpoint"):
            before.open()

    def test_stop_strings_are_refused(self) -> None:
        with pytest.raises(UsageError, match="leave --stop out"):
            make_teacher(EngineConfig(), SamplingParams(stop=("x",)), prompts(1))

    def test_routing_that_looks_at_the_cache_is_refused(self) -> None:
        with pytest.raises(UsageError, match=r"residency_bonus is 0.5, by which .*; leave --residency-bonus out"):
            make_teacher(EngineConfig(routing="dmoe", residency_bonus=0.5), SamplingParams(), prompts(1))

    def test_a_sampled_answer_depends_on_its_own_prompt_alone(self) -> None:
        params = SamplingParams(temperature=4, seed=3, max_new_tokens=64)
        given = [Prompt(place, "", "What is 1 + 2?") for place in range(4)]
        teacher, _ = make_teacher(EngineConfig(), params, given)
        with teacher.open() as answering:
            forth = [answering(prompt) for prompt in given]
            back = [answering(prompt) for prompt in reversed(given)]
        assert forth == back[::-1]
        assert len({record["answer"] for record in forth if "answer" in record}) > 1


class TestCommand:
    def test_answers_are_the_engines_own(self, tmp_path: Path) -> None:
        given = problems(tmp_path / "p.jsonl", 5)
        result = run("--prompts", given, "--out", tmp_path / "out", "--routing", "original", "--shard-size", 2)
        assert result.exit_code == 0, result.output
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        assert manifest["complete"] is True
        assert manifest["routing"]["name"] == "original"
        assert manifest["sampling"]["max_new_tokens"] == 2048
        assert len(manifest["shards"]) == 3
        lines = [line for n in range(3) for line in (tmp_path / "out" / f"shard-0000{n}.jsonl").open()]
        records = {record["id"]: record for record in map(json.loads, lines)}
        assert len(records) == manifest["counts"]["kept"] > 0
        with Engine.from_pretrained(routing="original") as engine:
            for place, line in enumerate(given.read_text().splitlines()):
                done = engine.generate(json.loads(line)["question"])
                if done.finish_reason != "eos":
                    assert place not in records
                    continue
                assert records[place]["prompt"] == json.loads(line)["question"]
                assert records[place]["answer"] == done.text
                assert records[place]["answer_ids"] == done.token_ids
                assert records[place]["answer_ids"][-1] == engine.eos_token_id
                assert records[place]["steps"] == done.stats.denoise_steps
                again = engine.generate(records[place]["prompt_ids"])
                assert again.token_ids == done.token_ids

    def test_answers_that_do_not_end_are_dropped_and_counted(self, tmp_path: Path) -> None:
        given = problems(tmp_path / "p.jsonl", 3)
        result = run("--prompts", given, "--out", tmp_path / "out", "--max-new-tokens", 2)
        assert result.exit_code == 0, result.output
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        assert manifest["counts"] == {"prompts": 3, "kept": 0, "dropped": {"length": 3}}
        assert (tmp_path / "out" / "shard-00000.jsonl").read_bytes() == b""
        assert "3 dropped: length" in result.output

    def test_bad_prompts_are_refused_or_counted(self, tmp_path: Path) -> None:
        path = tmp_path / "p.jsonl"
        path.write_text('{"question": "What is 1 + 2?"}\nnonsense\n{"question": "' + "one " * 3000 + '"}\n')
        out = tmp_path / "out"
        result = run("--prompts", path, "--out", out)
        assert result.exit_code == 2
        assert f"{path}:2: not JSON" in result.output
        assert not out.exists()
        result = run("--prompts", path, "--out", out, "--skip-bad")
        assert result.exit_code == 0, result.output
        assert json.loads((out / "manifest.json").read_text())["counts"]["dropped"]["bad prompt"] == 2

    def test_a_run_that_never_answered_binds_nobody(self, tmp_path: Path) -> None:
        given = problems(tmp_path / "p.jsonl", 2)
        result = run("--prompts", given, "--out", tmp_path / "out", "--gpu-mem", "1MB")
        assert result.exit_code == 4
        result = run("--prompts", given, "--out", tmp_path / "out", "--threshold", 0.5)
        assert result.exit_code == 0, result.output
        result = run("--prompts", given, "--out", tmp_path / "out")
        assert result.exit_code == 2
        assert "begun with sampling.threshold = 0.5, but now it is 0.95" in result.output

    def test_workers_of_a_cluster_do_not_each_take_a_machines_memory(self, tmp_path: Path) -> None:
        given = problems(tmp_path / "p.jsonl", 2)
        result = run("--prompts", given, "--out", tmp_path / "out", "--ray", "127.0.0.1:9", "--workers", 2)
        assert result.exit_code == 2
        assert "--gpu-mem is auto, but a cluster may put several workers on one machine" in result.output
        assert not (tmp_path / "out").exists()
