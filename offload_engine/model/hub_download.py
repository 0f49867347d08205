"""Downloads from the Hugging Face hub that survive interruption. Imports huggingface_hub, an optional extra.

`huggingface_hub.snapshot_download` alone keeps whole files only: a download killed at 90 % of its shards, fetched side
by side, starts over. So the large files are first brought one after the other into the hub's cache under their final
names, resuming partial ones; `snapshot_download` then finds them there and adds the small files and the links.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from huggingface_hub import HfApi, constants, hf_hub_url, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.hf_api import ModelInfo, RepoSibling
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # star imports
    WeakFileLock,
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
    filter_repo_objects,
)

from offload_engine.config import format_bytes
from offload_engine.errors import HubError

_TIMEOUT = 10.0
"""Seconds to wait for the hub's answer about a repository."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NETWORK_ERRORS = cast(tuple[type[Exception], ...], (OSError, *HfHubHTTPError.__bases__))
"""The hub's own errors are derived from those of its HTTP library, which has changed with its versions."""


class UnavailableError(Exception):
    """The hub can't give the repository just now; the message says why."""


def cached(repo: str, revision: str | None, allow: Sequence[str], ignore: Sequence[str]) -> Path | None:
    """The snapshot of `repo` in the cache; None if it is absent or incomplete."""
    try:
        path = Path(
            snapshot_download(
                repo,
                revision=revision,
                cache_dir=constants.HF_HUB_CACHE,
                allow_patterns=list(allow),
                ignore_patterns=list(ignore),
                local_files_only=True,
            )
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return path if (path / "config.json").is_file() else None


def fetch(
    repo: str,
    revision: str | None,
    allow: Sequence[str],
    ignore: Sequence[str],
    progress: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Bring the files of `repo` that match `allow` and not `ignore` into the cache; its snapshot's directory.

    `progress` is told of the large files: "download", bytes done, bytes in all.

    Raises `UnavailableError` when the hub can't be asked or won't tell, `HubError` when what it tells can't be used,
    the disk has too little room, or a download breaks off.
    """
    info = _ask(repo, revision)
    files = list(
        filter_repo_objects(
            info.siblings or [],
            allow_patterns=list(allow),
            ignore_patterns=list(ignore),
            key=lambda file: file.rfilename,
        )
    )
    if not any(file.rfilename == "config.json" for file in files):
        raise HubError(f"{repo}: the repository holds no config.json, so it is no checkpoint of a model")
    missing = [file for file in files if _is_missing(repo, info, file)]
    blobs = Path(constants.HF_HUB_CACHE).expanduser() / repo_folder_name(repo_id=repo, repo_type="model") / "blobs"
    _require_space(repo, missing, blobs)
    large = [file for file in missing if file.lfs is not None and _SHA256.fullmatch(file.lfs.sha256)]
    try:
        with _shown_by(progress, sum(file.lfs.size for file in large if file.lfs is not None)) as count:
            for file in large:
                _fetch_blob(repo, info, file, blobs, count)
            return Path(
                snapshot_download(
                    repo,
                    revision=revision,
                    cache_dir=constants.HF_HUB_CACHE,
                    allow_patterns=list(allow),
                    ignore_patterns=list(ignore),
                )
            )
    except _NETWORK_ERRORS as error:
        raise HubError(
            f"{repo}: the download broke off ({_one_line(error)}); run the same command again to go on from there"
        ) from None


def _ask(repo: str, revision: str | None) -> ModelInfo:
    """The repository's commit and files."""
    what = f"{repo}@{revision}" if revision else repo
    try:
        return HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT)
    except HFValidationError as error:
        raise HubError(f"{what}: no such directory here, and no valid hub id either ({_one_line(error)})") from None
    except GatedRepoError:
        raise UnavailableError(
            f"the hub gives it only to those who accepted its terms: do so at {constants.ENDPOINT}/{repo}, "
            "then log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise UnavailableError(
            f"the hub ({constants.ENDPOINT}) has no such repository, or keeps it private: check the spelling, or log "
            "in with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise UnavailableError(f"the hub's repository has no revision {revision!r}") from None
    except _NETWORK_ERRORS as error:
        raise UnavailableError(f"the hub ({constants.ENDPOINT}) can't be reached ({_one_line(error)})") from None


def _is_missing(repo: str, info: ModelInfo, file: RepoSibling) -> bool:
    found = try_to_load_from_cache(repo, file.rfilename, cache_dir=constants.HF_HUB_CACHE, revision=info.sha)
    return not isinstance(found, str)


def _partial(blob: Path) -> Path:
    """The hub's own name for an unfinished blob."""
    return blob.with_name(f"{blob.name}.incomplete")


def _require_space(repo: str, missing: Sequence[RepoSibling], blobs: Path) -> None:
    """Refuse a download that the disk has no room for."""
    needed = 0
    for file in missing:
        blob = blobs / (file.lfs.sha256 if file.lfs is not None else str(file.blob_id))
        there = next((path.stat().st_size for path in (blob, _partial(blob)) if path.is_file()), 0)
        needed += max(0, (file.size or 0) - there)
    disk = next(place for place in (blobs, *blobs.parents) if place.exists())
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise HubError(
            f"{repo}: {format_bytes(needed, round_up=True)} are still to be downloaded, but the disk of the hub's "
            f"cache ({constants.HF_HUB_CACHE}) has {format_bytes(free)} free; make room, or set HF_HOME to another disk"
        )


Count = Callable[[int], None]
"""Told how many more bytes are there; fewer than 0 where some were thrown away."""


@contextmanager
def _shown_by(progress: Callable[[str, int, int], None] | None, total: int) -> Iterator[Count]:
    """Tells `progress` what is counted, and keeps the hub's own bars away meanwhile; None: they stay."""
    if progress is None or not total:
        yield lambda _count: None
        return
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        progress("download", done, total)

    silent = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield count
    finally:
        if not silent:
            enable_progress_bars()


class _Counted:
    """A file that tells how far it has been written: as much of one as `http_get` uses."""

    def __init__(self, file: BinaryIO, count: Count) -> None:
        self._file, self._count = file, count
        self.seek, self.tell = file.seek, file.tell

    def write(self, data: bytes) -> int:
        written = self._file.write(data)
        self._count(written)
        return written

    def truncate(self) -> int:
        """Throw away what is behind the current position, for the server would not go on from there."""
        place = self._file.tell()
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(place)
        self._count(place - size)
        return self._file.truncate()


def _fetch_blob(repo: str, info: ModelInfo, file: RepoSibling, blobs: Path, count: Count) -> None:
    """Download one large file into the cache, going on where an earlier attempt stopped."""
    assert file.lfs is not None
    blob = blobs / file.lfs.sha256
    blobs.mkdir(parents=True, exist_ok=True)
    lock = blobs.parent.parent / ".locks" / blobs.parent.name / f"{blob.name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):  # the hub's own lock of this file
        if blob.exists():
            count(file.lfs.size)
            return
        partial = _partial(blob)
        with partial.open("ab") as target:
            if target.tell() > file.lfs.size:
                target.truncate(0)
                target.seek(0)
            count(target.tell())
            http_get(
                hf_hub_url(repo, file.rfilename, revision=info.sha),
                cast(BinaryIO, _Counted(target, count)),
                resume_size=target.tell(),
                headers=build_hf_headers(library_name="offload_engine"),
                expected_size=file.lfs.size,
                displayed_filename=file.rfilename,
            )
        with partial.open("rb") as source:
            digest = hashlib.file_digest(source, "sha256").hexdigest()
        if digest != file.lfs.sha256:
            partial.unlink()
            raise HubError(
                f"{repo}: {file.rfilename} arrived damaged (sha256 {digest[:12]}…, wanted {file.lfs.sha256[:12]}…) and "
                "was removed; run the same command again"
            )
        partial.replace(blob)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}…"
