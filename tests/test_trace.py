"""The routing trace: what goes in comes out, whatever happens to the file in between."""

import gzip
import json
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_engine.core import ForwardInfo, Phase
from offload_engine.errors import TraceError
from offload_engine.trace import TraceHeader, TraceRecord, TraceWriter, read_trace

HEADER = TraceHeader(
    layers=(1, 2, 3), num_experts=64, top_k=8, expert_bytes=12288, routing="dmoe p=0.6 g=16", block_length=32
)
DENOISE = ForwardInfo(Phase.DENOISE, block=2, step=5)


def write(path: Path, forwards: int, header: TraceHeader = HEADER) -> None:
    with TraceWriter(path, header) as writer:
        for step in range(forwards):
            for layer in header.layers:
                writer.record(ForwardInfo(Phase.DENOISE, 1, step), layer, [3, 1, 4 + step % 50], [0.5, 0.25, 0.125])


def read(path: Path) -> list[TraceRecord]:
    return list(read_trace(path)[1])


@contextmanager
def files_limited_to(size: int):
    """The system refuses writes beyond `size` bytes of a file, as a full disk does, after taking what fits."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


scores = st.floats(0, 1e6, allow_nan=False, width=32)
choices = st.dictionaries(st.integers(0, 63), scores, max_size=20)
infos = st.builds(ForwardInfo, st.sampled_from(Phase), st.integers(0, 99), st.integers(0, 31))
records = st.lists(st.tuples(infos, st.sampled_from(HEADER.layers), choices, st.integers(0, 3)), max_size=20)


@given(records)
def test_what_is_recorded_is_read_back(tmp_path_factory, recorded):
    path = tmp_path_factory.mktemp("trace") / "run.jsonl"
    with TraceWriter(path, HEADER) as writer:
        for info, layer, chosen, sequence in recorded:
            writer.sequence = sequence
            writer.record(info, layer, list(chosen), list(chosen.values()))
        assert writer.records_written <= len(recorded)
    header, found = read_trace(path)
    assert header == HEADER
    for (info, layer, chosen, sequence), record in zip(recorded, found, strict=True):
        assert (record.phase, record.block, record.step) == (info.phase, info.block, info.step)
        assert (record.layer, record.sequence) == (layer, sequence)
        assert record.experts == tuple(chosen)
        assert record.scores == pytest.approx(tuple(chosen.values()), rel=1e-5)


def test_the_file_is_json_lines_with_six_digit_scores(tmp_path):
    path = tmp_path / "run.jsonl"
    with TraceWriter(path, HEADER) as writer:
        writer.record(DENOISE, 1, [7, 3], [0.123456789, 1e-9], [2])
    first, second = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(first)["format"] == "offload_engine.routing_trace"
    assert json.loads(first)["version"] == 2
    assert json.loads(second) == {
        "phase": "denoise",
        "sequence": 0,
        "block": 2,
        "step": 5,
        "layer": 1,
        "experts": [7, 3],
        "scores": [0.123457, 1e-9],
        "runners_up": [2],
    }
    assert [record.runners_up for record in read(path)] == [(2,)]


def test_version_1_which_has_no_runners_up_is_read(tmp_path):
    path = tmp_path / "run.jsonl"
    record = '{"phase":"denoise","sequence":0,"block":2,"step":5,"layer":1,"experts":[7],"scores":[0.5]}'
    path.write_bytes(HEADER.line().replace(b'"version":2', b'"version":1') + record.encode() + b"\n")
    assert [(one.experts, one.runners_up) for one in read(path)] == [((7,), ())]
    with pytest.raises(TraceError, match="recorded with version 1, but this run has 2"):
        TraceWriter(path, HEADER)


def test_a_runner_up_was_not_chosen(tmp_path):
    path = tmp_path / "run.jsonl"
    with TraceWriter(path, HEADER) as writer:
        writer.record(DENOISE, 1, [7], [0.5], [3, 7])
    with pytest.raises(TraceError, match="an expert appears twice"):
        read(path)


def test_a_finished_forward_is_in_the_file_before_the_next_begins(tmp_path):
    path = tmp_path / "run.jsonl"
    writer = TraceWriter(path, HEADER)
    for layer in (1, 2):
        writer.record(DENOISE, layer, [1], [1.0])
    assert len(read(path)) == 0
    writer.record(DENOISE, 3, [1], [1.0])
    assert len(read(path)) == 3
    writer.record(DENOISE, 1, [1], [1.0])
    writer.record(DENOISE._replace(step=6), 1, [1], [1.0])  # the forward before stopped early
    assert len(read(path)) == 4
    writer.close()
    writer.close()
    assert len(read(path)) == 5


def test_a_trace_is_continued_with_the_next_sequence(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path, 2)
    with TraceWriter(path, HEADER) as writer:
        assert writer.sequence == 1
        writer.record(DENOISE, 1, [1], [1.0])
    assert [record.sequence for record in read(path)] == [0] * 6 + [1]


@given(cut=st.integers(1, 4000))
def test_a_trace_cut_anywhere_reads_and_continues_with_whole_lines(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("trace") / "run.jsonl"
    write(path, 10)
    whole = path.read_bytes()
    path.write_bytes(whole[: cut % len(whole)])
    kept = max(0, path.read_bytes().count(b"\n") - 1)
    if b"\n" in path.read_bytes():
        assert len(read(path)) == kept
    write(path, 1)
    assert len(read(path)) == kept + 3


def test_another_header_is_not_appended_to(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path, 1)
    before = path.read_bytes()
    with pytest.raises(TraceError, match=r"run\.jsonl: holds a trace recorded with routing 'dmoe.*this run has 'orig"):
        TraceWriter(path, HEADER.model_copy(update={"routing": "original"}))
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"dear diary", b"dear diary\n", b"{}\n[]\n", b"\n"])
def test_a_file_that_is_no_trace_is_left_alone(tmp_path, content):
    path = tmp_path / "diary.txt"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=r"diary\.txt: no routing trace"):
        TraceWriter(path, HEADER)
    with pytest.raises(TraceError, match=r"diary\.txt: no routing trace"):
        read_trace(path)
    assert path.read_bytes() == content


def test_a_newer_version_is_refused(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_bytes(HEADER.line().replace(b'"version":2', b'"version":3'))
    for attempt in (lambda: read_trace(path), lambda: TraceWriter(path, HEADER)):
        with pytest.raises(TraceError, match="version 3, but this engine reads versions 1 to 2"):
            attempt()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ((b'"layer":2', b'"layer":9'), "layer 9 is none of"),
        ((b"[3,1,4]", b"[3,1]"), "2 experts with 3 scores"),
        ((b"[3,1,4]", b"[3,1,64]"), "expert 64, but the header says 64"),
        ((b"[3,1,4]", b"[3,1,1]"), "appears twice"),
        ((b"[3,1,4]", b"[3,1,-1]"), "experts.2"),
        ((b"0.25", b"NaN"), "scores.1"),
        ((b"denoise", b"lunch"), "phase"),
        ((b'"step"', b'"leap"'), "step: field required"),
        ((b'{"phase', b'{"colour":1,"phase'), "colour: extra inputs"),
        ((b'{"phase', b"{phase"), "invalid JSON"),
    ],
)
def test_a_line_that_makes_no_sense_is_named(tmp_path, change, complaint):
    path = tmp_path / "run.jsonl"
    write(path, 1)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(*change)
    path.write_bytes(b"".join(lines))
    _, found = read_trace(path)
    assert next(found).layer == 1
    with pytest.raises(TraceError, match=r"run\.jsonl, line 3: no trace record") as error:
        next(found)
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_gzipped_traces_are_read_even_cut_off(tmp_path):
    plain, packed = tmp_path / "run.jsonl", tmp_path / "run.jsonl.gz"
    write(plain, 200)
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read(packed) == read(plain)
    packed.write_bytes(packed.read_bytes()[:-20])
    assert 0 < len(read(packed)) <= 600
    packed.write_bytes(b"\x1f\x8bno gzip at all")
    with pytest.raises(TraceError, match=r"run\.jsonl\.gz: can't be read"):
        read_trace(packed)
    with pytest.raises(TraceError, match="drop the \\.gz"):
        TraceWriter(packed, HEADER)


def test_an_unbounded_line_is_not_swallowed(tmp_path, monkeypatch):
    monkeypatch.setattr("offload_engine.trace._MAX_LINE", 1000)
    path = tmp_path / "run.jsonl"
    path.write_bytes(HEADER.line() + b"x" * 5000)
    with pytest.raises(TraceError, match="line 2: longer than 1000 bytes"):
        read(path)


def test_a_full_disk_is_reported_when_the_trace_begins():
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(TraceError, match=r"/dev/full: the trace can't be written \(No space left on device\); 0 rec"):
        TraceWriter(full, HEADER)


def test_a_disk_that_fills_up_raises_once_and_leaves_whole_lines(tmp_path):
    path = tmp_path / "run.jsonl"
    writer = TraceWriter(path, HEADER)
    raised = []
    with files_limited_to(1500):
        for step in range(20):
            for layer in HEADER.layers:
                try:
                    writer.record(ForwardInfo(Phase.DENOISE, 1, step), layer, [3, 1, 2], [0.5, 0.25, 0.125])
                except TraceError as error:
                    raised.append(str(error))
        writer.close()
    assert len(raised) == 1
    content = path.read_bytes()
    assert content.endswith(b"\n")
    assert 1300 < len(content) <= 1500
    assert len(read(path)) == writer.records_written > 3
    assert str(path) in raised[0]
    assert "File too large" in raised[0]
    assert f"{writer.records_written} records of this run are in it" in raised[0]
    write(path, 1)
    assert len(read(path)) == writer.records_written + 3


def test_paths_that_lead_nowhere(tmp_path):
    with pytest.raises(TraceError, match="can't be opened for a trace"):
        TraceWriter(tmp_path / "absent" / "run.jsonl", HEADER)
    with pytest.raises(TraceError, match="can't be read as a routing trace"):
        read_trace(tmp_path / "absent.jsonl")


def test_experts_without_scores_are_a_bug_of_the_caller(tmp_path):
    with TraceWriter(tmp_path / "run.jsonl", HEADER) as writer, pytest.raises(ValueError, match="2 experts with 1"):
        writer.record(DENOISE, 1, [1, 2], [1.0])
