"""`dmoe simulate`: a recorded trace on machines that need not be here."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from offload_engine.cli.plan import Described, describe, make_plan, plan_dtype
from offload_engine.cli.simulated_report import Case, Outcome, Reported, show
from offload_engine.config import EngineConfig, parse_bytes
from offload_engine.core import Phase
from offload_engine.errors import ConfigError, TraceError, UsageError
from offload_engine.memory import auto_budget
from offload_engine.model.config import ModelConfig
from offload_engine.simulate.confined import confined
from offload_engine.simulate.forwards import ForwardRun, forwards, sized
from offload_engine.simulate.profile import HOST, Profile, load_profile
from offload_engine.simulate.run import Setting, Simulation
from offload_engine.simulate.timing import ModelShape, Timing
from offload_engine.trace import TraceHeader, TraceRecord, read_trace

KNOWN_MODELS = Path(__file__).parents[1] / "simulate" / "models"
"""config.json files of published shapes, for traces whose model isn't here."""
BOUNCE_SLOTS = 2
"""Experts on their way through host memory where there is no host tier."""
BYTES_PER_WEIGHT = (0.5, 4.0)
"""What a stored expert's weight may take, from 4 bits to float32, scales left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be simulated: every combination of what may be given several times."""

    trace: Path
    gpus: Sequence[str]
    budgets: Sequence[str] = ()
    """Sizes of fast memory; none: what the card has, less a tenth."""
    slots: Sequence[int] = ()
    """Expert slots in all, in place of a plan."""
    host_mem: str | None = None
    max_context: int | None = None
    eviction: Sequence[str] = ()
    predictor: Sequence[str] = ()
    top_p: Sequence[float] = ()
    min_experts: int | None = None
    prefetch_depth: int | None = None
    transfers_in_flight: int | None = None
    cpu_experts: Sequence[str] = ()
    pageable: bool = False
    gate_accuracy: float | None = None
    warm_up: int = 1
    model: str | None = None
    as_json: bool = False


@dataclass(frozen=True, slots=True)
class _Budget:
    """Expert slots that a case has, and what they are called."""

    memory: int | None
    """Bytes of fast memory; None: slots were given."""
    slots: int
    host_slots: int | None


def simulate(request: Request) -> None:
    """Print what the machines would do. Raises `UsageError`, `TraceError`, `ModelError`s, `MemoryBudgetError`."""
    _refuse_idle(request)
    header, records = read_trace(request.trace)
    kept = list(records)
    if not any(record.phase is Phase.DENOISE for record in kept):
        raise TraceError(f"{request.trace}: holds no denoising step, so there is nothing to simulate")
    model = model_of(header, request.model)
    profiles = [load_profile(name) for name in request.gpus]
    outcomes = list(_outcomes(request, header, kept, model, profiles))
    show(Reported(str(request.trace), header, model.name, profiles, outcomes), as_json=request.as_json)


def _refuse_idle(request: Request) -> None:
    """Refuse options that another makes meaningless."""
    planned = {"--gpu-mem": request.budgets, "--host-mem": request.host_mem, "--max-context": request.max_context}
    idle = [name for name, value in planned.items() if value not in ((), None)]
    if request.slots and idle:
        raise UsageError(f"{idle[0]} has no effect beside --slots, which needs no plan; leave one of them out")
    if request.min_experts is not None and not request.top_p:
        raise UsageError("--min-experts has no effect without --top-p; leave it out")


def _outcomes(
    request: Request,
    header: TraceHeader,
    records: Sequence[TraceRecord],
    model: Described,
    profiles: Sequence[Profile],
) -> Iterator[Outcome]:
    settings = _settings(request)
    _refuse_unshared(settings, profiles)
    for top_p, profile in itertools.product(_shares(request, header), profiles):
        shape = shape_of(model.config, header.expert_bytes)
        trace, routing = _trace(request, header, records, top_p), _routing(header, top_p)
        simulation = Simulation(trace, header.layers, Timing(shape, profile), header.block_length, request.warm_up)
        for budget in _budgets(request, model, profile):
            placed = [replace(one, slots=budget.slots, host_slots=budget.host_slots) for one in settings]
            bounds = simulation.bounds(placed[0])
            for setting in placed:
                case = Case(
                    profile=profile.name,
                    memory=budget.memory,
                    moe_layers=len(header.layers),
                    routing=routing,
                    setting=setting,
                )
                yield Outcome(case, simulation.figures(case.setting), bounds)


def _refuse_unshared(settings: Sequence[Setting], profiles: Sequence[Profile]) -> None:
    asked = next((one.cpu_experts for one in settings if one.cpu_experts != "off"), None)
    silent = [profile for profile in profiles if not profile.shares]
    if asked is not None and silent:
        reason = "has no GPU" if silent[0].device == "cpu" else f"lacks {' and '.join(HOST)}"
        raise UsageError(f"--cpu-experts is {asked}, but profile {silent[0].name} {reason}; leave one of them out")


def _shares(request: Request, header: TraceHeader) -> Sequence[float | None]:
    if request.top_p and header.routing.split()[0] != "original":
        raise UsageError(
            f"--top-p {request.top_p[0]}: the trace was recorded under {header.routing!r} routing, and only a trace of "
            "original routing can be confined further; record one, or leave --top-p out"
        )
    wrong = [share for share in request.top_p if not 0 < share <= 1]
    if wrong:
        raise UsageError(f"--top-p is {wrong[0]}, wanted more than 0 and at most 1")
    return request.top_p or (None,)


def _trace(
    request: Request, header: TraceHeader, records: Sequence[TraceRecord], top_p: float | None
) -> list[ForwardRun]:
    if top_p is not None:
        least = 16 if request.min_experts is None else request.min_experts
        records = list(confined(records, top_p, least))
    return sized(list(forwards(records, header.block_length)), header.block_length)


def _routing(header: TraceHeader, top_p: float | None) -> str:
    return header.routing if top_p is None else f"dmoe, p={top_p:g}, estimated"


def _settings(request: Request) -> list[Setting]:
    """One per eviction, predictor and share, judged in the words of `EngineConfig`, which also has the defaults."""
    settings = []
    several = (request.eviction or (None,), request.predictor or (None,), request.cpu_experts or (None,))
    for eviction, predictor, cpu_experts in itertools.product(*several):
        asked: dict[str, Any] = {
            "eviction": eviction,
            "predictor": predictor,
            "cpu_experts": cpu_experts,
            "prefetch_depth": request.prefetch_depth,
            "transfers_in_flight": request.transfers_in_flight,
        }
        config = EngineConfig(**{name: value for name, value in asked.items() if value is not None})
        settings.append(
            Setting(
                slots=0,
                eviction=config.eviction,
                predictor=config.predictor,
                depth=config.prefetch_depth,
                in_flight=config.transfers_in_flight,
                pinned=not request.pageable,
                gate_accuracy=request.gate_accuracy,
                cpu_experts=config.cpu_experts,
            )
        )
    return settings


def _budgets(request: Request, model: Described, profile: Profile) -> Iterator[_Budget]:
    everything = len(model.config.moe_layers) * model.config.num_experts
    if request.slots:
        yield from (_Budget(None, min(slots, everything), None) for slots in request.slots)
        return
    sizes = [parse_bytes(size, "--gpu-mem") for size in request.budgets]
    for size in sizes or [auto_budget(int(profile.memory.value), profile.device)]:
        if size > profile.memory.value:
            raise ConfigError(
                f"--gpu-mem is {size} bytes, but {profile.name} has {int(profile.memory.value)}; "
                "set it to at most that, or choose another --gpu"
            )
        yield _planned(request, model, profile, size)


def _planned(request: Request, model: Described, profile: Profile, size: int) -> _Budget:
    """What the memory planner gives a card of this size."""
    config = EngineConfig(
        gpu_mem=size,
        host_mem=_host_budget(request, profile),
        max_context=request.max_context,
        transfers_in_flight=request.transfers_in_flight or BOUNCE_SLOTS,
        cuda_graphs="off",  # no kernel's time here is that of a replay
        cpu_experts="auto" if any(one != "off" for one in request.cpu_experts) else "off",  # room for it
    )
    plan = make_plan(config, model, profile.device, plan_dtype(config, model, profile.device))
    if profile.device == "cpu":
        return _Budget(size, plan.slots, None)
    return _Budget(size, plan.slots, max(plan.host_slots, BOUNCE_SLOTS))


def _host_budget(request: Request, profile: Profile) -> int | None:
    if profile.device == "cpu" or profile.host_memory is None:
        if request.host_mem is not None:
            raise ConfigError(f"--host-mem is {request.host_mem}, but {profile.name} has no host tier; leave it out")
        return None
    if request.host_mem in (None, "auto"):
        return auto_budget(int(profile.host_memory.value), "host")
    return None if request.host_mem == "none" else parse_bytes(request.host_mem, "--host-mem")


def model_of(header: TraceHeader, named: str | None) -> Described:
    """The model of a trace: the one named, the one its header names where it is here, else a published shape that fits.

    Raises `UsageError` where there is none or it doesn't fit the trace, `ModelError`s where it can't be read.
    """
    if named is not None or header.model == "built-in":
        model = describe(named)
        if not fits(model.config, header):
            raise UsageError(f"--model {model.name}: {_shape_of_trace(header)}, which this model is not")
        return _as_stored(model, header)
    local = Path(header.model)
    candidates = [local] if header.model and (local / "config.json").is_file() else []
    for path in [*candidates, *sorted(KNOWN_MODELS.glob("*.json"))]:
        model = describe(str(path))
        if fits(model.config, header):
            return _as_stored(replace(model, name=path.stem if path.parent == KNOWN_MODELS else str(path)), header)
    raise UsageError(
        f"--model is missing: {_shape_of_trace(header)}, which no published shape has; "
        "name its checkpoint, or a config.json"
    )


def fits(config: ModelConfig, header: TraceHeader) -> bool:
    """Whether a trace with this header may be of this model."""
    weights = 3 * config.hidden_size * config.moe_intermediate_size
    least, most = BYTES_PER_WEIGHT
    return (
        tuple(config.moe_layers) == header.layers
        and (config.num_experts, config.num_experts_per_tok) == (header.num_experts, header.top_k)
        and least * weights <= header.expert_bytes <= most * weights
    )


def _shape_of_trace(header: TraceHeader) -> str:
    return (
        f"the trace has {len(header.layers)} MoE layers ({header.layers[0]} to {header.layers[-1]}) of "
        f"{header.num_experts} experts of {header.expert_bytes} bytes, {header.top_k} per token"
    )


def _as_stored(model: Described, header: TraceHeader) -> Described:
    """With the slots that experts as large as the trace's take."""
    whole = 3 * model.config.hidden_size * model.config.moe_intermediate_size * model.stored.dtype.itemsize
    return model if header.expert_bytes == whole else replace(model, slab_bytes=-(-header.expert_bytes // 4096) * 4096)


def shape_of(config: ModelConfig, expert_bytes: int) -> ModelShape:
    """What a timing model needs of a config.json; residents take two bytes per weight."""
    return ModelShape(
        layers=config.num_hidden_layers,
        moe_layers=len(config.moe_layers),
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        dense_width=config.intermediate_size,
        expert_width=config.moe_intermediate_size,
        shared_width=config.shared_intermediate_size,
        num_experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        vocabulary=config.vocab_size,
        expert_bytes=expert_bytes,
    )
