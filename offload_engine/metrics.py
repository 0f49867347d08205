"""What the engine counts and times, and the peak of its memory. Torch-free; a GPU's peak is the driver's to report."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from offload_engine.config import format_bytes
from offload_engine.core import Phase

GAUGES = frozenset(
    {
        "planned_peak_bytes",
        "measured_peak_bytes",
        "limit_bytes",
        "slots",
        "slots_per_layer",
        "lanes_together",
        "copy_seconds",
        "cpu_expert_seconds",
    }
)
"""Fields that say how things stand; all others only grow."""

_DERIVED = (
    "hit_rate",
    "cpu_share",
    "unique_experts",
    "forward_seconds",
    "stall_share",
    "tokens_per_second",
    "tokens_per_step",
)


@dataclass(slots=True)
class EngineStats:
    """Counters of one engine, or, as a difference of two snapshots, of one stretch of its work.

    Updated in place: by the thread that runs the engine and, for transfers, by those that carry them out, under the
    executor's lock. A derived value is None where nothing it could be derived from was counted.
    """

    prompts: int = 0
    prompt_tokens: int = 0
    prompt_tokens_reused: int = 0
    """Of these, the ones whose keys and values an earlier request left: nothing was computed for them."""
    new_tokens: int = 0
    """Answer tokens, the eos included."""
    blocks: int = 0
    """Blocks finished."""
    denoise_steps: int = 0
    """Denoising steps summed over prompts; a forward that steps several prompts at once counts once for each."""
    forwards: dict[Phase, int] = field(default_factory=dict)
    """Forwards run, by phase."""

    expert_requests: int = 0
    """Distinct experts wanted, summed over runs of MoE layers."""
    hits: int = 0
    """Requests whose expert was in fast memory when its layer's routing became known."""
    late: int = 0
    """Requests whose expert was on its way then, ordered by a prediction."""
    misses: int = 0
    """Requests whose transfer began only then, or was under way unpredicted, to fill a free slot (`warmed`)."""
    computed_on_cpu: int = 0
    """Requests whose expert was not in fast memory and was computed from host memory, by the CPU beside a GPU."""
    loads: int = 0
    """Transfers of experts into fast memory that were completed, predicted ones included."""
    prefetches_issued: int = 0
    prefetches_used: int = 0
    prefetches_wasted: int = 0
    """Prefetched experts that were evicted before any layer asked for them."""
    warmed: int = 0
    """Transfers that filled free slots with what earlier runs used most; no prefetches, used or wasted."""
    evictions: int = 0
    bytes_moved: int = 0
    """Bytes of experts brought into fast memory."""
    bytes_read: int = 0
    """Bytes read from disk for experts, alignment included."""

    unique_experts_sum: int = 0
    """Distinct experts of one block in one MoE layer, summed over layers and denoising forwards (REFERENCE §3)."""
    unique_experts_count: int = 0
    unique_experts_by_layer: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Layer -> (sum, count) of the same."""

    wall_seconds: float = 0.0
    prefill_seconds: float = 0.0
    denoise_seconds: float = 0.0
    commit_seconds: float = 0.0
    score_seconds: float = 0.0
    stall_seconds: float = 0.0
    """Time in which compute waited for transfers, on a GPU by its own clock, or for experts that the CPU computes
    beside it; part of the seconds of the phases."""

    planned_peak_bytes: int = 0
    measured_peak_bytes: int = 0
    limit_bytes: int = 0
    """The budget for fast memory."""
    slots: int = 0
    """Expert slots in fast memory."""
    slots_per_layer: float = 0.0
    lanes_together: int = 0
    """Sequences that share forwards, at most, of those answered at the same time: as many as the cache serves."""

    copy_seconds: float = 0.0
    """Of one expert to the device, by the last copies; known where the CPU takes a share (`cpu_experts` auto)."""
    cpu_expert_seconds: float = 0.0
    """Of one expert on the CPU, each of its tokens to come on top, by the last layers; likewise."""

    def count_unique(self, layer: int, distinct: int) -> None:
        """In a denoising forward one block chose `distinct` experts in `layer`; not for prefill and commit."""
        self.unique_experts_sum += distinct
        self.unique_experts_count += 1
        total, count = self.unique_experts_by_layer.get(layer, (0, 0))
        self.unique_experts_by_layer[layer] = (total + distinct, count + 1)

    @contextmanager
    def phase(self, name: Phase | str) -> Iterator[None]:
        """Add the body's duration to `{name}_seconds`, also when it raises.

        `name` is a `Phase`, or one of "wall", "stall".
        """
        counter = f"{name}_seconds"
        getattr(self, counter)  # a name nobody counts fails here, not after the work is done
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, counter, getattr(self, counter) + time.perf_counter() - start)

    def snapshot(self) -> EngineStats:
        """A copy that further counting leaves alone."""
        return replace(self, forwards=dict(self.forwards), unique_experts_by_layer=dict(self.unique_experts_by_layer))

    def since(self, earlier: EngineStats) -> EngineStats:
        """What was counted after the snapshot `earlier` was taken; peaks, limit and slots stay as they are now."""
        values: dict[str, Any] = {}
        for item in fields(self):
            now, then = getattr(self, item.name), getattr(earlier, item.name)
            if isinstance(now, dict):
                values[item.name] = _difference(now, then)
            else:
                values[item.name] = now if item.name in GAUGES else now - then
        return EngineStats(**values)

    @property
    def hit_rate(self) -> float | None:
        """Share of requests that hit."""
        return _ratio(self.hits, self.hits + self.late + self.misses + self.computed_on_cpu)

    @property
    def cpu_share(self) -> float | None:
        """Share of the requests that found nothing, nor anything on its way, that the CPU computed."""
        return _ratio(self.computed_on_cpu, self.misses + self.computed_on_cpu)

    @property
    def unique_experts(self) -> float | None:
        """Distinct experts per block and MoE layer, mean over layers and denoising forwards (REFERENCE §3)."""
        return _ratio(self.unique_experts_sum, self.unique_experts_count)

    @property
    def forward_seconds(self) -> float:
        """Time spent in forwards of all phases."""
        return self.prefill_seconds + self.denoise_seconds + self.commit_seconds + self.score_seconds

    @property
    def stall_share(self) -> float | None:
        """Share of the forwards' time in which compute waited for transfers."""
        return _ratio(self.stall_seconds, self.forward_seconds)

    @property
    def tokens_per_second(self) -> float | None:
        """New tokens over wall time."""
        return _ratio(self.new_tokens, self.wall_seconds)

    @property
    def tokens_per_step(self) -> float | None:
        """New tokens per denoising step."""
        return _ratio(self.new_tokens, self.denoise_steps)

    def as_dict(self) -> dict[str, Any]:
        """Every counter and derived value, ready for `json.dumps`; per layer the mean of unique experts."""
        values: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        values["forwards"] = {str(phase): self.forwards.get(phase, 0) for phase in Phase}
        values["unique_experts_by_layer"] = {
            str(layer): total / count for layer, (total, count) in sorted(self.unique_experts_by_layer.items())
        }
        return values | {name: getattr(self, name) for name in _DERIVED}

    def summary_line(self) -> str:
        """The run in one line; what was not measured reads n/a."""
        measured = format_bytes(self.measured_peak_bytes) if self.measured_peak_bytes else "n/a"
        peak = f"peak {measured} of {format_bytes(self.planned_peak_bytes)} planned"
        if self.limit_bytes:
            peak += f" (limit {format_bytes(self.limit_bytes)})"
        return ", ".join(
            (
                f"{_number(self.tokens_per_second)} tokens/s",
                f"{self.denoise_steps} steps ({_number(self.tokens_per_step)} tokens each)",
                f"{_number(self.unique_experts)} unique experts per layer",
                f"hit rate {_percent(self.hit_rate)}",
                f"{format_bytes(self.bytes_moved)} moved",
                f"stalled {_percent(self.stall_share)}",
                peak,
            )
        )


def measure_peak() -> int:
    """Bytes of the process's largest resident set since it started or since `reset_peak`; mapped files are in it."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return _peak_elsewhere()


def _peak_elsewhere() -> int:
    """`measure_peak` where /proc doesn't tell."""
    try:
        import resource
    except ImportError:
        import psutil

        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))  # peak_wset is Windows' name for it
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak() -> bool:
    """Let `measure_peak` start over from the present resident set; False where the system has no such thing."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _difference(now: dict[Any, Any], then: dict[Any, Any]) -> dict[Any, Any]:
    """What was added per key; a value is a number or a tuple of numbers."""
    changed = {key: value for key, value in now.items() if value != then.get(key)}
    return {
        key: tuple(a - b for a, b in zip(value, then.get(key, (0,) * len(value)), strict=True))
        if isinstance(value, tuple)
        else value - then.get(key, 0)
        for key, value in changed.items()
    }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1f}"


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{value * 100:.1f} %"
