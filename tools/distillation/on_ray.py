"""Shards answered by the workers of a Ray cluster, as a Ray Data pipeline over shard descriptors.

Driver and workers meet in the dataset's directory, which all of them must see at the same path. Ray replaces a lost
worker as often as it takes, and its shard goes on from the journal that it left; but where `ATTEMPTS` workers in turn
were lost before they added a line to a shard, the job ends.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload_engine import errors
from offload_engine.errors import OffloadError, UsageError
from tools.distillation.local import LOCAL, WORKER_KILLED, sharing_memory
from tools.distillation.prompts import Prompt
from tools.distillation.shards import (
    Receipt,
    Shard,
    begin_attempt,
    forget_fruitless_attempts,
    fruitless_attempts,
    generate_shard,
)
from tools.distillation.teacher import Answering, Teacher

if TYPE_CHECKING:
    import pyarrow

ATTEMPTS = 3
"""Workers that a shard may cost without getting any further."""

_OBJECT_STORE_BYTES = 100 * 2**20
"""Of a local cluster: only descriptors and receipts pass through it."""
_REACH_SECONDS = 10
_ROOT = Path(__file__).resolve().parents[2]
_CODE = [str(_ROOT / "tools"), str(_ROOT / "offload_engine")]
"""What workers import, sent to them as it is here, so that no other version of it answers."""


def answer_on_ray(
    directory: Path, teacher: Teacher, shards: Sequence[Shard], workers: int, address: str
) -> Iterator[Receipt]:
    """The receipts of `shards` as they are put in place by `workers` Ray actors. Raises `OffloadError`s.

    `address` is that of a running cluster ("auto": the one this machine belongs to), or `LOCAL`.
    """
    if not shards:
        return
    workers = min(workers, len(shards))
    for shard in shards:
        forget_fruitless_attempts(directory, shard)  # an earlier run's, which may have had less memory
    cores = teacher.config.threads or 1  # Ray has torch compute with as many threads as an actor has cores
    if address == LOCAL:
        teacher = sharing_memory(teacher, workers)
    with _cluster(address, workers * cores):
        import ray.data
        from ray.exceptions import RayError

        settings = ray.data.DataContext.get_current()
        settings.enable_progress_bars = False
        settings.print_on_execution_start = False
        settings.execution_no_progress_timeout_s = -1  # hours may pass before the first shard is done
        pipeline = ray.data.from_items(list(map(_descriptor, shards)), override_num_blocks=len(shards)).map_batches(
            Answerer,
            fn_constructor_args=(str(directory.resolve()), teacher),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
            num_cpus=cores,
        )
        try:
            for row in pipeline.iter_rows():
                yield _receipt(row)
        except RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise OffloadError(f"Ray gave up ({reason}); run the same command again to go on") from error


class Answerer:
    """A Ray actor with an engine. Failures that a user can meet come back as rows: Ray would bury them in its own."""

    def __init__(self, directory: str, teacher: Teacher) -> None:
        self._directory = Path(directory)
        self._teacher = teacher
        self._answering: Answering | None = None

    def __call__(self, descriptors: pyarrow.Table) -> Mapping[str, list[str]]:
        """Generate the shards described; a receipt or an error for each."""
        return {"outcome": [json.dumps(self._outcome(row)) for row in descriptors.to_pylist()]}

    def _outcome(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        shard = Shard(row["index"], tuple(Prompt(**prompt) for prompt in row["prompts"]))
        try:
            if (lost := fruitless_attempts(self._directory, shard)) >= ATTEMPTS:
                raise OffloadError(f"{shard.name} got no further with {lost} workers in turn: {WORKER_KILLED}")
            journal = begin_attempt(self._directory, shard)  # before anything that may cost this worker its life
            if self._answering is None:
                self._answering = self._teacher.open()
            return {"receipt": asdict(generate_shard(self._directory, shard, self._answering, journal))}
        except OffloadError as error:
            return {"error": type(error).__name__, "message": str(error)}
        except OSError as error:
            return {"error": OffloadError.__name__, "message": f"{self._directory}: can't be written ({error})"}


def _descriptor(shard: Shard) -> dict[str, Any]:
    return {"index": shard.index, "prompts": [asdict(prompt) for prompt in shard.prompts]}


def _receipt(row: Mapping[str, Any]) -> Receipt:
    outcome = json.loads(row["outcome"])
    if "error" in outcome:
        raise getattr(errors, outcome["error"])(outcome["message"])
    return Receipt(**outcome["receipt"])


@contextmanager
def _cluster(address: str, cores: int) -> Iterator[None]:
    """Connected to a cluster; a local one, of so many `cores`, is started, and ends with this.

    Raises `UsageError` where there is none.
    """
    os.environ.update({key: value for key, value in _environment(address).items() if key not in os.environ})
    try:
        import ray
        import ray.data  # needs pyarrow, which Ray alone does not bring
    except ImportError as error:
        raise UsageError(f"--ray needs Ray Data ({error}); install the extra: offload-engine[scale]") from None
    options: dict[str, Any] = {
        "runtime_env": {"py_modules": _CODE, "excludes": ["__pycache__"]},
        "logging_level": "ERROR",
        "log_to_driver": False,
    }
    if address == LOCAL:
        options |= {"num_cpus": cores, "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    try:
        _reach(address)
        ray.init(address=address, **options)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--ray {address}: no cluster there ({reason}); start one, or use --ray {LOCAL}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _environment(address: str) -> dict[str, str]:
    """Settings that Ray reads from the environment alone, most of them when it is imported."""
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_LOG_LEVEL": "ERROR"}
    if address != LOCAL:
        return quiet
    return quiet | {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # in spite of its name: listen on the loopback interface alone
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),  # of this cluster's own, or Ray leaves one in the user's home
    }


def _reach(address: str) -> None:
    """Raises `OSError` where nobody listens at HOST:PORT: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_SECONDS).close()
