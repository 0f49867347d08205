"""Shows what a GPU's streams do while an engine answers: copies of experts beside attention and the experts' products.

    python -m tools.gpu_timeline
    python -m tools.gpu_timeline --model DIR --gpu-mem 8GB --routing dmoe --blocks 4 --json

Every copy, every launch of experts, attention of every layer, every stall and every denoising forward is enclosed in
two events of the device itself, and told in its own milliseconds: how long copies ran, for how much of that attention,
or anything, was computed, for how long computing stood still until an expert was there, and a drawing of the last
forward. Needs a GPU. Prefills are left out; attention is launched kernel by kernel, never from a CUDA graph.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple
from unittest.mock import patch

import click
import torch

from offload_engine.cli.errors import ReportingCommand
from offload_engine.core import SamplingParams
from offload_engine.engine.engine import Engine
from offload_engine.errors import DeviceError, InternalError
from offload_engine.experts.transfer.base import Stream
from offload_engine.model.attention import Attention

BLOCK = 32
COLUMNS = 96
KINDS = ("copy", "attention", "experts", "stall")
FORWARD = "forward"


class Stretch(NamedTuple):
    """Something a stream did, in milliseconds of the device."""

    kind: str
    began: float
    ended: float
    nbytes: int = 0


Span = tuple[float, float]


def union(stretches: Iterable[Stretch]) -> list[Span]:
    """The times covered, in order, without overlap."""
    spans: list[Span] = []
    for began, ended in sorted((one.began, one.ended) for one in stretches):
        if spans and began <= spans[-1][1]:
            spans[-1] = spans[-1][0], max(spans[-1][1], ended)
        else:
            spans.append((began, ended))
    return spans


def length(spans: Iterable[Span]) -> float:
    """Milliseconds in all."""
    return sum(ended - began for began, ended in spans)


def common(one: Sequence[Span], other: Sequence[Span]) -> list[Span]:
    """The times that two unions share."""
    shared, first, second = [], 0, 0
    while first < len(one) and second < len(other):
        began, ended = max(one[first][0], other[second][0]), min(one[first][1], other[second][1])
        if began < ended:
            shared.append((began, ended))
        if one[first][1] < other[second][1]:
            first += 1
        else:
            second += 1
    return shared


@dataclass(frozen=True, slots=True)
class Summary:
    """What came of it, from the beginning of the first forward to the end of the last."""

    forwards: int
    wall_ms: float
    copies: int
    copied_bytes: int
    copy_ms: float
    """Time in which a copy ran."""
    attention_ms: float
    experts_ms: float
    copy_beside_attention_ms: float
    """Of `copy_ms`, how much attention ran meanwhile."""
    copy_beside_compute_ms: float
    """Likewise, attention or experts."""
    stall_ms: float
    """Time in which computing stood still until an expert was there: what `EngineStats.stall_seconds` counts."""

    @property
    def gigabytes_per_second(self) -> float | None:
        """Of the copies; None where there were none."""
        return self.copied_bytes / self.copy_ms / 1e6 if self.copy_ms else None

    def lines(self) -> Iterator[str]:
        """For people."""
        yield f"{self.forwards} forwards in {self.wall_ms:.1f} ms on the device"
        speed = self.gigabytes_per_second
        rate = "" if speed is None else f", {speed:.1f} GB/s"
        yield f"{self.copies} copies, {self.copied_bytes / 1e6:.1f} MB in {self.copy_ms:.1f} ms{rate}"
        for name, value in (("attention", self.copy_beside_attention_ms), ("compute", self.copy_beside_compute_ms)):
            share = f"{value / self.copy_ms:.0%} of the copies' time" if self.copy_ms else "there was nothing to hide"
            yield f"beside {name}: {value:.1f} ms, {share}"
        stalled = f"{self.stall_ms:.1f} ms, {self.stall_ms / self.wall_ms:.0%} of the time" if self.wall_ms else "none"
        yield f"attention {self.attention_ms:.1f} ms, experts {self.experts_ms:.1f} ms; stalled {stalled}"


def summarise(stretches: Sequence[Stretch]) -> Summary:
    """Raises InternalError where no forward was recorded."""
    forwards = [one for one in stretches if one.kind == FORWARD]
    if not forwards:
        raise InternalError("no forward was recorded: nothing can be said of the streams")
    window = (min(one.began for one in forwards), max(one.ended for one in forwards))
    copies = [one for one in stretches if one.kind == "copy" and window[0] <= one.began < window[1]]
    of = {kind: common(union(one for one in stretches if one.kind == kind), [window]) for kind in KINDS}
    compute = union(one for one in stretches if one.kind in ("attention", "experts"))
    return Summary(
        forwards=len(forwards),
        wall_ms=window[1] - window[0],
        copies=len(copies),
        copied_bytes=sum(one.nbytes for one in copies),
        copy_ms=length(of["copy"]),
        attention_ms=length(of["attention"]),
        experts_ms=length(of["experts"]),
        copy_beside_attention_ms=length(common(of["copy"], of["attention"])),
        copy_beside_compute_ms=length(common(of["copy"], compute)),
        stall_ms=length(of["stall"]),
    )


def drawing(stretches: Sequence[Stretch], columns: int = COLUMNS) -> list[str]:
    """The last forward, a row for each kind: # where it filled at least half a column's time, + where it was at all."""
    last = max((one for one in stretches if one.kind == FORWARD), key=lambda one: one.began)
    step = (last.ended - last.began) / columns
    rows = []
    for kind in KINDS:
        spans = union(one for one in stretches if one.kind == kind)
        cells = ""
        for column in range(columns):
            cell = (last.began + column * step, last.began + (column + 1) * step)
            share = length(common(spans, [cell])) / step if step else 0.0
            cells += "#" if share >= 0.5 else "+" if share > 0 else "."
        rows.append(f"{kind:>9} {cells}")
    return rows


class Recorder:
    """Encloses what is enqueued in pairs of events; `event()` makes one, as `torch.cuda.Event(enable_timing=True)`."""

    def __init__(self, event: Callable[[], Any]) -> None:
        self._event = event
        self._origin: Any = None
        self._pairs: list[tuple[str, int, Any, Any]] = []

    def begin(self, stream: Any) -> None:
        """Times count from here on."""
        self._origin = self.mark(stream)

    @contextmanager
    def around(self, kind: str, stream: Any, nbytes: int = 0) -> Iterator[None]:
        """What the body enqueues on `stream` is of this kind."""
        start = self.mark(stream)
        try:
            yield
        finally:
            self.between(kind, start, stream, nbytes)

    def mark(self, stream: Any) -> Any:
        """Mark where `stream` is now: something may begin here."""
        moment = self._event()
        moment.record(stream)
        return moment

    def between(self, kind: str, start: Any, stream: Any, nbytes: int = 0) -> None:
        """What `stream` did from the moment `start` on was of this kind."""
        self._pairs.append((kind, nbytes, start, self.mark(stream)))

    def stretches(self) -> list[Stretch]:
        """Once the device has done all of it."""
        since = self._origin.elapsed_time
        return [Stretch(kind, since(start), since(end), nbytes) for kind, nbytes, start, end in self._pairs]


@contextmanager
def watched(transfers: Any, model: Any, recorder: Recorder) -> Iterator[None]:
    """Record what `transfers` (`CudaTransfers`) ask of their driver, and the attention and forwards of `model`."""
    driver = transfers.driver
    copy, launch, compute = driver.copy, driver.launch, driver.stream(Stream.COMPUTE)

    def recorded_copy(stream: Stream, source: Any, target: Any) -> None:
        if stream is not Stream.COPY:  # a few kilobytes beside a layer's work, no expert
            copy(stream, source, target)
            return
        with recorder.around("copy", driver.stream(stream), target.nbytes):
            copy(stream, source, target)

    def recorded_launch(stream: Stream, *work: Any) -> None:
        with recorder.around("experts", driver.stream(stream)):
            launch(stream, *work)

    with ExitStack() as undo:
        undo.enter_context(patch.object(driver, "copy", recorded_copy))
        undo.enter_context(patch.object(driver, "launch", recorded_launch))
        undo.enter_context(_stalls_watched(transfers.stalls, recorder, compute))
        for module in model.modules():
            if isinstance(module, Attention):
                undo.enter_context(_hooked(module, lambda: recorder.around("attention", compute)))
        undo.enter_context(_hooked(model, lambda: recorder.around(FORWARD, compute)))
        recorder.begin(compute)
        yield


@contextmanager
def _stalls_watched(stalls: Any, recorder: Recorder, compute: Any) -> Iterator[None]:
    """Record what `stalls` (`DeviceStalls`) measure."""
    begin, end, forget = stalls.begin, stalls.end, stalls.forget
    began: list[Any] = []

    def recorded_begin() -> None:
        begin()
        if not began:
            began.append(recorder.mark(compute))

    def recorded_end() -> None:
        end()
        if began:
            recorder.between("stall", began.pop(), compute)

    def recorded_forget() -> None:
        forget()
        began.clear()

    with (
        patch.object(stalls, "begin", recorded_begin),
        patch.object(stalls, "end", recorded_end),
        patch.object(stalls, "forget", recorded_forget),
    ):
        yield


@contextmanager
def _hooked(module: Any, around: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Have every call of `module` happen within `around()`."""
    entered: list[AbstractContextManager[None]] = []

    def before(*_call: Any) -> None:
        entered.append(around())
        entered[-1].__enter__()

    def after(*_call: Any) -> None:
        entered.pop().__exit__(None, None, None)

    handles = module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def measure(engine: Engine, blocks: int, prompt_tokens: int) -> list[Stretch]:
    """Answer a random prompt, once to warm up and once watched. Raises `DeviceError` where the engine is on the CPU."""
    transfers = engine._parts.experts.transfers
    driver = getattr(transfers, "driver", None)
    if driver is None or driver.device.type != "cuda":
        raise DeviceError("the engine runs on the CPU, which has no streams to watch; a timeline needs device cuda")
    ordinary = min(engine.mask_token_id or BLOCK, engine.eos_token_id or BLOCK)
    prompt = torch.randint(0, ordinary, (prompt_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    params = SamplingParams(max_new_tokens=blocks * BLOCK)
    recorder = Recorder(lambda: torch.cuda.Event(enable_timing=True))
    with patch.object(engine._decoder, "graphs", None):  # nothing can be told apart within a graph
        engine.generate(prompt, params)
        with watched(transfers, engine._parts.model, recorder):
            engine.generate(prompt, params)
            driver.finish()
    return recorder.stretches()


@click.command(cls=ReportingCommand, help=(__doc__ or "").replace("    python", "\b\n    python", 1))
@click.option("--model", metavar="DIR", help="Checkpoint.  [default: the built-in model]")
@click.option("--device", default="cuda", show_default=True)
@click.option("--gpu-mem", default="auto", show_default=True, metavar="SIZE")
@click.option("--expert-mem", metavar="SIZE", help="Cap on the expert slots.")
@click.option("--routing", help="Instead of the checkpoint's own.")
@click.option("--blocks", type=click.IntRange(min=1), default=2, show_default=True, help="Of the answer.")
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One object instead of lines.")
def main(blocks: int, prompt_tokens: int, as_json: bool, **options: str | None) -> None:
    """See the module."""
    with Engine.from_pretrained(**{name: value for name, value in options.items() if value is not None}) as engine:
        stretches = measure(engine, blocks, prompt_tokens)
    summary = summarise(stretches)
    if as_json:
        print(json.dumps(asdict(summary) | {"gigabytes_per_second": summary.gigabytes_per_second}))
        return
    for line in (*summary.lines(), "the last forward:", *drawing(stretches)):
        print(line)


if __name__ == "__main__":
    main()
