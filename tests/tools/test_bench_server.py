"""The load test: what it counts, that it ends, and what it refuses."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from offload_engine import Engine
from tests.server.serving import serving
from tools.bench_server import Answered, Level, main, quantile, table

SMALL = ["--clients", "1,3", "--requests", "5", "--max-tokens", "24"]


@pytest.fixture(scope="module")
def url():
    with (
        Engine.from_pretrained(gpu_mem="4GB", threads=1, max_context=512, batch_size=2) as engine,
        serving(engine) as at,
    ):
        yield at.url


def test_every_number_of_clients_asks_the_same(url: str):
    ran = CliRunner().invoke(main, [*SMALL, "--url", url, "--json"])
    assert ran.exit_code == 0, ran.output
    one, three = json.loads(ran.stdout)
    assert (one["clients"], three["clients"]) == (1, 3)
    for level in (one, three):
        assert len(level["answers"]) == 5
        assert level["tokens"] == sum(answer["tokens"] for answer in level["answers"]) > 0
        assert all(0 < answer["first"] <= answer["whole"] < level["seconds"] for answer in level["answers"])
    assert one["tokens"] == three["tokens"], "answers don't depend on who else asks"
    assert one["denoise_steps"] == one["forwards"] == three["denoise_steps"] > 0
    assert three["forwards"] < one["forwards"], "requests at the same time share forwards"


def test_a_server_of_its_own():
    size = ["--gpu-mem", "4GB", "--threads", "1", "--max-context", "512"]
    ran = CliRunner().invoke(main, ["--clients", "2", "--requests", "2", "--max-tokens", "8", "--", *size])
    assert ran.exit_code == 0, ran.output
    assert ran.stdout.splitlines()[-1].startswith("| 2 | ")


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--clients", "0"], "wanted numbers of clients from 1 on"),
        (["--clients", "x"], "wanted numbers of clients"),
        (["--fields", "[]"], "--fields is '[]'; wanted a JSON object"),
        (["--url", "http://127.0.0.1:1", "--", "--threads", "1"], "has no effect; leave one out"),
        (["--", "--gpu-mem", "lots"], "the server did not start"),
    ],
)
def test_what_is_refused(options: list[str], wanted: str):
    ran = CliRunner().invoke(main, options)
    assert ran.exit_code == 2
    assert wanted in ran.stderr


def test_an_answer_that_fails_ends_it(url: str):
    ran = CliRunner().invoke(main, [*SMALL, "--url", url, "--fields", '{"routing": "nonsense"}'])
    assert ran.exit_code == 1
    assert "routing is 'nonsense'" in ran.stderr


def test_quantiles_and_the_table():
    assert [quantile([3, 1, 2, 4], share) for share in (0.5, 0.95, 0.99, 0.25)] == [2, 4, 4, 1]
    assert quantile([7], 0.5) == 7
    answers = [Answered(0.010, 0.100, 10), Answered(0.030, 0.300, 30)]
    level = Level(2, 0.4, answers, 40, 8000, 0.75, 12, 6)
    assert table([level]).splitlines()[-1] == (
        "| 2 | 10 ms | 30 ms | 100 ms | 300 ms | 300 ms | 100 | 2.00 | 200 B | 75.0 % |"
    )
