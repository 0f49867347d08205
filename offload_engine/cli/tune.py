"""`dmoe tune`: the options that a budget is best spent with, from traces and a virtual clock."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from offload_engine.assembly import native_routing, routing_options
from offload_engine.cli.plan import Described, describe, device_kind, make_plan, plan_dtype
from offload_engine.cli.terminal import Output, note
from offload_engine.config import EngineConfig, load_config
from offload_engine.errors import OffloadError, UsageError
from offload_engine.files import write_aside
from offload_engine.memory import MemoryPlan
from offload_engine.simulate.replay import Costs
from offload_engine.trace import TraceHeader, TraceRecord, read_trace
from offload_engine.tune import search
from offload_engine.tune.costs import Rates, Work, costs_of, read_rates
from offload_engine.tune.report import Found, config_text, table
from offload_engine.tune.routing import Routing, Settings, as_coresets, experts_per_layer, kept_share, steps_of
from offload_engine.tune.trial import Knobs, play

ORIGINAL = "original"
"""The routing under which every expert's votes are recorded."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is searched, and where it goes."""

    traces: tuple[Path, ...]
    """None: a short run records some."""
    profile: Path | None
    """The machine's rates; None: they are measured."""
    top_ps: tuple[float, ...]
    """dMoE's shares of the votes to try on a trace of original routing."""
    holds: tuple[int, ...]
    least_kept: float | None
    out: Path
    plot: Path | None
    as_json: bool


@dataclass(frozen=True, slots=True)
class Recorded:
    """Traces of one model."""

    headers: list[TraceHeader]
    records: list[tuple[TraceRecord, ...]]

    @property
    def header(self) -> TraceHeader:
        """Of the first; in what a search needs they are all the same."""
        return self.headers[0]


def tune(config: EngineConfig, request: Request) -> None:
    """Search, print, and write the config. Raises `OffloadError`s."""
    model = describe(config.model)
    recorded = _recorded(config, request.traces)
    _check_model(model, recorded.header, request.traces)
    device = device_kind(config.device)
    plan = make_plan(config, model, device, plan_dtype(config, model, device))
    rates, machine = _rates(config, request.profile)
    found = _search(
        request, _routings(config, model, recorded, request), plan, _work(model, plan, recorded.header), rates
    )
    found = replace(found, source=f"{_told(recorded)}, {machine}")
    if config.gpu_mem == "auto":  # nobody said how much: as much as makes a difference
        point, budget = found.smallest, found.smallest.budget.nbytes
    else:
        point, budget = found.chosen, config.gpu_mem
    _write_config(request.out, config_text(found, _asked(config), point, budget))
    output = Output()
    output.line(json.dumps(found.as_dict()) if request.as_json else f"{table(found)}\nwritten   {request.out}")
    if request.plot is not None:
        _plot(found, request.plot)


def _recorded(config: EngineConfig, traces: Sequence[Path]) -> Recorded:
    """The traces given, or those of a short run."""
    if traces:
        return _read(traces)
    from offload_engine.tune.calibration import record

    note("recording how the model routes: a few short answers")
    with tempfile.TemporaryDirectory(prefix="dmoe-tune-") as directory:
        return _read(record(config, Path(directory)))


def _read(traces: Sequence[Path]) -> Recorded:
    found = Recorded([], [])
    for path in traces:
        header, records = read_trace(path)
        found.headers.append(header)
        found.records.append(tuple(records))
        if steps_of(found.records[-1]) == 0:
            raise UsageError(f"{path}: holds no denoising step, so there is nothing to replay; record a longer answer")
        for name in ("layers", "num_experts", "top_k", "expert_bytes", "block_length"):
            first, other = getattr(found.header, name), getattr(header, name)
            if first != other:
                raise UsageError(f"{path}: has {name} {other}, but {traces[0]} {first}; tune one model at a time")
    return found


def _check_model(model: Described, header: TraceHeader, traces: Sequence[Path]) -> None:
    there = (tuple(model.config.moe_layers), model.config.num_experts)
    if (header.layers, header.num_experts) != there:
        raise UsageError(
            f"{traces[0]}: was recorded from {header.model or 'a model'} with {len(header.layers)} MoE layers of "
            f"{header.num_experts} experts, but {model.name} has {len(there[0])} of {there[1]}; name the trace's model "
            "with --model (its config.json is enough)"
        )


def _routings(config: EngineConfig, model: Described, recorded: Recorded, request: Request) -> list[Routing]:
    """Every trace as it is, of the routing asked for first; then what dMoE would have made of original routing."""
    originals = [
        records
        for header, records in zip(recorded.headers, recorded.records, strict=True)
        if header.routing == ORIGINAL
    ]
    routings = []
    for header, records in zip(recorded.headers, recorded.records, strict=True):
        kept = 1.0 if header.routing == ORIGINAL else kept_share(originals[0], records) if originals else None
        routings.append(Routing(f"{header.routing}, recorded", records, kept, _settings(config, model, header.routing)))
    wanted = config.routing or native_routing(model.config)
    routings.sort(key=lambda routing: routing.settings["routing"] != wanted)
    least = routing_options(config, model.config).min_experts
    for top_p in request.top_ps if originals else ():
        for hold in request.holds:
            records = as_coresets(originals[0], top_p, least, hold)
            name = f"dmoe p {top_p:g}" + (f", held {hold}" if hold > 1 else "")
            settings: Settings = {"routing": "dmoe", "top_p": top_p, "min_experts": least, "hold_steps": hold}
            routings.append(Routing(name, records, kept_share(originals[0], records), settings))
    return routings


def _settings(config: EngineConfig, model: Described, routing: str) -> Settings:
    """Options that route as recorded; a trace doesn't name dMoE's, so these are the ones that a run would have now."""
    if routing != "dmoe":
        return {"routing": routing}
    options = routing_options(config, model.config)
    return {
        "routing": routing,
        "top_p": options.top_p,
        "min_experts": options.min_experts,
        "hold_steps": options.hold_steps,
    }


def _rates(config: EngineConfig, profile: Path | None) -> tuple[Rates, str]:
    """What the machine does per second, and how that is known."""
    if profile is not None:
        return read_rates(profile), f"the machine of profile {profile.stem}"
    from offload_engine.bench.bandwidth import measure_bandwidth

    note("measuring disk, memory and products; a --profile of dmoe doctor --measure would save it")
    measured = measure_bandwidth(config)
    return Rates(max(measured.disk.values()), measured.dram, measured.gemm), "this machine as measured now"


def _work(model: Described, plan: MemoryPlan, header: TraceHeader) -> Work:
    config = model.config
    layer_bytes = plan.weights / len(header.layers)
    return Work(
        expert_bytes=header.expert_bytes,
        expert_weights=3 * config.hidden_size * config.moe_intermediate_size,
        layer_bytes=layer_bytes,
        layer_weights=layer_bytes / model.stored.dtype.itemsize,
        block_length=header.block_length,
        top_k=header.top_k,
    )


def _search(request: Request, routings: Sequence[Routing], plan: MemoryPlan, work: Work, rates: Rates) -> Found:
    def costs(records: Sequence[TraceRecord]) -> Costs:
        return costs_of(work, rates, experts_per_layer(records))

    recorded, layers = routings[0], sorted({record.layer for record in routings[0].records})
    own = costs(recorded.records)
    note(f"trying {len(routings)} ways to route under {len(search.SHARES)} budgets")
    default = play(recorded.records, layers, Knobs(), plan.slots, own)
    knobs, tuned = search.best_knobs(recorded.records, layers, plan.slots, own)
    sizes = search.budgets(plan.fixed, plan.slab_bytes, plan.slots)
    points = search.survey(routings, sizes, layers, knobs, costs)
    acceptable = search.acceptable(points, request.least_kept, recorded)
    return Found(
        points=points,
        best=search.frontier(points),
        knobs=knobs,
        default=default,
        tuned=tuned,
        chosen=search.fastest([point for point in acceptable if point.budget == sizes[0]]),
        smallest=search.smallest_near(acceptable),
        context=plan.context,
        source="",
    )


def _told(recorded: Recorded) -> str:
    steps = sum(map(steps_of, recorded.records))
    names = " and ".join(dict.fromkeys(header.routing for header in recorded.headers))
    return f"{steps} denoising steps of {recorded.header.model or 'a model'} recorded under {names} routing"


def _asked(config: EngineConfig) -> dict[str, str | int]:
    """Of what was set, that which a config should repeat."""
    names = ("model", "device", "dtype", "host_mem", "expert_mem", "threads", "prefill_chunk", "batch_size")
    set_here = config.model_dump(exclude_unset=True)
    return {name: "none" if set_here[name] is None else set_here[name] for name in names if name in set_here}


def _write_config(path: Path, text: str) -> None:
    try:
        write_aside(path, text.encode())
    except OSError as error:
        raise OffloadError(f"{path}: can't be written ({error.strerror}); name another file with --out") from None
    load_config(path)  # what is handed out should be taken


def _plot(found: Found, path: Path) -> None:
    try:
        from offload_engine.tune.plot import plot
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install 'offload-engine[eval]', or leave it out") from None
    try:
        plot(found.points, found.best, path)
    except OSError as error:
        raise OffloadError(f"{path}: can't be written ({error.strerror}); name another file with --plot") from None
