"""Holds the simulator against what `dmoe bench` measured with the real engine, and prints both side by side.

    python -m tools.validate_simulator runs/mini/bench.json --model checkpoints/llada2-mini --traces runs/traces

Traces of the benchmark's workload are recorded into --traces unless they are there. Slots, workload and machine
bandwidths are the benchmark's; everything else is the profile's. Contenders of other weight formats are left out.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

if __package__ in (None, ""):  # run as a script: the repository's root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from offload_engine.bench.contender import decoding_config
from offload_engine.bench.spec import ENGINES, Bandwidth, Measured, Run, Task, Workload
from offload_engine.bench.summary import bandwidth_of
from offload_engine.bench.yardstick import prompt_ids
from offload_engine.cli.simulate import model_of, shape_of
from offload_engine.config import EngineConfig, parse_bytes
from offload_engine.core import Phase
from offload_engine.engine.engine import Engine
from offload_engine.errors import OffloadError, UsageError
from offload_engine.simulate.forwards import ForwardRun, forwards, sized
from offload_engine.simulate.profile import Profile, load_profile
from offload_engine.simulate.run import Figures, Setting, Simulation
from offload_engine.simulate.timing import Timing
from offload_engine.trace import TraceRecord, read_trace

TARGET = 0.15
"""Largest error that counts as predicted: of step time and hit rate relative, of the stall's share of step time
absolute, since there may be none.
"""


@dataclass(frozen=True, slots=True)
class Real:
    """What the rounds of one contender measured."""

    steps: int
    step: float
    step_median: float
    hit_rate: float
    stall: float
    loads: float
    slots: int


@dataclass(frozen=True, slots=True)
class Pair:
    """A contender as measured and as simulated."""

    name: str
    real: Real
    simulated: Figures

    @property
    def errors(self) -> dict[str, float]:
        """Signed; see `TARGET`."""
        real, simulated = self.real, self.simulated
        return {
            "step": simulated.step_median / real.step_median - 1,
            "hit_rate": simulated.hit_rate / real.hit_rate - 1 if real.hit_rate else simulated.hit_rate,
            "stall": simulated.stall - real.stall,
        }

    @property
    def holds(self) -> bool:
        """Whether every error is within the target."""
        return all(abs(error) <= TARGET for error in self.errors.values())


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("bench", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--model", required=True, help="The checkpoint that was measured.")
@click.option(
    "--traces", type=click.Path(path_type=Path, file_okay=False), required=True, help="Where traces are kept."
)
@click.option("--profile", "name", default="cpu-disk", help="Hardware profile, or a .toml file.")
@click.option("--profile-bandwidths", is_flag=True, help="Take disk, memory and arithmetic from the profile as well.")
@click.option("--record-budget", default="5GB", help="Memory of the engine that records missing traces.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
@click.option("--check", is_flag=True, help=f"Exit with 1 if an error is above {TARGET:.0%}.")
def main(
    bench: Path,
    model: str,
    traces: Path,
    name: str,
    profile_bandwidths: bool,
    record_budget: str,
    as_json: bool,
    check: bool,
) -> None:
    """Compare what BENCH, the bench.json of a run on this machine, measured with what the simulator says."""
    try:
        workload, runs = read_bench(bench)
        profile = load_profile(name)
        measured = bandwidth_of(runs)
        if measured is not None and not profile_bandwidths:
            profile = with_bandwidth(profile, measured)
        budget = parse_bytes(record_budget, "--record-budget")
        pairs = list(compare(runs, workload, profile, model, traces, budget))
    except OffloadError as error:
        raise click.ClickException(str(error).splitlines()[0]) from None
    click.echo(json.dumps([as_dict(pair) for pair in pairs]) if as_json else table(pairs))
    if check and not all(pair.holds for pair in pairs):
        raise SystemExit(1)


def read_bench(path: Path) -> tuple[Workload, list[Run]]:
    """The workload and the runs of a bench.json. Raises `UsageError` for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Workload.model_validate(found["workload"]), [Run.model_validate(run) for run in found["runs"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: no bench.json of dmoe bench ({str(error).splitlines()[0]})") from None


def with_bandwidth(profile: Profile, found: Bandwidth) -> Profile:
    """The profile with what the benchmark measured beside its contenders."""
    depths = sorted(found.disk)
    two = found.disk.get(2, found.disk[depths[0]])
    return profile.with_values(
        "dmoe bench, beside the contenders",
        disk_bandwidth=two,
        disk_latency=max(0.0, found.slab_bytes / found.disk[depths[0]] - found.slab_bytes / two),
        memory_bandwidth=found.dram,
        compute=found.gemm,
    )


def compare(
    runs: Sequence[Run], workload: Workload, profile: Profile, model: str, traces: Path, budget: int
) -> Iterator[Pair]:
    """Every contender of ours with the model's own weights. Raises `UsageError` where there is none."""
    names = dict.fromkeys(run.task for run in runs if _comparable(run))
    if not names:
        raise UsageError("the benchmark has no run of engine/... or unlimited/..., so there is nothing to compare")
    for name in names:
        found = [run.report.measured for run in runs if run.task == name and run.report.measured is not None]
        kind, _, rest = name.partition("/")
        routing = rest.partition("@")[0]
        path = traces / f"{routing}.jsonl"
        if not path.exists():
            traces.mkdir(parents=True, exist_ok=True)
            record(model, routing, workload, path, budget)
        real = measured_of(found)
        yield Pair(name, real, simulated(path, model, profile, workload, real.slots, again=kind == "unlimited"))


def _comparable(run: Run) -> bool:
    measured = run.report.measured
    ours = run.task.partition("/")[0] in ENGINES and "+" not in run.task
    return ours and measured is not None and measured.stats is not None and not measured.cut_short


def measured_of(rounds: Sequence[Measured]) -> Real:
    """All rounds of a contender together: steps pooled, counts summed."""
    steps = [seconds for one in rounds for seconds in one.step_seconds]
    stats = [one.stats or {} for one in rounds]
    requests = sum(one["expert_requests"] for one in stats)
    return Real(
        steps=len(steps),
        step=statistics.fmean(steps),
        step_median=statistics.median(steps),
        hit_rate=sum(one["hits"] for one in stats) / requests,
        stall=sum(one.seconds.get("stall", 0.0) for one in rounds) / sum(steps),
        loads=sum(one.loads or 0 for one in rounds) / len(steps),
        slots=rounds[0].slots or 0,
    )


def record(model: str, routing: str, workload: Workload, path: Path, budget: int) -> None:
    """Decode the benchmark's answer once and keep its trace; what is routed where depends on no budget."""
    task = Task(name=f"engine/{routing}", kind="engine", workload=workload)
    config = decoding_config(EngineConfig(model=model, gpu_mem=budget, routing=routing, hot_set="off"), task)
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    with Engine.from_pretrained(model, **config.model_dump(exclude_unset=True, exclude={"model"})) as engine:
        engine.record_trace(partial, workload.block_length)
        prompt = prompt_ids(engine.mask_token_id, engine.model_config.vocab_size, workload)
        for _event in engine.stream(prompt, workload.sampling()):
            pass
        engine.close_trace()
    partial.rename(path)


def simulated(path: Path, model: str, profile: Profile, workload: Workload, slots: int, *, again: bool) -> Figures:
    """The profile's prediction for a trace; `again`: the second time that the answer is decoded, as for *unlimited*."""
    header, records = read_trace(path)
    kept: list[TraceRecord] = list(records)
    _require_workload(path, kept, workload)
    warm_up = workload.warm_up
    if again:
        following = 1 + max(record.sequence for record in kept)
        kept += [one.model_copy(update={"sequence": one.sequence + following}) for one in kept]
        warm_up += workload.warm_up + workload.blocks
    trace: list[ForwardRun] = sized(list(forwards(kept, header.block_length)), header.block_length)
    timing = Timing(shape_of(model_of(header, model).config, header.expert_bytes), profile)
    return Simulation(trace, header.layers, timing, header.block_length, warm_up).figures(Setting(slots=slots))


def _require_workload(path: Path, records: Sequence[TraceRecord], workload: Workload) -> None:
    found = len({(one.sequence, one.block) for one in records if one.phase is Phase.DENOISE})
    wanted = workload.warm_up + workload.blocks
    if found != wanted:
        raise UsageError(
            f"{path}: a trace of {found} blocks, but the benchmark decoded {wanted}; remove it to have it recorded anew"
        )


def as_dict(pair: Pair) -> dict[str, Any]:
    """Everything of a pair by name."""
    return asdict(pair) | {"errors": pair.errors, "holds": pair.holds}


def table(pairs: Sequence[Pair]) -> str:
    """Markdown: each figure measured and simulated, and the error."""
    header = ["contender", "slots", "step, s", "simulated", "error", "hits", "simulated", "error", "stall", "simulated"]
    header += ["difference", "loads/step", "simulated", f"within {TARGET:.0%}"]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for pair in pairs:
        real, simulated, errors = pair.real, pair.simulated, pair.errors
        cells = [pair.name, str(real.slots)]
        cells += [f"{real.step_median:.3f}", f"{simulated.step_median:.3f}", f"{errors['step']:+.1%}"]
        cells += [f"{real.hit_rate:.1%}", f"{simulated.hit_rate:.1%}", f"{errors['hit_rate']:+.1%}"]
        cells += [f"{real.stall:.1%}", f"{simulated.stall:.1%}", f"{errors['stall']:+.1%}"]
        cells += [f"{real.loads:.1f}", f"{simulated.loads:.1f}", "yes" if pair.holds else "NO"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
