"""From what a user calls a model to a directory: local, cached, or downloaded from a hub on loopback."""

import builtins
import hashlib
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

from offload_engine.errors import CheckpointError, HubError
from offload_engine.model import hub_download
from offload_engine.model.hub import resolve_model

REPO = "some-lab/tiny-moe"
SHA = "a" * 40
SHARD = bytes(range(256)) * 4096
FILES = {
    "config.json": b'{"model_type": "llada2_moe"}',
    "tokenizer.json": b"{}",
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "model-00001-of-00002.safetensors": SHARD,
    "model-00002-of-00002.safetensors": SHARD[::-1],
    "modeling_llada2_moe.py": b"import os",
    "pytorch_model.bin": b"pickle",
    "original/consolidated.safetensors": b"the same again",
}
WANTED = {name for name in FILES if "/" not in name and not name.endswith((".py", ".bin"))}


class Hub(ThreadingHTTPServer):
    """What `huggingface_hub` asks of a hub, for one repository; `break_at` cuts off large files."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = dict(FILES)
        self.status = 200
        self.break_at: int | None = None
        self.damage = False
        self.served: list[tuple[str, str | None]] = []
        """(file, Range header) of every GET of a file."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.respond(body=False)

    def do_GET(self) -> None:
        self.respond(body=True)

    def respond(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        if self.server.status != 200:
            code = {403: "GatedRepo", 404: "RepoNotFound"}.get(self.server.status)
            self.answer(b"", {"X-Error-Code": code} if code else {}, self.server.status)
        elif found := re.fullmatch(rf"/{REPO}/resolve/(main|v1|{SHA})/(.+)", path):
            self.file(found[2], body=body)
        elif not path.startswith(f"/api/models/{REPO}"):
            self.answer(b"", {"X-Error-Code": "RepoNotFound"}, 404)
        elif "/tree/" in path:
            self.answer(json.dumps([self.entry(name, "path") for name in self.server.files]).encode())
        elif "/revision/" in path and path.rsplit("/", 1)[1] not in ("main", "v1", SHA):
            self.answer(b"", {"X-Error-Code": "RevisionNotFound"}, 404)
        else:
            siblings = [self.entry(name, "rfilename") for name in self.server.files]
            self.answer(json.dumps({"id": REPO, "sha": SHA, "siblings": siblings}).encode())

    def entry(self, name: str, key: str) -> dict:
        content = self.server.files[name]
        entry = {"type": "file", key: name, "size": len(content), "oid": etag(name), "blobId": etag(name)}
        if name.endswith((".safetensors", ".bin")):
            digest = hashlib.sha256(content).hexdigest()
            lfs = {"oid": digest, "sha256": digest, "size": len(content), "pointerSize": 130}
            entry["lfs"] = lfs
        return entry

    def file(self, name: str, *, body: bool) -> None:
        content = self.server.files[name]
        headers = {"ETag": f'"{etag(name)}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        if not body:
            self.answer(content, headers, body=False)
            return
        asked = self.headers.get("Range")
        self.server.served.append((name, asked))
        if self.server.damage and name.endswith(".safetensors"):
            content = bytes(len(content))
        status, start = 200, 0
        if asked:
            start = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            status = 206
        cut = self.server.break_at
        if cut is not None and name.endswith(".safetensors"):
            self.answer(content[start:], headers, status, stop=max(0, cut - start))
            self.server.status = 500  # so that the client's own retries fail as well
        else:
            self.answer(content[start:], headers, status)

    def answer(self, content: bytes, headers=None, status: int = 200, *, body: bool = True, stop=None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content[:stop])


def etag(name: str) -> str:
    content = FILES.get(name, b"")
    if name.endswith((".safetensors", ".bin")):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache, and a hub that isn't there."""
    constants = huggingface_hub.constants
    place = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    point_at(monkeypatch, "http://127.0.0.1:9")
    return place


def point_at(monkeypatch, url: str) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(cache, monkeypatch):
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    point_at(monkeypatch, server.url)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def fill(cache: Path, names=WANTED) -> Path:
    """Lay a snapshot out as the hub's library does."""
    root = cache / ("models--" + REPO.replace("/", "--"))
    snapshot = root / "snapshots" / SHA
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(SHA)
    snapshot.mkdir(parents=True)
    for name in names:
        (root / "blobs" / etag(name)).write_bytes(FILES[name])
        (snapshot / name).symlink_to(f"../../blobs/{etag(name)}")
    return snapshot


def content_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_directory_is_taken_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("file", "is a file, wanted a checkpoint directory"),
        ("empty", "holds no config.json"),
        ("absent/deeper/still", "no such model directory"),
        ("x" * 5000, "can't be looked up"),
        ("null\0byte", "no such model directory|can't be looked up"),
    ],
)
def test_a_path_without_a_checkpoint_is_refused(tmp_path, name, complaint):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=complaint) as error:
        resolve_model(f"{tmp_path}/{name}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["llada", "./some/where", "a/b/c", "a b/c", "owner/", "/name", "owner/name@", "-o/n"])
def test_what_is_no_hub_id_is_never_looked_for_on_the_hub(monkeypatch, name):
    monkeypatch.setattr(hub_download, "fetch", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError, match="no such model directory"):
        resolve_model(name)


def test_without_the_extra_the_way_out_is_named(monkeypatch):
    usual = builtins.__import__

    def without_hub(name, *args, **kwargs):
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return usual(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_hub)
    with pytest.raises(HubError, match=re.escape(f"{REPO}: no such directory here")) as error:
        resolve_model(REPO)
    assert "pip install 'offload-engine[hub]'" in str(error.value)


@pytest.mark.parametrize("offline", [True, None])
def test_offline_a_cached_snapshot_is_found(cache, monkeypatch, offline):
    snapshot = fill(cache)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline is None)
    assert resolve_model(REPO, offline=offline) == snapshot
    assert resolve_model(f"{REPO}@{SHA}", offline=offline) == snapshot


def test_offline_what_is_not_cached_is_one_clear_line(cache):
    for model in (REPO, f"{REPO}@v2"):
        with pytest.raises(HubError, match="no whole copy in the hub's cache") as error:
            resolve_model(model, offline=True)
        assert str(error.value).startswith(f"{model}: ")
        assert "offline mode is on" in str(error.value)
        assert str(cache) in str(error.value)
        assert "\n" not in str(error.value)


def test_offline_a_snapshot_without_its_config_is_not_whole(cache):
    fill(cache, {"tokenizer.json"})
    with pytest.raises(HubError, match="no whole copy"):
        resolve_model(REPO, offline=True)


def test_without_a_connection_the_cache_serves(cache, caplog):
    with pytest.raises(HubError, match=r"the hub \(http://127\.0\.0\.1:9\) can't be reached"):
        resolve_model(REPO)
    snapshot = fill(cache)
    assert resolve_model(REPO) == snapshot
    assert "using the copy in the hub's cache, as the hub" in caplog.text


def test_a_download_brings_data_and_no_code(hub, cache):
    path = resolve_model(REPO)
    assert content_of(path) == {name: FILES[name] for name in WANTED}
    assert {name for name, _ in hub.served} == WANTED
    assert (cache / "models--some-lab--tiny-moe" / "refs" / "main").read_text() == SHA
    assert not list(cache.rglob("*.incomplete"))
    hub.served.clear()
    assert resolve_model(REPO) == path
    assert resolve_model(f"{REPO}@v1") == path
    assert hub.served == []
    assert resolve_model(REPO, offline=True) == path


def test_progress_goes_to_stderr(hub, capfd, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_PROGRESS_BARS", False)
    monkeypatch.setenv("TQDM_POSITION", "-1")  # bars even though this is no terminal
    resolve_model(REPO)
    out, err = capfd.readouterr()
    assert out == ""
    assert "model-00001-of-00002.safetensors" in err
    assert "100%" in err


def test_progress_is_told_instead_where_somebody_listens(hub, cache, capfd, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_PROGRESS_BARS", False)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    monkeypatch.setenv("TQDM_POSITION", "-1")
    told = []
    hub.break_at = 300_000
    with pytest.raises(HubError):
        resolve_model(REPO, progress=lambda *report: told.append(report))
    assert told[-1] == ("download", 300_000, 2 * len(SHARD))
    hub.status, hub.break_at = 200, None
    told.clear()
    resolve_model(REPO, progress=lambda *report: told.append(report))
    done = [report[1] for report in told]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (300_000, 2 * len(SHARD)), "what was there already counts as done"
    assert len(done) > 15
    out, err = capfd.readouterr()
    assert "safetensors" not in out + err, "the library's own bars are not in the way"
    told.clear()
    resolve_model(REPO, progress=lambda *report: told.append(report))
    assert not told


def test_what_a_server_wont_go_on_with_is_counted_anew(tmp_path):
    counted = []
    with (tmp_path / "file").open("wb") as file:
        file = hub_download._Counted(file, counted.append)
        file.write(b"12345678")
        file.seek(max(file.tell() - 5, 0))
        file.truncate()
        file.write(b"45678")
    assert counted == [8, -5, 5]
    assert (tmp_path / "file").read_bytes() == b"12345678"


def test_an_interrupted_download_goes_on_where_it_stopped(hub, cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    hub.break_at = 300_000
    with pytest.raises(HubError, match=r"the download broke off .* run the same command again to go on"):
        resolve_model(REPO)
    first = hub.served[0][0]
    (partial,) = cache.rglob("*.incomplete")
    assert partial.read_bytes() == FILES[first][:300_000]
    hub.status, hub.break_at = 200, None
    hub.served.clear()
    path = resolve_model(REPO)
    assert hub.served[0] == (first, "bytes=300000-")
    assert content_of(path) == {name: FILES[name] for name in WANTED}


def test_shards_that_are_there_are_not_fetched_again(hub, cache):
    fill(cache, {"model-00002-of-00002.safetensors"})
    path = resolve_model(REPO)
    assert "model-00002-of-00002.safetensors" not in {name for name, _ in hub.served}
    assert content_of(path) == {name: FILES[name] for name in WANTED}


def test_a_damaged_download_is_noticed_and_removed(hub, cache):
    hub.damage = True
    with pytest.raises(HubError, match=r"safetensors arrived damaged \(sha256 .* was removed"):
        resolve_model(REPO)
    assert not list(cache.rglob("*.incomplete"))
    hub.damage = False
    assert content_of(resolve_model(REPO)) == {name: FILES[name] for name in WANTED}


def test_a_download_that_does_not_fit_is_refused_before_it_starts(hub, cache, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1_500_000)
    monkeypatch.setattr(hub_download.shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(HubError, match=r"2\.10 MB are still to be downloaded, .* has 1\.50 MB free; make room"):
        resolve_model(REPO)
    assert hub.served == []
    fill(cache, {"model-00002-of-00002.safetensors"})  # half of it is there: now it fits
    assert resolve_model(REPO).is_dir()


@pytest.mark.parametrize(
    ("status", "complaint"),
    [
        (403, "accepted its terms: do so at .*/some-lab/tiny-moe"),
        (404, "has no such repository"),
        (500, "can't be rea"),
    ],
)
def test_what_the_hub_refuses_is_explained(hub, status, complaint):
    hub.status = status
    with pytest.raises(HubError, match=complaint) as error:
        resolve_model(REPO)
    assert "\n" not in str(error.value)


def test_revisions_and_repositories_that_do_not_exist(hub):
    with pytest.raises(HubError, match="has no revision 'v9'"):
        resolve_model(f"{REPO}@v9")
    with pytest.raises(HubError, match=r"some-lab/other: .* has no such repository"):
        resolve_model("some-lab/other")
    with pytest.raises(HubError, match="no valid hub id"):
        resolve_model("some--lab/bad")


def test_a_repository_that_is_no_checkpoint(hub):
    del hub.files["config.json"]
    with pytest.raises(HubError, match=r"the repository holds no config\.json"):
        resolve_model(REPO)
