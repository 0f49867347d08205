"""The checkpoints of a run: one directory each, written aside and renamed, the previous one kept until then."""

from __future__ import annotations

import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offload_engine.errors import UsageError
from tools.finetuning.parallel import Processes
from tools.finetuning.weights import settle, sync
from tools.training import checkpoint

_NAME = re.compile(r"step-(\d+)")


class Saves:
    """The last whole checkpoint of a run, a file per process in `step-N`; N is the step it goes on with."""

    def __init__(self, folder: Path, processes: Processes) -> None:
        self.folder, self.processes = folder, processes

    def last(self) -> Path | None:
        """The newest checkpoint, if there is one."""
        return max(self._all(), key=_step, default=None)

    def _all(self) -> list[Path]:
        return [path for path in self.folder.glob("step-*") if _NAME.fullmatch(path.name)]

    def save(self, step: int, state: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Keep this process's `state`; afterwards older checkpoints are gone. All processes take part."""
        final = self.folder / f"step-{step:08d}"
        aside = self.folder / f".{final.name}.part"
        if self.processes.first and not final.exists():
            for leftover in self.folder.glob(".step-*"):
                shutil.rmtree(leftover)
            aside.mkdir(parents=True)
        self.processes.wait()
        if not final.exists():
            checkpoint.save(aside / self._file, {"state": dict(state), "settings": dict(settings)})
        self.processes.wait()
        if self.processes.first:
            if not final.exists():
                settle(aside)
                aside.replace(final)
                sync(self.folder)
            for older in self._all():
                if older != final:
                    shutil.rmtree(older)
        self.processes.wait()

    def load(self, path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The state this process has in a checkpoint. Raises `UsageError` naming the setting if it had other ones."""
        first = path / "rank-0.pt"
        try:
            saved = checkpoint.load(first)
            recorded = saved["settings"]
            for name, value in settings.items():
                if recorded.get(name) != value:
                    raise UsageError(
                        f"{path}: this run has {name} {recorded.get(name)!r}, not {value!r}; resume it with the "
                        "settings that it was started with, or start another --out"
                    )
            state: dict[str, Any] = (saved if self.processes.first else checkpoint.load(path / self._file))["state"]
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise UsageError(f"{path}: not a whole checkpoint ({' '.join(str(error).split())})") from None
        return state

    @property
    def _file(self) -> str:
        return f"rank-{self.processes.rank}.pt"


def _step(path: Path) -> int:
    named = _NAME.fullmatch(path.name)
    return int(named[1]) if named else -1
