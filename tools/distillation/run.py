"""What the command asks for, made a job: prompts read, teacher found, shards cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from offload_engine.cli.terminal import note
from offload_engine.config import EngineConfig
from offload_engine.core import SamplingParams
from offload_engine.errors import UsageError
from tools.distillation.job import make_dataset
from tools.distillation.local import LOCAL, answer_locally
from tools.distillation.prompts import read_prompts, refuse_unusable
from tools.distillation.shards import Receipt, Shard, cut
from tools.distillation.teacher import make_teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A dataset wanted. Fields are the command's options."""

    config: EngineConfig
    params: SamplingParams
    files: tuple[Path, ...]
    directory: Path
    field: str | None = None
    limit: int | None = None
    skip_bad: bool = False
    shard_size: int = 256
    workers: int = 1
    ray: str | None = None
    """Address of a Ray cluster; None: this machine, without Ray."""

    def check(self) -> None:
        """Raise `UsageError` for options that don't go together."""
        if self.ray not in (None, LOCAL) and self.workers > 1 and self.config.gpu_mem == "auto":
            raise UsageError(
                "--gpu-mem is auto, but a cluster may put several workers on one machine, and each would take most of "
                "its memory; give what one worker may have, such as --gpu-mem 8GB"
            )


def self_distil(request: Request) -> Mapping[str, Any]:
    """Make the dataset, or what is left of it; returns its counts. Raises `OffloadError`s."""
    request.check()
    found = read_prompts(request.files, name=request.field, limit=request.limit)
    if not request.skip_bad:
        refuse_unusable(found.prompts)  # before anything slow
    teacher, prompts = make_teacher(request.config, request.params, found.prompts)
    if not request.skip_bad:
        refuse_unusable(prompts)
    settings = {
        **teacher.settings(),
        "limit": request.limit,
        "skip_bad": request.skip_bad,
        "shard_size": request.shard_size,
        "prompts": {"field": request.field, "files": [asdict(file) for file in found.files]},
    }

    def answer(todo: Sequence[Shard]) -> Iterator[Receipt]:
        if request.ray is None:
            return answer_locally(request.directory, teacher, todo, request.workers)
        from tools.distillation.on_ray import answer_on_ray

        return answer_on_ray(request.directory, teacher, todo, request.workers, request.ray)

    note(f"{teacher.name} answers {len(prompts)} prompts, routing {teacher.routing['name']}")
    return make_dataset(request.directory, settings, cut(prompts, request.shard_size), answer)
