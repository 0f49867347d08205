"""What the server tells of itself: statistics, metrics, denoising events, logs."""

from __future__ import annotations

import io
import json
import logging

import pytest
from prometheus_client.parser import text_string_to_metric_families

from offload_engine.server.logs import LOGGER, JsonFormatter, log_to
from tests.server.serving import ANSWER, Served, chat_body, events_of, raw_request, serving, until


def metric(served: Served, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(served.http.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    return sum(one.value for one in samples if one.name == name and labels.items() <= one.labels.items())


def test_statistics_agree_with_the_engine(served: Served, engine):
    served.chat()
    until(lambda: served.server.batcher.active == 0)
    found = served.http.get("/v1/stats").json()
    assert found["model"] == "built-in"
    assert found["stats"]["new_tokens"] == engine.stats.new_tokens > 0
    assert found["plan"]["total"] == engine.plan.total
    assert found["requests"] == {"active": 0, "waiting": 0, "places": 4}
    assert found["routing"]["name"] == "dmoe"
    assert "original" in found["routing"]["choices"]
    assert sum(found["slots"][state] for state in ("free", "loading", "resident")) == engine.plan.slots
    held = found["experts"]["held"]
    assert len(held) == len(found["experts"]["layers"]) == 3
    assert {len(row) for row in held} == {256}
    assert sum(row.count("r") for row in held) == found["slots"]["resident"] > 0


def test_metrics_count_what_happens(served: Served, engine):
    tokens = metric(served, "offload_engine_new_tokens_total")
    answered = metric(served, "offload_engine_http_requests_total", route="/v1/chat/completions", status="200")
    first = metric(served, "offload_engine_first_step_seconds_count")
    done = served.chat().json()
    assert metric(served, "offload_engine_new_tokens_total") == tokens + done["usage"]["completion_tokens"]
    assert (
        metric(served, "offload_engine_http_requests_total", route="/v1/chat/completions", status="200") == answered + 1
    )
    assert metric(served, "offload_engine_first_step_seconds_count") == first + 1
    assert metric(served, "offload_engine_planned_peak_bytes") == engine.plan.total
    assert metric(served, "offload_engine_slots_by_state", state="resident") == engine.occupancy().resident
    assert metric(served, "offload_engine_requests_by_state", state="waiting") == 0
    served.http.get("/no/such/path/of/a/client")
    assert "/no/such" not in served.http.get("/metrics").text, "a client can't make up labels"


def test_denoising_is_told_step_by_step(served: Served):
    fields = {"threshold": 1.0, "steps": 8, "routing": "original"}
    events = events_of(served.http.post("/v1/denoise", json=chat_body(**fields)))
    names = [name for name, _data in events]
    assert (names[0], names[-1]) == ("begin", "end")
    begin, end = events[0][1], events[-1][1]
    assert (begin["routing"], begin["experts"], begin["layers"]) == ("original", 256, [1, 2, 3])
    assert ANSWER in end["text"]
    assert end["usage"]["completion_tokens"] > 0
    steps = [data for name, data in events if name == "step"]
    blocks = [data for name, data in events if name == "block"]
    assert len(steps) == end["counters"]["denoise_steps"] > 8
    assert "".join(data["text"] for data in blocks) == end["text"]
    for step in steps:
        new = {place for place, _sure in step["accepted"]}
        assert all(step["cells"][place] is not None for place in new)
        assert all(0 <= sure <= 1 for _place, sure in step["accepted"])
    masked = [sum(cell is None for cell in step["cells"]) for step in steps if step["block"] == 1]
    assert masked == sorted(masked, reverse=True)
    assert masked[0] > 0, "masks are told of"
    used = [set(layer) for layer in steps[0]["experts"]["used"]]
    assert all(len(layer) >= 8 for layer in used)
    for row, layer in zip(steps[0]["experts"]["held"], used, strict=True):
        assert all(row[expert] == "r" for expert in layer), "what was used is there, for nothing was evicted"


def test_experts_are_counted_only_while_somebody_watches(served: Served, engine):
    served.http.post("/v1/denoise", json=chat_body(max_tokens=1))
    before = engine.activity.uses()
    served.chat()
    assert engine.activity.uses().equal(before)
    served.http.post("/v1/denoise", json=chat_body(max_tokens=1))
    assert int((engine.activity.uses() - before).sum()) > 0


def test_a_denoising_of_nonsense_is_refused_before_it_begins(served: Served, engine):
    response = served.http.post("/v1/denoise", json=chat_body(routing="nonsense"))
    assert response.status_code == 400
    before = engine.activity.uses()
    served.chat()
    assert engine.activity.uses().equal(before), "nobody watches any more"


@pytest.fixture
def logged():
    written = io.StringIO()
    handlers: list[logging.Handler] = []

    def begin(*, prompts: bool) -> io.StringIO:
        handlers.append(log_to(written, prompts=prompts))
        return written

    yield begin
    for handler in handlers:
        LOGGER.removeHandler(handler)
        logging.getLogger("uvicorn").removeHandler(handler)


SECRET = "Kolibri"


def lines_of(written: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in written.getvalue().splitlines()]


def test_logs_hold_no_prompt_unless_asked(spare_engine, logged):
    written = logged(prompts=False)
    with serving(spare_engine, log_prompts=False) as served:
        served.chat(f"{SECRET} 1 + 1")
        served.chat(f"{SECRET}", stop=[""])
        served.http.post("/v1/completions", json={"prompt": f"{SECRET}"})
        served.http.get(f"/v1/models/{SECRET}?{SECRET}")
        served.http.post("/v1/denoise", json=chat_body(SECRET, model=SECRET))
    lines = lines_of(written)
    assert [line["status"] for line in lines] == [200, 400, 200, 404, 404]
    assert SECRET not in written.getvalue()
    first = lines[0]
    assert (first["event"], first["route"], first["routing"]) == ("request", "/v1/chat/completions", "dmoe")
    assert first["finish_reason"] in ("eos", "length")
    assert all(isinstance(first[name], int | float) for name in ("ms", "prompt_tokens", "new_tokens", "steps"))


def test_a_client_that_went_away_is_logged_as_such(spare_engine, logged):
    written = logged(prompts=False)
    with serving(spare_engine) as served:
        for stream in (True, False):
            connection = served.connect()
            connection.sendall(raw_request(chat_body(stream=stream, threshold=1.0, max_tokens=1000)))
            until(lambda: served.server.batcher.active == 1)
            connection.close()
            until(lambda: served.server.batcher.active == 0)
    assert [line["finish_reason"] for line in lines_of(written)] == ["client gone"] * 2


def test_logs_hold_prompts_where_that_is_wanted(spare_engine, logged):
    written = logged(prompts=True)
    with serving(spare_engine, log_prompts=True) as served:
        served.chat(f"{SECRET} 1 + 1")
    assert SECRET in written.getvalue()


def test_a_failure_is_logged_with_its_place_and_without_its_message(spare_engine, logged, monkeypatch):
    written = logged(prompts=False)
    with serving(spare_engine) as served:
        monkeypatch.setattr(served.server.batcher, "submit", lambda *_, **__: [][len(SECRET)])
        response = served.chat(SECRET)
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "internal_error"
    (line,) = lines_of(written)
    assert (line["level"], line["error"]) == ("error", "IndexError")
    assert "test_server_statistics.py" in line["at"][-1]


def test_a_line_is_one_line():
    record = logging.LogRecord("x", logging.INFO, "", 0, 'a\n"b"', (), None)
    assert "\n" not in JsonFormatter().format(record)


def test_an_answer_is_the_same_watched_and_not(served: Served):
    watched = events_of(served.http.post("/v1/denoise", json=chat_body()))[-1][1]["text"]
    assert watched == served.chat().json()["choices"][0]["message"]["content"]
