"""The table of experts on the CPU beside copies: every format, and what is said to be measured and what computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from tools.bench_cpu_experts import copy_seconds, main, table


def test_every_format_is_measured_at_every_number_of_tokens(tmp_path: Path) -> None:
    sizes = [
        "--hidden",
        "256",
        "--inner",
        "128",
        "--tokens",
        "1,3",
        "--threads",
        "1",
        "--rounds",
        "2",
        "--megabytes",
        "1",
    ]
    ran = CliRunner().invoke(main, [*sizes, "--json", str(tmp_path / "out.json")])
    assert ran.exit_code == 0, ran.output
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [(row["format"], row["tokens"]) for row in rows] == [
        (form, tokens) for form in ("bf16", "int8", "int4") for tokens in (1, 3)
    ]
    assert all(row["seconds"] > 0 for row in rows)
    plain, _, int8, _, int4, _ = (row["bytes"] for row in rows)
    assert plain == 3 * 256 * 128 * 2 > int8 > int4
    assert ran.output.count("a copy, computed from profiles: PCIe 4.0 x8") == 3


def test_copies_are_those_of_the_profiles() -> None:
    found = copy_seconds(6_291_456)
    assert found["PCIe 4.0 x8"] == pytest.approx(6_291_456 / (1.575e10 * 0.82) + 1.5e-5)
    assert found["PCIe 4.0 x16"] < 0.55 * found["PCIe 4.0 x8"]


def test_the_table_divides_by_the_copy() -> None:
    copy = copy_seconds(6_291_456)["PCIe 4.0 x8"]
    lines = table("bf16", 2, 6_291_456, {1: copy / 4, 16: copy})
    assert lines[0].startswith("bf16, 6.29 MB per expert, 2 thread(s)")
    assert lines[-2].startswith(f"| 1 | {copy / 4 * 1e3:.3f} | 0.25 | ")
    assert lines[-1].startswith(f"| 16 | {copy * 1e3:.3f} | 1.00 | ")
