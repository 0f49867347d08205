"""`dmoe tune`: the options that a budget is best spent with, from traces and a virtual clock."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from offload_engine.cli.plan import Described, make_plan, plan_dtype
from offload_engine.cli.progress import PIECES, Progress
from offload_engine.cli.simulate import BOUNCE_SLOTS, model_of, shape_of
from offload_engine.cli.terminal import Output, note
from offload_engine.config import EngineConfig
from offload_engine.doctor.profile import measure_profile
from offload_engine.engine.assembly import native_routing, routing_options
from offload_engine.engine.learned import Learned, device_name, remember_tuning, routing_settings
from offload_engine.errors import OffloadError, UsageError
from offload_engine.experts.scheduling.sharing import ShareMode
from offload_engine.files import write_aside
from offload_engine.memory import MemoryPlan, auto_budget
from offload_engine.simulate.profile import Profile, load_profile
from offload_engine.simulate.run import Figures
from offload_engine.simulate.timing import Timing
from offload_engine.trace import TraceHeader, TraceRecord, read_trace
from offload_engine.tune import search
from offload_engine.tune.calibration import ORIGINAL, record
from offload_engine.tune.report import Found, config_text, table
from offload_engine.tune.routing import Routing, Settings, as_coresets, kept_share, steps_of
from offload_engine.tune.trial import Knobs, Machine

MEMORY_OPTIONS = ("device", "gpu_mem", "host_mem", "expert_mem")
"""Those of the machine that is tuned for, which need not be the one that a trace is recorded on."""
HANDED_ON = ("model", "device", "dtype", "host_mem", "expert_mem", "threads", "prefill_chunk", "batch_size")
"""Options that a config repeats as they were given."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is searched, and where it goes."""

    traces: Sequence[Path]
    """None: a short run records some."""
    gpu: str | None
    """A hardware profile or its file; None: this machine, measured."""
    top_ps: Sequence[float]
    """dMoE's shares of the votes to try on a trace of original routing."""
    holds: Sequence[int]
    """Steps to hold a coreset for, likewise."""
    least_kept: float | None
    """Share of the votes that any routing may be chosen for; None: routing stays as recorded."""
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

    @property
    def original(self) -> tuple[TraceRecord, ...] | None:
        """The first trace of original routing, which knows every expert's votes."""
        pairs = zip(self.headers, self.records, strict=True)
        return next((records for header, records in pairs if header.routing == ORIGINAL), None)


def tune(config: EngineConfig, request: Request) -> None:
    """Search, print, and write the config. Raises `OffloadError`s."""
    profile, config_there = None if request.gpu is None else load_profile(request.gpu), config
    recorded = _recorded(config, request.traces)
    model = model_of(recorded.header, config.model)
    if profile is None:
        note("measuring disk, memory and products; a profile of dmoe doctor --measure, given as --gpu, saves that")
        profile = measure_profile(config)
    else:
        config_there = _sized_by(config, profile)
    sharing = _sharing(config_there, profile)
    plan = _plan(config_there, model, profile, sharing)
    machine = _machine(model, recorded, profile, plan, sharing)
    routings = _routings(config, model, recorded, request)
    found = _search(routings, machine, plan, request.least_kept, frugal=config.gpu_mem == "auto")
    found = replace(found, source=_told(recorded, profile))
    _write(config, request, found)
    _hand_out(request, found, _remember(config, found, profile, here=request.gpu is None))


def _recorded(config: EngineConfig, traces: Sequence[Path]) -> Recorded:
    """The traces given, or those of a short run."""
    if traces:
        return _read(traces)
    note("recording how the model routes: a few short answers")
    here = EngineConfig(
        **{name: value for name, value in config.model_dump(exclude_unset=True).items() if name not in MEMORY_OPTIONS}
    )
    with tempfile.TemporaryDirectory(prefix="dmoe-tune-") as directory:
        with Progress("recording, denoising steps", 0, PIECES) as progress:
            traces = record(here, Path(directory), progress.show_of)
        return _read(traces)


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


def _sized_by(config: EngineConfig, profile: Profile) -> EngineConfig:
    """`config` for that machine: what is auto is its memory, not this one's."""
    values: dict[str, Any] = config.model_dump(exclude_unset=True) | {"device": profile.device}
    if config.gpu_mem == "auto":
        values["gpu_mem"] = auto_budget(int(profile.memory.value), profile.device)
    if profile.host_memory is not None and config.host_mem == "auto":
        values["host_mem"] = auto_budget(int(profile.host_memory.value), "host")
    return EngineConfig(**values)


def _sharing(config: EngineConfig, profile: Profile) -> tuple[ShareMode, ...]:
    """What is tried of `cpu_experts`: what somebody has set, or both where there is a CPU that could compute from a
    host tier.
    """
    if config.host_mem is None or not profile.shares:
        return ("off",)
    return (config.cpu_experts,) if "cpu_experts" in config.model_fields_set else ("off", "auto")


def _plan(config: EngineConfig, model: Described, profile: Profile, sharing: Sequence[ShareMode]) -> MemoryPlan:
    """With room for what sharing takes, a few megabytes, if it may be chosen."""
    wanted = config.model_copy(update={"cpu_experts": sharing[-1]})
    return make_plan(wanted, model, profile.device, plan_dtype(config, model, profile.device))


def _machine(
    model: Described, recorded: Recorded, profile: Profile, plan: MemoryPlan, sharing: Sequence[ShareMode]
) -> Machine:
    header = recorded.header
    return Machine(
        timing=Timing(shape_of(model.config, header.expert_bytes), profile),
        layers=header.layers,
        block_length=header.block_length,
        host_slots=max(plan.host_slots, BOUNCE_SLOTS) if profile.device == "cuda" else None,
        sharing=sharing,
    )


def _routings(config: EngineConfig, model: Described, recorded: Recorded, request: Request) -> list[Routing]:
    """Every trace as it is, of the routing asked for first; then what dMoE would have made of original routing."""
    original, routings = recorded.original, []
    for header, records in zip(recorded.headers, recorded.records, strict=True):
        kept = None if original is None else kept_share(original, records)
        routings.append(Routing(f"{header.routing}, recorded", records, kept, _settings(config, model, header.routing)))
    wanted = config.routing or native_routing(model.config)
    routings.sort(key=lambda routing: routing.settings["routing"] != wanted)
    least = routing_options(config, model.config).min_experts
    for top_p in () if original is None else request.top_ps:
        for hold in request.holds:
            records = as_coresets(original or (), top_p, least, hold)
            name = f"dmoe p={top_p:g}{f' held {hold}' if hold > 1 else ''}, estimated"
            settings: Settings = {"routing": "dmoe", "top_p": top_p, "min_experts": least, "hold_steps": hold}
            routings.append(Routing(name, records, kept_share(original or (), records), settings))
    return routings


def _settings(config: EngineConfig, model: Described, routing: str) -> Settings:
    """Options that route as recorded; a trace doesn't name dMoE's, so these are the ones that a run would have now."""
    return routing_settings(routing, routing_options(config, model.config))


def _search(
    routings: Sequence[Routing], machine: Machine, plan: MemoryPlan, least_kept: float | None, *, frugal: bool
) -> Found:
    """`frugal`: choose the smallest budget near the best speed rather than the whole one."""
    sizes = search.budgets(plan.fixed, plan.slab_bytes, plan.slots)
    note(f"replaying {len(routings)} ways to route under {len(sizes)} budgets")
    start = Knobs(cpu_experts=machine.sharing[0])
    surveyed, _ = _best_knobs("trying options", machine.trial(routings[0].records, plan.slots), start, machine)
    with Progress("replaying", len(routings) * len(sizes), PIECES) as progress:
        points = search.survey(routings, sizes, machine, surveyed, progress.advance)
    acceptable = search.acceptable(points, least_kept, routings[0])
    fastest = search.fastest([point for point in acceptable if point.budget == sizes[0]])
    smallest = search.smallest_near(acceptable)
    chosen = smallest if frugal else fastest
    trial = machine.trial(chosen.routing.records, chosen.budget.slots)
    start = replace(surveyed, cpu_experts=machine.sharing[0])  # here it has to pay once more
    knobs, figures = _best_knobs("trying options once more", trial, start, machine)
    return Found(
        points=points,
        best=search.frontier(points),
        surveyed=surveyed,
        fastest=fastest,
        smallest=smallest,
        chosen=replace(chosen, figures=figures, cpu_experts=knobs.cpu_experts),
        knobs=knobs,
        default=trial(Knobs()),
        sharing={mode: trial(replace(knobs, cpu_experts=mode)) for mode in machine.sharing},
        context=plan.context,
    )


def _best_knobs(doing: str, trial: search.Trial, start: Knobs, machine: Machine) -> tuple[Knobs, Figures]:
    with Progress(doing, 0, PIECES) as progress:
        return search.best_knobs(trial, start, machine.sharing, progress.show_of)


def _told(recorded: Recorded, profile: Profile) -> str:
    steps = sum(map(steps_of, recorded.records))
    routings = " and ".join(dict.fromkeys(header.routing for header in recorded.headers))
    model = recorded.header.model or "a model"
    return f"{steps} denoising steps of {model} recorded under {routings} routing, replayed on {profile.title}"


def _write(config: EngineConfig, request: Request, found: Found) -> None:
    """Write the config."""
    # Where nobody said how much: as much as makes a difference.
    budget = found.chosen.budget.nbytes if config.gpu_mem == "auto" else config.gpu_mem
    given = config.model_dump(exclude_unset=True)
    asked = {name: "none" if given[name] is None else given[name] for name in HANDED_ON if name in given}
    try:
        write_aside(request.out, config_text(found, asked, budget).encode())
    except OSError as error:
        raise OffloadError(
            f"{request.out}: can't be written ({error.strerror}); name another file with --out"
        ) from None


def _remember(config: EngineConfig, found: Found, profile: Profile, *, here: bool) -> Path | None:
    """Keep what was found for runs whose gpu_mem is auto; None where it can't be told for which, or can't be written.

    A card is known by its name wherever its profile is from; a processor is the one that was measured `here`. What was
    searched under a budget that somebody gave says nothing about what more memory would do.
    """
    directory = None if config.model is None else Path(config.model).expanduser()
    whole = config.gpu_mem == "auto" and config.expert_mem is None
    if directory is None or not directory.is_dir() or not whole or (profile.device == "cpu" and not here):
        return None
    return remember_tuning(
        directory,
        Learned(
            device=device_name(profile.title if profile.device == "cuda" else None),
            routing=found.smallest.routing.settings,
            batch_size=config.batch_size,
            slots=found.smallest.budget.slots,
            knobs=asdict(found.knobs),
        ),
    )


def _hand_out(request: Request, found: Found, remembered: Path | None) -> None:
    """Draw the plot, print the rest."""
    output = Output()
    if request.as_json:
        output.line(json.dumps(found.as_dict() | {"remembered": remembered and str(remembered)}))
    else:
        output.line(f"{table(found)}\nwritten   {request.out}")
        if remembered is not None:
            output.line(f"kept      {remembered}: --gpu-mem auto takes the smallest")
    if request.plot is not None:
        _plot(found, request.plot)


def _plot(found: Found, path: Path) -> None:
    try:
        from offload_engine.tune.plot import plot
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install 'offload-engine[eval]', or leave it out") from None
    try:
        plot(found.points, found.best, path)
    except OSError as error:
        raise OffloadError(f"{path}: can't be written ({error.strerror}); name another file with --plot") from None
