"""What a user calls a model, a directory or a hub id, made into a checkpoint directory on this machine."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from offload_engine.errors import CheckpointError, HubError

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@(?P<revision>[^\s@]+))?", re.ASCII)

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done and how much there is, in bytes."""

FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "*.safetensors",
    "*.safetensors.index.json",
    "*.packed",
)
"""What is fetched of a repository: data only, never code."""
NOT_FILES = ("*/*",)
"""Subdirectories hold other formats of the same weights."""


def resolve_model(
    model: str, *, offline: bool | None = None, files: Sequence[str] = FILES, progress: Progress | None = None
) -> Path:
    """The directory of the checkpoint that `model` names.

    A directory is taken as it is. `owner/name`, or `owner/name@revision`, is fetched from the Hugging Face hub into
    its usual cache unless it is there; a download that was interrupted goes on where it stopped. `progress` is told
    "download", the bytes that are there and the bytes in all; where there is none, the hub's library shows its own on
    stderr. Only `files`, names or patterns, are fetched. `offline` (by default, whether HF_HUB_OFFLINE is set)
    restricts the search to that cache, which also serves when the hub can't be reached.

    Raises `CheckpointError` for a path that holds no checkpoint, `HubError` for an id that can't be had.
    """
    path = Path(model).expanduser()
    try:
        exists = path.exists()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model!r}: can't be looked up as a model directory ({error})") from None
    if exists:
        return _checked_directory(path)
    named = _HUB_ID.fullmatch(model)
    if named is None:
        raise CheckpointError(
            f"{model}: no such model directory (and no hub id, which looks like owner/name or owner/name@revision)"
        )
    return _from_hub(named["repo"], named["revision"], offline, files, progress)


def _checked_directory(path: Path) -> Path:
    if not path.is_dir():
        raise CheckpointError(f"{path}: is a file, wanted a checkpoint directory with config.json and *.safetensors")
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: holds no config.json, so it is no checkpoint directory; is it one level off?")
    return path


def _from_hub(
    repo: str, revision: str | None, offline: bool | None, files: Sequence[str], progress: Progress | None
) -> Path:
    try:
        import huggingface_hub

        from offload_engine.model import hub_download
    except ImportError:
        raise HubError(
            f"{repo}: no such directory here, and fetching it from the hub needs huggingface_hub; "
            "pip install 'offload-engine[hub]', or name a checkpoint directory"
        ) from None
    what = f"{repo}@{revision}" if revision else repo
    if offline is None:
        offline = bool(huggingface_hub.constants.HF_HUB_OFFLINE)
    reason = "offline mode is on" if offline else None
    if reason is None:
        try:
            return hub_download.fetch(repo, revision, files, NOT_FILES, progress)
        except hub_download.UnavailableError as error:
            reason = str(error)
    path = hub_download.cached(repo, revision, files, NOT_FILES)
    if path is None:
        place = huggingface_hub.constants.HF_HUB_CACHE
        raise HubError(f"{what}: no such directory here, no whole copy in the hub's cache ({place}), and {reason}")
    if not offline:
        logger.warning("%s: using the copy in the hub's cache, as %s", what, reason)
    return path
