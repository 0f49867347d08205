"""Random weights written packed at once: what converting the published layout gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from offload_engine import Engine, SamplingParams
from offload_engine.experts.storage.conversion import convert
from offload_engine.experts.storage.packed_header import PACKED_FILE, read_packed_header
from tests.tools.pocket_checkpoint import POCKET
from tools import make_checkpoint as tool

SHORT = SamplingParams(max_new_tokens=32, steps=2)


def made(out: Path, packed: str | None = None, seed: int = 3) -> Path:
    tool.make_checkpoint(out, POCKET, seed=seed, shard_bytes=10**9, tokenizer=None, packed=packed)
    return out


@pytest.mark.parametrize("kind", ["stored", "int8", "int4"])
def test_it_is_the_conversion_of_the_published_layout(tmp_path: Path, kind: str) -> None:
    converted = tmp_path / "converted"
    convert(made(tmp_path / "plain"), converted, kind, identity="any")  # type: ignore[arg-type]
    direct = made(tmp_path / "direct", kind)
    theirs, ours = (read_packed_header(folder / PACKED_FILE) for folder in (converted, direct))
    assert ours.slabs.keys() == theirs.slabs.keys()
    assert [slab.crc32 for slab in ours.slabs.values()] == [slab.crc32 for slab in theirs.slabs.values()]
    answers = []
    for folder in (converted, direct):
        with Engine.from_pretrained(folder, gpu_mem="2GB", max_context=64, hot_set="off") as engine:
            answers.append(engine.generate([1, 2, 3], SHORT).token_ids)
    assert answers[0] == answers[1]


def test_another_seed_is_another_model(tmp_path: Path) -> None:
    """The file of one set of weights beside the other tensors of another is refused: each knows whose it is."""
    sources = {
        read_packed_header(made(tmp_path / str(seed), "int8", seed) / PACKED_FILE).description.source for seed in (3, 4)
    }
    assert len(sources) == 2


def test_the_command_knows_no_other_kind(tmp_path: Path) -> None:
    arguments = ["--preset", "llada2-nano", "--out", str(tmp_path / "out"), "--packed", "int3"]
    assert CliRunner().invoke(tool.main, arguments).exit_code == 2
    assert not (tmp_path / "out").exists()
