"""Carries out the evaluations a study needs, each in a folder of its own, and reads them back."""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from offload_engine.config import EngineConfig
from offload_engine.engine import Engine
from offload_engine.evaluate.records import SUMMARY, RunFolder, SavedRun, read_run
from offload_engine.evaluate.runner import about, evaluate, run_folder_settings
from offload_engine.evaluate.summary import summarise
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


def engine_config(study: Study, run: Run) -> EngineConfig:
    """The engine's options for `run`."""
    tight = {"expert_mem": model_facts(study)[run.role]["tight_bytes"]} if run.tight else {}
    return study.config(run.role, **run.routing, **tight)


def load(study: Study, task: str, run: Run) -> Evaluated | None:
    """The evaluation if it is finished and was made with these very settings; None otherwise."""
    directory = folder(study, task, run)
    if not (directory / SUMMARY).is_file():
        return None
    saved, summary = read_run(directory), json.loads((directory / SUMMARY).read_bytes())
    wanted = {
        **study.task(task).settings,
        "fingerprint": study.fingerprints[run.role],
        "sampling": study.sampling(run.block_length).model_dump(),
        "engine": engine_config(study, run).model_dump(exclude={"model"}),
    }
    wanted = json.loads(json.dumps(wanted))
    kept = [{name: value for name, value in record.items() if name in FIELDS} for record in saved.records]
    same = all(saved.settings.get(name) == value for name, value in wanted.items())
    return Evaluated(run, summary, replace(saved, records=kept)) if same and summary["complete"] else None


def carry_out(study: Study, task: str, run: Run) -> None:
    """Answer whatever samples of `task` have no record yet. Raises `UsageError` where the folder holds a run with other
    settings.
    """
    questions, params = study.task(task), study.sampling(run.block_length)
    with Engine.from_pretrained(config=engine_config(study, run)) as engine:
        settings, facts = run_folder_settings(engine, questions, params), about(engine)
        with RunFolder(folder(study, task, run), settings, facts) as recorder:
            total = len(questions.samples)
            for _record in evaluate(engine, questions, params, recorder):
                if len(recorder.done) % SAY_EVERY == 0:
                    _say(f"  {task}, {run.name}: {len(recorder.done)} of {total}")
            recorder.summarise(summarise(settings, facts, recorder.records()))


def carry_out_all(study: Study, runs: Iterable[Run], jobs: int, tasks: Sequence[str] | None = None) -> None:
    """Carry out what isn't finished of `runs` on `tasks` (None: the study's), in `jobs` processes, saying on stderr how
    it goes.
    """
    unique = {run.name: run for run in runs}.values()
    wanted = [(task, run) for task in tasks or study.tasks for run in unique if load(study, task, run) is None]
    if jobs == 1 or len(wanted) < 2:
        for number, (task, run) in enumerate(wanted, start=1):
            _say(f"evaluating {task}, {run.name} ({number} of {len(wanted)})")
            carry_out(study, task, run)
        return
    fresh = multiprocessing.get_context("spawn")  # a forked torch may wait for threads that it hasn't got
    with ProcessPoolExecutor(jobs, mp_context=fresh) as pool:
        under_way: dict[Future[None], str] = {
            pool.submit(carry_out, study, task, run): f"{task}, {run.name}" for task, run in wanted
        }
        try:
            for number, future in enumerate(as_completed(under_way), start=1):
                future.result()
                _say(f"evaluated {under_way[future]} ({number} of {len(wanted)})")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
