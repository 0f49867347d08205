"""Whatever a client sends, it is told what is wrong in OpenAI's format; it is never the server's fault."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_engine.server.bodies import ChatBody, CompletionBody
from tests.server.serving import Served, chat_body, error_of, serving

JSON = {"content-type": "application/json"}
POSTS = ("/v1/chat/completions", "/v1/completions", "/v1/denoise")
MALFORMED = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"\xff\xfe{}",
    b'{"messages": "\xff"}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"messages": ' + b"[" * 100_000,
    b'{"messages": ' + b'{"a":' * 50_000,
    b'{"messages": [{"role": "user", "content": ' + b"[" * 120 + b"]" * 120 + b"}]}",
    b'{"max_tokens": ' + b"9" * 5000 + b"}",
    b'{"messages": [], "temperature": NaN}',
    b'{"messages": [], "temperature": Infinity}',
    b'{"messages": [], "temperature": 1e999}',
    b"\xef\xbb\xbf{}",
    b"{'messages': []}",
]


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("body", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_bodies(served: Served, path: str, body: bytes):
    response = served.http.post(path, content=body, headers=JSON)
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("messages", [], "at least 1 item"),
        ("messages", [{"role": "user"}], "'messages.0.content' is missing"),
        ("messages", [{"role": "user", "content": None}], "'messages.0.content' is None"),
        ("messages", [{"role": "wizard", "content": "x"}], "role is 'wizard'"),
        (
            "messages",
            [{"role": "tool", "content": "x"}],
            "tokenizer_config.json, chat_template: the chat template refuses the messages: Unknown role: tool",
        ),
        ("messages", [{"role": "user", "content": "x", "tool_calls": [{}]}], "'tool_calls'"),
        ("messages", [{"role": "user", "content": "x", "age": 3}], "unknown field 'age'"),
        ("model", 3, "'model' is 3"),
        ("max_tokens", 0, "greater than or equal to 1"),
        ("max_tokens", True, "'max_tokens' is True"),
        ("max_tokens", "many", "'max_tokens' is 'many'"),
        ("temperature", -1, "'temperature' is -1"),
        ("temperature", 3, "less than or equal to 2"),
        ("temperature", "hot", "'temperature' is 'hot'"),
        ("top_p", 0, "'top_p' is 0"),
        ("seed", -1, "'seed' is -1"),
        ("seed", 2**64, "'seed' is"),
        ("stop", [""], "'stop'"),
        ("stop", ["x"] * 17, "at most 16 strings"),
        ("stop", 3, "'stop' is 3"),
        ("stream", "yes", "'stream' is 'yes'"),
        ("stream_options", {"include_usage": 1}, "'stream_options.include_usage' is 1"),
        ("n", 0, "'n' is 0"),
        ("threshold", 1.5, "'threshold' is 1.5"),
        ("steps", 0, "'steps' is 0"),
        ("block_length", 4096, "block_length is 4096, but the memory plan allows forwards of"),
        ("routing", "dmoe2", "routing is 'dmoe2'; choose one of"),
        ("routing", "", "'routing' is ''"),
        ("routing_top_p", 2, "'routing_top_p' is 2"),
        ("frobnicate", 1, "unknown field 'frobnicate'"),
    ],
)
def test_fields_are_refused_by_name(served: Served, field: str, value: object, wanted: str):
    response = served.http.post("/v1/chat/completions", json=chat_body() | {field: value})
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert wanted in error["message"]
    assert "/" not in error["message"]
    assert "\n" not in error["message"]


@pytest.mark.parametrize("prompt", [None, 3, [], [[]], ["a", "b"], [[1], [2]], [1.5], [True], ["a", 1], {"a": 1}])
def test_prompts_that_are_none(served: Served, prompt: object):
    response = served.http.post("/v1/completions", json={"prompt": prompt})
    assert response.status_code == 400
    assert error_of(response)["param"] == "prompt"


def test_token_ids_outside_the_vocabulary(served: Served):
    for ids in ([-1], [10**9], [10**30]):
        response = served.http.post("/v1/completions", json={"prompt": ids})
        assert response.status_code == 400
        assert error_of(response)["param"] == "prompt"


def test_a_prompt_longer_than_the_server_takes(served: Served):
    for content in ("x" * (2**16 + 1), "word " * 100_000, "日" * 22_000):
        response = served.chat(content)
        assert response.status_code == 400
        error = error_of(response)
        assert (error["code"], error["param"]) == ("prompt_too_long", "messages")
        assert "this server takes 65.5 KB; shorten it" in error["message"]
    response = served.http.post("/v1/completions", json={"prompt": "x" * (2**16 + 1)})
    assert error_of(response)["param"] == "prompt"


def test_a_prompt_longer_than_the_context(served: Served):
    response = served.chat("word " * 10_000)
    assert response.status_code == 400
    error = error_of(response)
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "messages"
    assert "the context holds" in error["message"]


def test_a_prompt_of_markers_alone_takes_no_longer_than_its_size(served: Served):
    for marker in ("<role><|mask|><|role_end|>", "<ro<role>le>", "<role", " "):
        assert served.chat(marker * (2**16 // len(marker))).status_code == 400


def test_a_body_that_is_too_large(spare_engine):
    with serving(spare_engine, max_body=2000) as small:
        at_once = small.chat("x" * 3000)
        assert at_once.status_code == 413
        assert "larger than 2.00 kB" in error_of(at_once)["message"].replace("KB", "kB")
        in_chunks = small.http.post("/v1/chat/completions", content=(b"x" * 500 for _ in range(9)), headers=JSON)
        assert in_chunks.status_code == 413
        assert error_of(in_chunks)["code"] == "body_too_large"
        assert small.chat(max_tokens=1).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        JSON | {"content-encoding": "gzip"},
    ],
)
def test_bodies_that_are_not_json_by_their_type(served: Served, headers: dict[str, str]):
    response = served.http.post("/v1/completions", content=b'{"prompt": "x"}', headers=headers)
    assert response.status_code == 415
    error_of(response)


def test_paths_and_methods_that_are_not_there(served: Served):
    for method, path, status in [
        ("GET", "/v1", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/health", 405),
        ("DELETE", "/v1/models/built-in", 405),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/page/../app.py", 404),
        ("GET", "/%00", 404),
        ("GET", "/docs", 404),
    ]:
        response = served.http.request(method, path, json={} if method == "POST" else None)
        assert response.status_code == status, path
        error_of(response)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
FIELDS = [*ChatBody.model_fields, *CompletionBody.model_fields, *ChatBody.neutral, *ChatBody.ignored, "suffix"]


@settings(max_examples=150)
@given(
    fields=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=10), values, max_size=6),
    path=st.sampled_from(POSTS),
)
def test_any_json(served: Served, fields: dict[str, object], path: str):
    limit = {"max_tokens": 1} if "max_tokens" not in fields else {}
    response = served.http.post(path, content=json.dumps(fields | limit).encode(), headers=JSON)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        error_of(response)


@settings(max_examples=80)
@given(body=st.binary(max_size=200), path=st.sampled_from(POSTS))
def test_any_bytes(served: Served, body: bytes, path: str):
    response = served.http.post(path, content=body, headers=JSON)
    assert response.status_code == 400
    error_of(response)


@settings(max_examples=40)
@given(content=st.text(max_size=80), role=st.sampled_from(["user", "assistant", "system"]))
def test_any_text_is_answered(served: Served, content: str, role: str):
    if any("\ud800" <= letter <= "\udfff" for letter in content):
        return
    body = {"messages": [{"role": role, "content": content}], "max_tokens": 4, "steps": 1}
    assert served.http.post("/v1/chat/completions", json=body).status_code == 200


def test_it_still_answers(served: Served):
    assert served.chat().status_code == 200
