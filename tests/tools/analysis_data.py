"""A study's evaluations and measurements made up from numbers that a test can count by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from offload_engine.evaluate.records import SavedRun
from offload_engine.evaluate.summary import summarise
from offload_engine.evaluate.tasks import ARITHMETIC
from tools.analysis.evaluations import Evaluated
from tools.analysis.runs import Run
from tools.analysis.sections.content import Data, MissingError
from tools.analysis.study import Study

SAMPLES = 20
LAYERS = ("1", "2", "3")
FACTS = {
    "name": "made-up",
    "fingerprint": "0" * 16,
    "parameters": 7_000_000,
    "dtype": "float32",
    "threads": 1,
    "moe_layers": [1, 2, 3],
    "num_experts": 256,
    "top_k": 8,
    "expert_bytes": 1000,
    "slots": 768,
    "all_experts": 768,
    "tight_bytes": 77_000,
    "distilled_top_p": 0.6,
    "core_min_experts": None,
}


def evaluated(run: Run, right: int, unique: float, *, steps: int = 4, moved: int = 0) -> Evaluated:
    """An evaluation of 20 problems of which the first `right` were right, `unique` experts in every layer and step."""
    records = [
        {
            "id": str(index),
            "gold": "1",
            "generation": "1",
            "strict": index < right,
            "soft": index < right,
            "tokens": 30,
            "steps": steps,
            "blocks": 1,
            "forwards": {"denoise": steps},
            "seconds": 0.1,
            "stall_seconds": 0.0,
            "unique_experts": unique,
            "unique_by_layer": dict.fromkeys(LAYERS, unique),
            "unique_by_forward": [unique] * steps,
            "unique_mid_by_forward": [unique + (1 if step % 2 else -1) for step in range(steps)],
            "bytes_moved": moved,
            "hits": 3,
            "late": 0,
            "misses": 1,
            "peak_bytes": 1,
            "finish_reason": "eos",
        }
        for index in range(SAMPLES)
    ]
    about = {"moe_layers": [1, 2, 3], "plan": {"slots": 77}}
    return Evaluated(run, summarise({"n": SAMPLES}, about, records), SavedRun(Path(run.name), {}, about, records))


class MadeUp(Data):
    """`Data` that reads nothing from disk."""

    def __init__(self, out: Path, runs: list[Evaluated], measured: dict[str, Any] | None = None, **study: Any) -> None:
        super().__init__(Study(model=None, base=study.pop("base", "base"), out=out, n=SAMPLES, **study))
        self.runs = {one.run.name: one for one in runs}
        self.results = {"model": {"base": FACTS, "distilled": FACTS}, **(measured or {})}

    def find(self, task: str, run: Run) -> Evaluated | None:
        """See `Data`."""
        assert task == ARITHMETIC
        return self.runs.get(run.name)

    def finder(self, run: Run) -> Evaluated | None:
        """`find` on the one task there is."""
        return self.find(ARITHMETIC, run)

    def measured(self, name: str) -> dict[str, Any]:
        """See `Data`."""
        if name not in self.results:
            raise MissingError(f"the measurement {name}")
        result: dict[str, Any] = self.results[name]
        return result
