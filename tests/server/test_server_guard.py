"""Who is let in: keys, hosts, origins."""

from __future__ import annotations

import httpx
import openai
import pytest

from offload_engine.errors import ConfigError
from offload_engine.server.settings import ServerSettings, is_loopback
from tests.server.serving import Served, chat_body, error_of, serving

KEY = "a-key-of-sufficient-length"


@pytest.fixture(scope="module")
def guarded(spare_engine):
    with serving(spare_engine, api_key=KEY, allow_origins=("http://localhost:3000",)) as served:
        yield served


def test_the_key_opens_everything(guarded: Served):
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=KEY, max_retries=0)
    assert client.models.list().data[0].id == "built-in"
    guarded.http.headers["authorization"] = f"bearer {KEY}"
    for path in ("/metrics", "/v1/stats"):
        assert guarded.http.get(path).status_code == 200
    del guarded.http.headers["authorization"]


@pytest.mark.parametrize("path", ["/metrics", "/v1/stats", "/v1/models", "/v1/models/built-in", "/nope"])
@pytest.mark.parametrize(
    "header", [None, "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY, "Bearer ü"]
)
def test_nothing_else_does(guarded: Served, path: str, header: str | None):
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    response = guarded.http.get(path, headers=headers)
    assert response.status_code == 401
    assert error_of(response)["code"] == "invalid_api_key"
    assert KEY not in response.text


def test_a_body_is_not_read_without_the_key(guarded: Served):
    response = guarded.http.post("/v1/chat/completions", content=b"{" * 2_000_000)
    assert response.status_code == 401


def test_health_and_the_page_need_no_key(guarded: Served):
    assert guarded.http.get("/health").json() == {"status": "ok"}


def test_a_key_that_comes_twice_is_refused(guarded: Served):
    headers = [("authorization", f"Bearer {KEY}"), ("authorization", "Bearer other")]
    assert guarded.http.get("/v1/models", headers=headers).status_code == 400


def test_pages_elsewhere_may_not_use_the_server(served: Served, guarded: Served):
    foreign = {"origin": "http://evil.example"}
    response = served.http.post("/v1/chat/completions", json=chat_body(max_tokens=1), headers=foreign)
    assert response.status_code == 403
    error_of(response)
    own = {"origin": served.url}
    assert served.http.post("/v1/chat/completions", json=chat_body(max_tokens=1), headers=own).status_code == 200
    key = {"authorization": f"Bearer {KEY}"}
    assert guarded.http.get("/v1/models", headers=key | foreign).status_code == 403
    allowed = guarded.http.get("/v1/models", headers=key | {"origin": "http://localhost:3000"})
    assert allowed.headers["access-control-allow-origin"] == "http://localhost:3000"
    preflight = {"origin": "http://localhost:3000", "access-control-request-method": "POST"}
    assert guarded.http.options("/v1/chat/completions", headers=preflight).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "10.0.0.1", "", "[::2]"]
)
def test_names_that_only_point_at_this_machine_are_refused(served: Served, host: str):
    response = served.http.get("/v1/models", headers={"host": host})
    assert response.status_code == 403
    error_of(response)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.1.2.3:1", "[::1]:8000"])
def test_names_of_this_machine_are_not(served: Served, host: str):
    assert served.http.get("/v1/models", headers={"host": host}).status_code == 200


def test_any_name_will_do_with_a_key(guarded: Served):
    headers = {"host": "gpu.example", "authorization": f"Bearer {KEY}"}
    assert guarded.http.get("/v1/models", headers=headers).status_code == 200


def test_a_key_is_required_beyond_loopback():
    for host in ("0.0.0.0", "::", "192.168.1.4", "gpu.example", ""):
        with pytest.raises(ConfigError, match="there is no API key"):
            ServerSettings(host=host)
        with pytest.raises(ConfigError, match="has 5 characters; wanted at least 16"):
            ServerSettings(host=host, api_key="short")
        ServerSettings(host=host, api_key=KEY)
    assert ServerSettings(api_key="short").loopback


@pytest.mark.parametrize("key", ["", "two words", "schlüssel", "tab\t", "line\n"])
def test_keys_that_no_header_carries(key: str):
    with pytest.raises(ConfigError, match="the API key is empty or holds"):
        ServerSettings(api_key=key)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"port": 70000}, "--port is 70000"),
        ({"deadline": 0}, "--deadline is 0"),
        ({"max_waiting": 0}, "--max-waiting is 0"),
        ({"patience": float("nan")}, "--patience is nan"),
        ({"allow_origins": ("*",)}, "--allow-origin is '\\*'"),
        ({"allow_origins": ("http://a/b",)}, "wanted scheme://host"),
    ],
)
def test_settings_are_refused_by_option(changes, named):
    with pytest.raises(ConfigError, match=named):
        ServerSettings(**changes)


def test_the_key_is_not_in_the_settings_text():
    assert KEY not in repr(ServerSettings(api_key=KEY))


def test_what_is_loopback():
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.9.9.9", "::1")))
    assert not any(map(is_loopback, ("", "0.0.0.0", "::", "localhost.evil.example", "1.1.1.1", "127.0.0.1:80")))


def test_the_port_that_is_taken_is_named(served: Served):
    from offload_engine.server.running import bind

    with pytest.raises(ConfigError, match=f"can't listen on 127.0.0.1 port {httpx.URL(served.url).port}"):
        bind(ServerSettings(port=httpx.URL(served.url).port))
    with pytest.raises(ConfigError, match="which is no address of this machine"):
        bind(ServerSettings(host="no.such.host.invalid", api_key=KEY))
