"""`dmoe serve` as a process: how it starts, stops, and what it says where."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Queue

import httpx
import openai
import pytest

from offload_engine.cli import serve
from offload_engine.errors import ConfigError
from tests.cli.command_line import complaint, dmoe_command, process
from tests.server.serving import ANSWER, ENDLESS, PROBLEM, chat_body

ARGUMENTS = ["serve", "--port", 0, "--gpu-mem", "4GB", "--threads", 1, "--max-context", 2048]
ENDLESSLY = ["--eos-token-id", 95, "--batch-size", 1]


@contextmanager
def running(*more: object, env: dict[str, str] | None = None) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The process and its URL, once it listens."""
    child = process(*ARGUMENTS, *more, env=env)
    try:
        assert child.stderr is not None
        lines: list[str] = []
        for line in iter(child.stderr.readline, b""):
            lines.append(line.decode())
            found = re.search(r"serving on (http://\S+);", lines[-1])
            if found:
                yield child, found[1]
                return
        raise AssertionError("".join(lines))
    finally:
        child.kill()
        child.communicate()


def asking(url: str, answers: Queue[httpx.Response | Exception], **fields: object) -> threading.Thread:
    """An answer under way."""

    def ask() -> None:
        try:
            answers.put(httpx.post(f"{url}/v1/chat/completions", json=chat_body(**ENDLESS | fields), timeout=60))
        except httpx.HTTPError as error:
            answers.put(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while httpx.get(f"{url}/v1/stats").json()["requests"]["active"] == 0:
        pass
    return thread


def test_it_answers_logs_and_drains_at_sigterm():
    answers: Queue[httpx.Response | Exception] = Queue()
    with running(*ENDLESSLY) as (child, url):
        thread = asking(url, answers, max_tokens=96)
        child.send_signal(signal.SIGTERM)
        out, errors = child.communicate(timeout=60)
        thread.join()
    assert child.returncode == 0
    answer = answers.get()
    assert isinstance(answer, httpx.Response)
    assert answer.json()["usage"]["completion_tokens"] == 96
    lines = [json.loads(line) for line in out.splitlines()]
    assert lines[-1]["route"] == "/v1/chat/completions"
    assert PROBLEM.encode() not in out + errors
    assert b"Traceback" not in errors


@pytest.mark.parametrize(("first", "second"), [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT)])
def test_a_second_signal_ends_at_once(first: signal.Signals, second: signal.Signals):
    answers: Queue[httpx.Response | Exception] = Queue()
    with running(*ENDLESSLY, "--drain", 600) as (child, url):
        thread = asking(url, answers)
        child.send_signal(first)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(timeout=1)
        child.send_signal(second)
        assert child.wait(timeout=10) == 128 + second
        thread.join()


def test_the_key_from_a_file_or_the_environment(tmp_path: Path):
    key = "file-key-of-24-characters"
    (tmp_path / "key").write_text(f"{key}\n")
    with running("--api-key-file", tmp_path / "key", "--served-model-name", "tiny", env={"DMOE_API_KEY": "x"}) as (
        _,
        url,
    ):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
        assert client.models.list().data[0].id == "tiny"
        stats = httpx.get(f"{url}/v1/stats", headers={"authorization": f"Bearer {key}"}).json()
        assert stats["requests"]["places"] == 4, "requests are denoised together unless told otherwise"
        done = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": PROBLEM}])
        assert ANSWER in done.choices[0].message.content
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="x").models.list()


def test_the_measured_peak_stays_within_the_plan():
    """Eight clients at once: answers, the longest prompts there may be, junk, and statistics."""
    with running() as (child, url), httpx.Client(base_url=url, timeout=120) as http, ThreadPoolExecutor(8) as clients:

        def ask(number: int) -> int:
            kind = number % 4
            if kind == 0:
                return http.get("/v1/stats").status_code
            if kind == 1:
                junk = os.urandom(60_000)
                return http.post(
                    "/v1/completions", content=junk, headers={"content-type": "application/json"}
                ).status_code
            typed = "x " * 60_000 if kind == 2 else PROBLEM
            body = chat_body(typed, stream=number % 8 == 3, max_tokens=16)
            return http.post("/v1/chat/completions", json=body).status_code

        assert set(clients.map(ask, range(96))) == {200, 400}
        peak = next(line for line in Path(f"/proc/{child.pid}/status").read_text().splitlines() if "VmHWM" in line)
        plan = httpx.get(f"{url}/v1/stats").json()["plan"]["total"]
    assert int(peak.split()[1]) * 1024 <= plan


@pytest.mark.parametrize(
    ("options", "code", "wanted"),
    [
        (["--host", "0.0.0.0"], 2, "there is no API key"),
        (["--api-key", "two words"], 2, "the API key is empty or holds"),
        (["--api-key", "x", "--api-key-file", "y"], 2, "leave one of them out"),
        (["--api-key-file", "no/such/file"], 2, "--api-key-file no/such/file: can't be read"),
        (["--deadline", "-1"], 2, "--deadline is -1"),
        (["--max-body", "lots"], 2, "--max-body is 'lots'"),
        (["--port", "70000"], 2, "--port is 70000"),
        (["--allow-origin", "everyone"], 2, "--allow-origin is 'everyone'"),
        (["--model", "no/such/directory/at/all"], 3, "no/such/directory"),
    ],
)
def test_options_that_cannot_be(options: list[str], code: int, wanted: str):
    result = dmoe_command("serve", "--port", "0", *options)
    assert result.exit_code == code
    assert wanted in complaint(result)


def test_the_extra_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(serve, "NEEDED", ("fastapi", "no_such_library"))
    result = dmoe_command("serve", "--port", "0")
    assert result.exit_code == 2
    assert complaint(result) == "no_such_library is not installed; get it with: pip install 'offload-engine[serve]'"


def test_port_zero_and_false_are_values_like_any_other(monkeypatch):
    monkeypatch.delenv(serve.KEY_VARIABLE, raising=False)
    assert serve.settings_of({"port": 0, "host": None, "allow_origins": ()}, None).port == 0
    monkeypatch.setenv(serve.KEY_VARIABLE, "from-the-environment")
    assert serve.settings_of({}, None).api_key == "from-the-environment"
    assert serve.settings_of({"api_key": "given"}, None).api_key == "given"
    monkeypatch.setenv(serve.KEY_VARIABLE, "")
    with pytest.raises(ConfigError, match="API key is empty"):
        serve.settings_of({}, None)
    assert os.environ[serve.KEY_VARIABLE] == ""
