"""More requests than places: who waits, who is refused, and how a place becomes free."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import openai
import pytest

from offload_engine.engine.engine import Engine
from tests.server.serving import ENDLESS, Served, chat_body, error_of, events_of, raw_request, serving, until


@pytest.fixture
def busy(endless_engine):
    """A server with one place, and one place to wait."""
    with serving(endless_engine, max_waiting=1) as served:
        yield served


def ask(served: Served, **fields: object) -> Future[httpx.Response]:
    """A request of its own thread and connection."""
    pool = ThreadPoolExecutor(1)
    body = chat_body(**ENDLESS | fields)
    return pool.submit(httpx.post, f"{served.url}/v1/chat/completions", json=body, timeout=60)


def test_one_more_than_may_wait_is_told_when_to_come_back(busy: Served):
    first = ask(busy)
    until(lambda: busy.server.batcher.active == 1)
    second = ask(busy)
    until(lambda: busy.server.batcher.waiting == 1)
    refused = busy.chat()
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    error = error_of(refused)
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
    client = openai.OpenAI(base_url=f"{busy.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(model="built-in", messages=[{"role": "user", "content": "x"}])
    busy.server.should_exit = True
    assert first.result(60).status_code == 200
    assert second.result(60).status_code in (200, 503)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/denoise"])
def test_a_client_that_goes_away_frees_its_place(busy: Served, stream: bool, path: str):
    connection = busy.connect()
    connection.sendall(raw_request(chat_body(stream=stream, **ENDLESS), path))
    until(lambda: busy.server.batcher.active == 1)
    time.sleep(0.1)
    began = time.monotonic()
    connection.close()
    until(lambda: busy.server.batcher.active == 0)
    assert time.monotonic() - began < 2, "thousands of steps were left"
    assert busy.chat(max_tokens=1).status_code == 200


def test_a_client_that_goes_away_while_it_waits(busy: Served):
    first, second = busy.connect(), busy.connect()
    first.sendall(raw_request(chat_body(**ENDLESS)))
    until(lambda: busy.server.batcher.active == 1)
    second.sendall(raw_request(chat_body(stream=True, **ENDLESS)))
    until(lambda: busy.server.batcher.waiting == 1)
    second.close()
    first.close()
    until(lambda: busy.server.batcher.active == busy.server.batcher.waiting == 0)


def test_many_clients_that_go_away(busy: Served):
    for number in range(30):
        connection = busy.connect()
        connection.sendall(raw_request(chat_body(stream=number % 2 == 0, **ENDLESS)))
        if number % 3:
            time.sleep(0.02)
        connection.close()
    until(lambda: busy.server.batcher.active == busy.server.batcher.waiting == 0)
    assert busy.chat(max_tokens=1).status_code == 200


def test_the_deadline_cuts_an_answer_short(endless_engine):
    with serving(endless_engine, deadline=0.7) as served:
        began = time.monotonic()
        whole = served.chat(**ENDLESS).json()
        assert 0.7 <= time.monotonic() - began < 10
        choice = whole["choices"][0]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "deadline")
        assert choice["message"]["content"]
        assert whole["usage"]["completion_tokens"] > 0
        streamed = served.chat(stream=True, **ENDLESS).text.split("\n\n")
        last = json.loads(streamed[-3].removeprefix("data: "))["choices"][0]
        assert (last["finish_reason"], last["stop_reason"]) == ("length", "deadline")
        assert streamed[-2] == "data: [DONE]"


def test_a_deadline_that_passes_in_the_queue_is_a_timeout(endless_engine):
    with serving(endless_engine, deadline=1.0) as served:
        first = ask(served)
        until(lambda: served.server.batcher.active == 1)
        time.sleep(0.05)
        late = [ask(served), ask(served, stream=True)]
        assert first.result(60).status_code == 200
        responses = [one.result(60) for one in late]
        whole, streamed = responses
        assert whole.status_code == 504 or whole.json()["choices"][0]["stop_reason"] == "deadline"
        if whole.status_code == 504:
            assert error_of(whole)["code"] == "deadline_exceeded"
            assert whole.headers["x-should-retry"] == "false"
        assert streamed.status_code == 200


def test_an_error_on_the_way_is_the_last_event(endless_engine, monkeypatch):
    with serving(endless_engine) as served:

        def broken(*_arguments: object, **_options: object) -> None:
            raise RuntimeError("a prompt may be quoted here")

        monkeypatch.setattr(endless_engine._observed, "begin", broken)
        streamed = served.chat(stream=True)
        assert streamed.status_code == 200
        *_, last = streamed.text.strip().split("\n\n")
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["type"] == "server_error"
        assert "quoted" not in streamed.text
        denoised = events_of(served.http.post("/v1/denoise", json=chat_body()))
        assert [name for name, _data in denoised] == ["begin", "error"]
        whole = served.chat()
        assert whole.status_code == 500
        assert "quoted" not in whole.text
        assert "[DONE]" not in streamed.text
        monkeypatch.undo()
        assert served.chat(max_tokens=1).status_code == 200


def test_what_is_under_way_is_finished_when_the_server_stops(endless_engine):
    with serving(endless_engine, drain=30.0) as served:
        under_way = ask(served, max_tokens=96)
        until(lambda: served.server.batcher.active == 1)
        served.server.should_exit = True
        whole = under_way.result(60)
        assert whole.status_code == 200
        assert whole.json()["usage"]["completion_tokens"] == 96
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{served.url}/health")


def test_what_takes_longer_than_the_drain_ends_with_what_there_is(endless_engine):
    with serving(endless_engine, drain=0.5) as served:
        under_way = ask(served)
        until(lambda: served.server.batcher.active == 1)
        began = time.monotonic()
        served.server.should_exit = True
        choice = under_way.result(60).json()["choices"][0]
        assert time.monotonic() - began < 5
        assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "shutdown")


def test_an_engine_that_is_gone_is_told():
    with Engine.from_pretrained(gpu_mem="4GB", threads=1, max_context=512) as engine, serving(engine) as served:
        assert served.http.get("/health").status_code == 200
        engine.close()
        assert served.chat().status_code == 503
        until(lambda: served.http.get("/health").status_code == 503)
        assert error_of(served.http.get("/health"))["code"] == "shutting_down"


def test_no_thread_is_left(endless_engine):
    before = threading.active_count()
    with serving(endless_engine) as served:
        served.chat(max_tokens=1)
    until(lambda: threading.active_count() <= before)
