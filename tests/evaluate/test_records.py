"""A run's folder: nothing that was written is lost, and nothing is added that doesn't belong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_engine.errors import OffloadError, UsageError
from offload_engine.evaluate.records import RunFolder, read_run, write_json

SETTINGS = {"task": "sums", "n": 3, "sampling": {"steps": 32, "stop": ("a",)}, "engine": {"gpu_mem": "auto"}}


def record(name: Any, **fields: Any) -> dict[str, Any]:
    return {"id": name, "gold": "1", "generation": "", "strict": False, "soft": True} | fields


def test_a_run_is_taken_up_where_it_stopped(tmp_path: Path):
    with RunFolder(tmp_path / "deep" / "run", SETTINGS, {"plan": 1}) as folder:
        folder.append(record("a", strict=True))
        folder.append(record("b"))
    with RunFolder(tmp_path / "deep" / "run", SETTINGS, {"plan": 2}) as folder:
        assert folder.done == {"a": True, "b": False}
        folder.append(record("c"))
        folder.summarise({"n": 3})
    run = read_run(tmp_path / "deep" / "run")
    assert [one["id"] for one in run.records] == ["a", "b", "c"]
    assert run.settings == json.loads(json.dumps(SETTINGS))
    assert run.about == {"plan": 1}
    assert json.loads((run.directory / "summary.json").read_text()) == {"n": 3}
    assert sorted(path.name for path in run.directory.iterdir()) == ["records.jsonl", "run.json", "summary.json"]


@given(cut=st.integers(0, 400))
def test_a_run_killed_at_any_byte_keeps_its_whole_records(tmp_path_factory: pytest.TempPathFactory, cut: int):
    path = tmp_path_factory.mktemp("run")
    with RunFolder(path, SETTINGS) as folder:
        for name in "abc":
            folder.append(record(name, generation="é\n" * 9))
    written = (path / "records.jsonl").read_bytes()
    (path / "records.jsonl").write_bytes(written[:cut])
    whole = written[:cut].count(b"\n")
    assert [one["id"] for one in read_run(path).records] == list("abc")[:whole], "reading changes nothing"
    assert (path / "records.jsonl").read_bytes() == written[:cut]
    with RunFolder(path, SETTINGS) as folder:
        assert list(folder.done) == list("abc")[:whole]
        folder.append(record("z"))
    assert [one["id"] for one in read_run(path).records] == [*"abc"[:whole], "z"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"n": 4}, "holds a run with n 3, but now n is 4"),
        (
            {"sampling": {"steps": 16, "stop": ["a"]}},
            "holds a run with sampling.steps 32, but now sampling.steps is 16",
        ),
        ({"engine": {}}, "holds a run with engine None, but now engine is {}"),
        ({"seed": 1}, "holds a run with seed None, but now seed is 1"),
    ],
)
def test_a_run_with_other_settings_is_refused_by_name(tmp_path: Path, change: dict[str, Any], complaint: str):
    RunFolder(tmp_path, SETTINGS).close()
    with pytest.raises(UsageError, match=complaint):
        RunFolder(tmp_path, SETTINGS | change)


def test_damaged_folders(tmp_path: Path):
    with pytest.raises(UsageError, match=r"holds no run.json"):
        read_run(tmp_path)
    (tmp_path / "records.jsonl").touch()
    with pytest.raises(UsageError, match=r"holds records.jsonl but no run.json"):
        RunFolder(tmp_path, SETTINGS)
    for content, complaint in (
        ("{", r"run.json: can't be read"),
        ("{}", r"run.json: holds no settings of a run"),
        ('{"format": 9, "settings": {}}', r"run.json: a run of format 9, but this version reads 1"),
    ):
        (tmp_path / "run.json").write_text(content)
        for attempt in (lambda: RunFolder(tmp_path, SETTINGS), lambda: read_run(tmp_path)):
            with pytest.raises(UsageError, match=complaint):
                attempt()
    write_json(tmp_path / "run.json", {"format": 1, "settings": SETTINGS})
    lines = [json.dumps(record("a")), json.dumps(record("b"))]
    for line, complaint in (
        ("nonsense", r"records.jsonl:2: not JSON"),
        ('{"id": "x"}', r"records.jsonl:2: no field 'gold'"),
        (lines[0], r"records.jsonl:2: sample 'a' was answered before; the file is damaged: remove that line"),
        (
            json.dumps(record("c", strict="yes")),
            r"records.jsonl:2: field 'strict' is 'yes'; wanted true or false; the file",
        ),
        (json.dumps(record(7)), r"records.jsonl:2: field 'id' is 7; wanted a text"),
        (json.dumps(record("c", unique_experts="9")), r"field 'unique_experts' is '9'; wanted a number or null"),
        (json.dumps(record("c", tokens=True)), r"field 'tokens' is True; wanted a number"),
        (json.dumps(record("c", unique_by_forward=[1, None])), r"is \[1, None\]; wanted a list of numbers"),
        (json.dumps(record("c", forwards=[])), r"field 'forwards' is \[\]; wanted an object of numbers"),
    ):
        (tmp_path / "records.jsonl").write_text("\n".join([lines[0], line, lines[1], ""]))
        with pytest.raises(UsageError, match=complaint):
            RunFolder(tmp_path, SETTINGS)


def test_a_record_that_cannot_be_summed_up_is_named(tmp_path: Path):
    with RunFolder(tmp_path, SETTINGS) as folder:
        folder.append(record("a"))
        with pytest.raises(
            UsageError, match=r"records.jsonl:1: no field 'prompt'.*: remove that line, and the same run"
        ):
            folder.records()
    assert len(read_run(tmp_path).records) == 1, "what others wrote may lack what is only summed up"


def test_two_processes_cannot_write_the_same_run(tmp_path: Path):
    pytest.importorskip("fcntl")
    with (
        RunFolder(tmp_path, SETTINGS),
        pytest.raises(UsageError, match="another process is at work on this run"),
    ):
        RunFolder(tmp_path, SETTINGS)
    RunFolder(tmp_path, SETTINGS).close()


def test_a_place_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(OffloadError, match=r"file: can't be used as a run's folder \(File exists\)"):
        RunFolder(tmp_path / "file", SETTINGS)


def test_a_full_disk_keeps_what_was_there(tmp_path: Path):
    if not Path("/dev/full").exists():
        pytest.skip("the system has no /dev/full")
    with RunFolder(tmp_path, SETTINGS) as folder:
        folder.append(record("a"))
        records = folder._file
        with Path("/dev/full").open("ab", buffering=0) as full:
            folder._file = full
            with pytest.raises(OffloadError, match=r"No space left on device.*1 answers are in it"):
                folder.append(record("b"))
        folder._file = records
    assert [one["id"] for one in read_run(tmp_path).records] == ["a"]


class _Brim:
    """A disk that fills up in the middle of a line."""

    def __init__(self, file: Any) -> None:
        self.file, self.room = file, 10

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        done = self.file.write(data[: self.room])
        self.room -= done
        return int(done)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_a_line_that_did_not_fit_is_taken_back(tmp_path: Path):
    with RunFolder(tmp_path, SETTINGS) as folder:
        folder.append(record("a"))
        before = (tmp_path / "records.jsonl").read_bytes()
        folder._file = _Brim(folder._file)  # type: ignore[assignment]
        with pytest.raises(OffloadError, match="No space left on device"):
            folder.append(record("b"))
        assert folder.done == {"a": False}
    assert (tmp_path / "records.jsonl").read_bytes() == before


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path):
    path = tmp_path / "value.json"
    write_json(path, {"n": 1})
    with pytest.raises(TypeError):
        write_json(path, {"n": {1}})
    assert json.loads(path.read_text()) == {"n": 1}
    assert list(tmp_path.iterdir()) == [path]
