"""A peer: mlx-vlm's own LLaDA2-MoE, network and block-diffusion decoder, with every weight in memory.

mlx and mlx-vlm are no dependencies of this package; where they can't be imported their contenders are left out, and
that is told. One thing is not as mlx-vlm has it: on a CPU mlx knows products with gathered experts in float32 alone
(`[GatherMM::eval] Currently only supports float32`), so that there the experts are widened to it, and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from offload_engine.bench.spec import Measured, Task
from offload_engine.bench.yardstick import digest, disk_bytes, out_of_patience, prompt_ids
from offload_engine.config import format_bytes
from offload_engine.core import SamplingParams
from offload_engine.engine.assembly import Source
from offload_engine.errors import MemoryBudgetError, TokenizerError
from offload_engine.memory.machine import available_memory
from offload_engine.metrics import measure_peak, reset_peak
from offload_engine.model.checkpoint import Checkpoint

FLOAT32_BYTES = 4
NO_TOKEN = -1
"""An eos that never comes, so that all blocks are decoded."""


class PatienceError(Exception):
    """Time is up in the middle of an answer."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward through the network."""

    began: float
    """In seconds of `time.perf_counter`."""
    masked: int
    """Tokens of its input that are masks."""


@dataclass(frozen=True, slots=True)
class Block:
    """A block with all its forwards: the denoising steps and, where it was finished, the commit."""

    passes: Sequence[Pass]
    ended: float
    disk: int | None
    """`disk_bytes` when it ended."""


@dataclass(slots=True)
class Watch:
    """Stands before mlx-vlm's network and notes its forwards, block by block.

    What mlx-vlm asks before each step, whether a mask is left, makes mlx finish the step before: the time between the
    beginnings of two forwards is that of the first, with the choice of its tokens.
    """

    network: Any
    mask_token_id: int
    deadline: float
    blocks: list[Block] = field(default_factory=list)
    _passes: list[Pass] = field(default_factory=list)

    def __call__(self, tokens: Any, **keywords: Any) -> Any:
        """Run the network; raises `PatienceError` when the deadline has passed."""
        self._passes.append(Pass(time.perf_counter(), int((tokens == self.mask_token_id).sum().item())))
        if self._passes[-1].began > self.deadline:
            self.end_block()
            raise PatienceError
        return self.network(tokens, **keywords)

    def __getattr__(self, name: str) -> Any:
        """Whatever else the network offers."""
        return getattr(self.network, name)

    def end_block(self, _answer: Sequence[int] = ()) -> bool:
        """What mlx-vlm calls when a block is committed; True has it go on."""
        self.blocks.append(Block(tuple(self._passes), time.perf_counter(), disk_bytes()))
        self._passes = []
        return True


def measure_mlx(source: Source, task: Task, began: float) -> Measured:
    """Decode the task's answer with mlx-vlm. `began`: when the process had imported everything of ours.

    Raises `ImportError` without mlx-vlm, `MemoryBudgetError` where a run without a limit would take more memory than
    the machine has left, `OffloadError` when patience ends within the warm-up.
    """
    import mlx.core as mx

    if source.mask_token_id is None:
        raise TokenizerError(f"{source.directory}: nothing says which token is the mask; pass mask_token_id")
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    if not task.limited:  # within a limit the kernel says when it is too much
        _require_room(source, widened=on_cpu)
    reset_peak()
    language = _load(source, widen=on_cpu)
    watch = Watch(language.model, source.mask_token_id, time.perf_counter() + task.patience)
    language.model = watch
    answer = _decode(language, prompt_ids(source.mask_token_id, source.config.vocab_size, task.workload), task, watch)
    return measured(task, watch.blocks, answer, watch.blocks[0].passes[0].began - began)


def measured(task: Task, blocks: Sequence[Block], answer: Sequence[int] | None, startup: float) -> Measured:
    """What `blocks` say of the time after the warm-up; `answer` is None where patience ended it.

    Raises `OffloadError` when no step was measured.
    """
    warm_up, window = blocks[: task.workload.warm_up], blocks[task.workload.warm_up :]
    steps = [step for block in window for step in pairwise(block.passes)]
    if not steps:
        raise out_of_patience(task)
    before, after = warm_up[-1], window[-1]
    return Measured(
        step_seconds=[later.began - earlier.began for earlier, later in steps],
        seconds={},
        window_seconds=after.ended - before.ended,
        tokens=sum(earlier.masked - later.masked for earlier, later in steps),
        disk_bytes=None if before.disk is None or after.disk is None else after.disk - before.disk,
        peak_bytes=measure_peak(),
        answer="" if answer is None else digest(answer),
        startup_seconds=startup,
        cut_short=answer is None,
    )


def bytes_in_memory(checkpoint: Checkpoint, *, widened: bool) -> int:
    """What the weights take once they are loaded; `widened`: the experts in float32."""
    total = 0
    for name, tensor in checkpoint.tensors.items():
        grown = widened and ".experts." in name
        total += tensor.nbytes * (FLOAT32_BYTES // min(tensor.dtype.itemsize, FLOAT32_BYTES) if grown else 1)
    return total


def _require_room(source: Source, *, widened: bool) -> None:
    wanted, there = bytes_in_memory(Checkpoint.open(source.directory), widened=widened), available_memory()
    if wanted > there:
        how = ", the experts in float32" if widened else ""
        raise MemoryBudgetError(
            f"{source.directory}: mlx-vlm keeps every weight in memory, {format_bytes(wanted)}{how}; "
            f"{format_bytes(there)} are available, wanted a model of fewer --layers, or --only without mlx-unlimited"
        )


def _load(source: Source, *, widen: bool) -> Any:
    """mlx-vlm's language model, all its weights read. One matrix of all experts at a time is there twice."""
    import mlx.core as mx
    from mlx_vlm.utils import load_model

    language = load_model(source.directory, lazy=True).language_model
    for layer in language.layers if widen else ():
        if hasattr(layer.mlp, "switch_mlp"):
            experts = layer.mlp.switch_mlp
            for matrices in (experts.gate_proj, experts.up_proj, experts.down_proj):
                matrices.set_dtype(mx.float32)
                mx.eval(matrices.parameters())
                mx.clear_cache()
            layer.mlp.switch_mlp = _in_float32(experts)
    mx.eval(language.parameters())
    mx.clear_cache()
    return language


def _in_float32(experts: Any) -> Any:
    """The experts, for hidden states of any dtype."""
    import mlx.core as mx
    from mlx import nn

    class Widened(nn.Module):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.experts = experts

        def __call__(self, hidden: Any, chosen: Any) -> Any:
            return self.experts(hidden.astype(mx.float32), chosen).astype(hidden.dtype)

    return Widened()


def _decode(language: Any, prompt: Sequence[int], task: Task, watch: Watch) -> list[int] | None:
    """The answer's tokens; None where patience ended it.

    At threshold 0 every mask is certain enough, so that the cap alone decides: as many tokens per step as the schedule
    of our decoder takes, where the steps divide the block.
    """
    import mlx.core as mx

    params: SamplingParams = task.workload.sampling()
    mx.random.seed(params.seed or 0)
    try:
        answer = language.generate(
            mx.array([prompt]),
            temperature=params.temperature,
            block_length=params.block_length,
            steps=params.steps,
            gen_length=params.max_new_tokens,
            threshold=0.0,
            max_transfer_per_step=-(-params.block_length // params.steps),
            eos_id=NO_TOKEN,
            mask_id=watch.mask_token_id,
            on_block=watch.end_block,
        )
    except PatienceError:
        return None
    ids: list[int] = answer[0].tolist()
    return ids
