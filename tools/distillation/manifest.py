"""The manifest of a dataset: what made it, what is in it, and whether it is complete."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import offload_engine
from offload_engine.config import brief
from offload_engine.errors import UsageError
from tools.distillation.shards import WORK, Receipt, write_aside

MANIFEST = "manifest.json"
FORMAT = 1

Settings = Mapping[str, Any]
"""Everything that decides about a dataset's bytes, as nested JSON objects."""

OPTIONS = {
    "model.fingerprint": "--model",
    "routing.name": "--routing",
    "sampling.top_p": "--sample-top-p",
}
"""Settings whose option isn't called like them."""

_MOVABLE = ("model", "prompts")
"""Groups of settings whose names may differ between runs that make the same dataset: they are told by their hashes."""


def write_manifest(directory: Path, settings: Settings, receipts: Sequence[Receipt], *, complete: bool) -> None:
    """Put the manifest in place in one step."""
    manifest = {
        "format": FORMAT,
        "tool_version": offload_engine.__version__,
        "complete": complete,
        **settings,
        "counts": counts_of(receipts),
        "shards": [asdict(receipt) for receipt in receipts],
    }
    write_aside(directory, MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False).encode() + b"\n")


def counts_of(receipts: Sequence[Receipt]) -> dict[str, Any]:
    """Prompts, kept, and dropped by reason, summed over shards."""
    dropped: Counter[str] = Counter()
    for receipt in receipts:
        dropped.update(receipt.dropped)
    return {
        "prompts": sum(receipt.prompts for receipt in receipts),
        "kept": sum(receipt.kept for receipt in receipts),
        "dropped": dict(sorted(dropped.items())),
    }


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a dataset begun in `directory`; None where there is none yet.

    Raises `UsageError` where the directory holds something else, or a manifest this program can't read.
    """
    path = directory / MANIFEST
    try:
        manifest: Any = json.loads(path.read_bytes())
    except FileNotFoundError:
        strange = next((one.name for one in sorted(directory.iterdir()) if one.name != WORK), None)
        strange = strange or next((f"{WORK}/{one.name}" for one in (directory / WORK).glob("shard-*")), None)
        if strange is None:
            return None
        raise UsageError(f"{directory}: holds {strange!r} but no {MANIFEST}; choose an empty --out") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: can't be read ({error}); choose another --out") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise UsageError(f"{path}: format is {brief(found)}, this program reads {FORMAT}; choose another --out")
    return dict(manifest)


def refuse_other_settings(directory: Path, manifest: Mapping[str, Any], settings: Settings) -> None:
    """Raises `UsageError` that names the first setting in which a dataset begun earlier differs from `settings`."""
    wanted, begun = dict(_flat(settings)), dict(_flat({key: manifest.get(key) for key in settings}))
    for name in (*wanted, *begun):
        moved = name.startswith(_MOVABLE) and name.endswith(".name")
        if moved or wanted.get(name) == begun.get(name):
            continue
        raise UsageError(
            f"{directory}: begun with {name} = {brief(begun.get(name))}, but now it is {brief(wanted.get(name))}; "
            f"give {_option(name)} as before, or another --out for a new dataset"
        )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything that is no object."""
    for key, value in settings.items():
        if isinstance(value, list) and all(isinstance(one, Mapping) for one in value):
            value = {str(place): one for place, one in enumerate(value)}
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _option(name: str) -> str:
    group, _, key = name.rpartition(".")
    if group.startswith("prompts") and key != "field":
        return "--prompts"
    if group == "routing" and key != "name":
        return "the routing's options"
    return OPTIONS.get(name) or f"--{key.replace('_', '-')}"
