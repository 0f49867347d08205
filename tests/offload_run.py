"""One answer in a process of its own, watched at every load: `python -m tests.offload_run '{...}'` prints a report.

In: `engine`, the keywords of `Engine.from_pretrained`; `prompt_tokens`, the length of a random prompt; `params`, the
fields of `SamplingParams`. Out: the fields of `Report`, as JSON.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


@dataclass
class Watched:
    """What was seen at the store, beneath everything that counts."""

    loads: int = 0
    bytes_read: int = 0
    """As the store returned them."""
    bytes_asked: int = 0
    """By `read_bytes` of each expert loaded."""
    most_taken: int = 0
    """Slots loading or resident at once."""
    places: int = 0
    """Distinct addresses that were written to."""


@dataclass
class Report:
    token_ids: list[int]
    plan: dict[str, Any]
    stats: dict[str, Any]
    peak: int
    watched: Watched
    direct: bool
    disk_bytes: int | None
    """Bytes the kernel says it fetched from disk while answering; None where it doesn't say."""
    step_seconds: list[float] = field(default_factory=list)

    @classmethod
    def parse(cls, text: str) -> Report:
        values = json.loads(text)
        return cls(**values | {"watched": Watched(**values["watched"])})


def command(engine: dict[str, Any], prompt_tokens: int, **params: Any) -> list[str]:
    task = {"engine": engine, "prompt_tokens": prompt_tokens, "params": params}
    return [sys.executable, "-m", "tests.offload_run", json.dumps(task)]


def run(engine: dict[str, Any], prompt_tokens: int, **params: Any) -> Report:
    """Run it in a process without a limit."""
    ran = subprocess.run(
        command(engine, prompt_tokens, **params), cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=300
    )
    return Report.parse(ran.stdout)


def disk_bytes() -> int | None:
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def watch(engine: Any) -> Watched:
    """Look at every load of the engine's store as it happens, from the thread that carries it out."""
    experts, store = engine._parts.experts, engine._parts.store
    watched, places, lock = Watched(), set(), threading.Lock()
    read = store.read

    def watched_read(key: Any, slab: memoryview) -> int:
        occupancy = experts.occupancy()
        with experts._changed:
            experts.scheduler.cache.check()
        count = read(key, slab)
        with lock:
            places.add(ctypes.addressof(ctypes.c_char.from_buffer(slab)))
            watched.loads += 1
            watched.bytes_read += count
            watched.bytes_asked += store.read_bytes(key)
            watched.most_taken = max(watched.most_taken, occupancy.loading + occupancy.resident)
            watched.places = len(places)
        return int(count)

    store.read = watched_read
    return watched


def main() -> None:
    import torch

    from offload_engine.core import SamplingParams
    from offload_engine.engine.engine import Engine
    from offload_engine.metrics import measure_peak

    task = json.loads(sys.argv[1])
    with Engine.from_pretrained(**task["engine"]) as engine:
        ordinary = min(engine.mask_token_id, engine.eos_token_id)  # the special ids end the vocabulary
        prompt = torch.randint(0, ordinary, (task["prompt_tokens"],), generator=torch.Generator().manual_seed(0))
        watched, before, seconds, began = watch(engine), disk_bytes(), [], time.perf_counter()
        for event in engine.stream(prompt.tolist(), SamplingParams(**task["params"])):
            if event.kind == "step":
                seconds.append(time.perf_counter() - began)
            began = time.perf_counter()
        engine._parts.experts.idle()
        after = disk_bytes()
        assert event.completion is not None
        report = Report(
            token_ids=list(event.completion.token_ids),
            plan=engine.plan.as_dict(),
            stats=engine.stats.as_dict(),
            peak=measure_peak(),
            watched=watched,
            direct=engine._parts.store.direct,
            disk_bytes=None if before is None or after is None else after - before,
            step_seconds=seconds,
        )
    sys.stdout.write(json.dumps(asdict(report)))


if __name__ == "__main__":
    main()
