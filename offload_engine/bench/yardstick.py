"""What is the same for every contender, whatever decodes: the prompt, the digest of an answer, the bytes from disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from offload_engine.bench.spec import Task, Workload
from offload_engine.errors import OffloadError

SPECIAL_IDS = 8
"""Ids before the mask, the mask left out, that no prompt has: those that end one are among them."""


def prompt_ids(mask_token_id: int | None, vocab_size: int, workload: Workload) -> list[int]:
    """Token ids that depend on the seed and the vocabulary alone; the special ids, which end it, are left out."""
    ordinary = max(1, (mask_token_id or vocab_size) - SPECIAL_IDS)
    generator = torch.Generator().manual_seed(workload.seed)
    ids: list[int] = torch.randint(0, ordinary, (workload.prompt_tokens,), generator=generator).tolist()
    return ids


def digest(token_ids: Sequence[int]) -> str:
    """Of an answer: equal for equal token ids."""
    return hashlib.sha256(repr(list(token_ids)).encode()).hexdigest()[:16]


def out_of_patience(task: Task) -> OffloadError:
    """What ends a contender of which nothing could be measured in time."""
    return OffloadError(f"{task.name}: the warm-up took longer than the {task.patience:.0f} s of --patience")


def disk_bytes() -> int | None:
    """What this process had the kernel fetch from disk so far; None where it doesn't say."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = {name: int(count) for name, _, count in (line.partition(": ") for line in lines)}
    return found.get("read_bytes")
