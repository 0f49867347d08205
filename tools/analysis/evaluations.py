"""Carries out the evaluations a study needs, each in a folder of its own, and reads them back."""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from offload_engine.cli.progress import PIECES, Progress
from offload_engine.config import EngineConfig, brief
from offload_engine.engine.assembly import choose_policy
from offload_engine.engine.engine import Engine
from offload_engine.errors import OffloadError, UsageError
from offload_engine.evaluate.records import RUN, SUMMARY, RunFolder, SavedRun, flatten, read_run
from offload_engine.evaluate.runner import about, evaluate, run_folder_settings
from offload_engine.evaluate.summary import summarise
from offload_engine.memory import auto_budget, available_memory
from offload_engine.routing import RoutingOptions, described
from tools.analysis.measurements import model_facts
from tools.analysis.runs import Run
from tools.analysis.study import Study

SAY_EVERY = 500
"""Answers between two lines that say how far an evaluation is."""

FIELDS = frozenset(
    {
        "id",
        "gold",
        "strict",
        "soft",
        "unique_experts",
        "unique_mid_by_forward",
        "steps",
        "tokens",
        "seconds",
        "bytes_moved",
    }
)
"""What is kept in memory of a record: a report looks at many runs of thousands of answers each."""


MEMORY = frozenset({"gpu_mem", "host_mem"})
TRANSFERS = frozenset({"expert_mem", "reader_threads", "transfers_in_flight"})
ROUTING = frozenset({"routing", *(option.name for option in fields(RoutingOptions))})
"""Engine options of which only what they come to for a checkpoint counts, the policy in force."""


@dataclass(frozen=True)
class Evaluated:
    """A finished evaluation."""

    run: Run
    summary: dict[str, Any]
    saved: SavedRun

    @property
    def unique(self) -> float:
        """Distinct experts per block and MoE layer, as the paper counts them (REFERENCE §3)."""
        found: float = self.summary["unique_experts"]
        return found

    @property
    def accuracy(self) -> float:
        """Strict."""
        found: float = self.summary["strict"]["accuracy"]
        return found


def folder(study: Study, task: str, run: Run) -> Path:
    """Where the evaluation is kept."""
    return study.out / "eval" / f"{task.replace(':', '-')}--{run.name}"


def engine_config(study: Study, run: Run, **more: Any) -> EngineConfig:
    """The engine's options for `run`; `more` go before the study's."""
    tight = {"expert_mem": model_facts(study)[run.role]["tight_bytes"]} if run.tight else {}
    return study.config(run.role, **run.routing, **tight, **more)


def differences(study: Study, task: str, run: Run) -> dict[str, tuple[Any, Any]]:
    """Settings of the run in the evaluation's folder that differ from the study's: name -> there and here. Empty where
    they are the same or there is no run.
    """
    there = _saved_settings(folder(study, task, run))
    return {} if there is None else _differing(study, task, run, there)


def _differing(study: Study, task: str, run: Run, there: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    wanted = {
        **study.task(task).settings,
        "fingerprint": study.fingerprints[run.role],
        "sampling": study.sampling(run.block_length).model_dump(),
        "routing": described(choose_policy(engine_config(study, run), study.model_configs[run.role])[0]),
        "engine": engine_config(study, run).model_dump(exclude={"model"} | ROUTING | _free(run)),
    }
    before, now = flatten(there), flatten(json.loads(json.dumps(wanted)))
    return {name: (before.get(name), value) for name, value in now.items() if before.get(name) != value}


def _free(run: Run) -> frozenset[str]:
    """Engine options that decide how fast an answer comes, not which: only behind a cache made small on purpose does
    what is resident count.
    """
    return MEMORY if run.tight else MEMORY | TRANSFERS


def _saved_settings(directory: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads((directory / RUN).read_bytes())["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found


def load(study: Study, task: str, run: Run) -> Evaluated | None:
    """The evaluation if it is finished and was made with settings that give these very answers; None otherwise."""
    directory = folder(study, task, run)
    if not (directory / SUMMARY).is_file():
        return None
    saved, summary = read_run(directory), json.loads((directory / SUMMARY).read_bytes())
    if not summary["complete"] or _differing(study, task, run, saved.settings):
        return None
    kept = [{name: value for name, value in record.items() if name in FIELDS} for record in saved.records]
    return Evaluated(run, summary, replace(saved, records=kept))


def carry_out(study: Study, task: str, run: Run, gpu_mem: int | None = None) -> None:
    """Answer whatever samples of `task` have no record yet, within `gpu_mem` bytes (None: as the study says). Raises
    `UsageError` where the folder holds a run with other settings.
    """
    questions, params = study.task(task), study.sampling(run.block_length)
    with Engine.from_pretrained(config=engine_config(study, run, gpu_mem=gpu_mem)) as engine:
        settings, facts = run_folder_settings(engine, questions, params), about(engine)
        settings["engine"] = _recorded(study, task, run)
        with RunFolder(folder(study, task, run), settings, facts) as recorder:
            done, total = len(recorder.done), len(questions.samples)
            progress = Progress(f"  {task}, {run.name}", total, PIECES, done=done)  # never drawn: others write as well
            for _record in evaluate(engine, questions, params, recorder):
                progress.done = len(recorder.done)
                if progress.done % SAY_EVERY == 0:
                    _say(progress.line())
            recorder.summarise(summarise(settings, facts, recorder.records()))


def _recorded(study: Study, task: str, run: Run) -> dict[str, Any]:
    """The engine options to keep with the records: the study's, but where a run is taken up again, those of its
    beginning for whatever doesn't matter.
    """
    there = (_saved_settings(folder(study, task, run)) or {}).get("engine", {})
    own = engine_config(study, run).model_dump(exclude={"model"})
    return own | {name: there[name] for name in _free(run) & there.keys()}


def carry_out_all(study: Study, runs: Iterable[Run], jobs: int, tasks: Sequence[str] | None = None) -> None:
    """Carry out what isn't finished of `runs` on `tasks` (None: the study's), in `jobs` processes, saying on stderr how
    it goes. Raises `UsageError` before the first where a folder holds a run with other settings.
    """
    unique = {run.name: run for run in runs}.values()
    wanted = [(task, run) for task in tasks or study.tasks for run in unique if load(study, task, run) is None]
    for task, run in wanted:
        _require_same(study, task, run)
    if jobs == 1 or len(wanted) < 2:
        for number, (task, run) in enumerate(wanted, start=1):
            _say(f"evaluating {task}, {run.name} ({number} of {len(wanted)})")
            carry_out(study, task, run)
        return
    jobs = min(jobs, len(wanted))
    threads = max(1, torch.get_num_threads() // jobs)
    fresh = multiprocessing.get_context("spawn")  # a forked torch may wait for threads that it hasn't got
    with ProcessPoolExecutor(jobs, fresh, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        share = memory_share(study, jobs)
        under_way: dict[Future[None], str] = {
            pool.submit(carry_out, study, task, run, share): f"{task}, {run.name}" for task, run in wanted
        }
        try:
            for number, future in enumerate(as_completed(under_way), start=1):
                future.result()
                _say(f"evaluated {under_way[future]} ({number} of {len(wanted)})")
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise OffloadError(
                    "an evaluation was killed, perhaps for want of memory; run the same command again to go on, with "
                    "fewer --jobs or a smaller --gpu-mem"
                ) from None
            raise


def memory_share(study: Study, jobs: int) -> int | None:
    """What each of `jobs` evaluations at a time may take of a budget of auto; None where the budget was named, which
    holds for each.
    """
    if study.config("base").gpu_mem != "auto":
        return None
    return auto_budget(available_memory(), "cpu") // jobs


def _require_same(study: Study, task: str, run: Run) -> None:
    found = differences(study, task, run)
    if found:
        raise UsageError(
            f"{folder(study, task, run)}: holds a run with other settings ({said(found)}); choose another --out, or "
            "the same settings to use it"
        )


def said(found: dict[str, tuple[Any, Any]]) -> str:
    """`differences` in words."""
    return ", ".join(f"{name} {brief(there)} there, {brief(here)} now" for name, (there, here) in found.items())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
