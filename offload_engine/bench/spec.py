"""What a contender is told to do, and what it reports: the two JSON documents that cross between the processes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from offload_engine.core import SamplingParams
from offload_engine.files import write_aside

Kind = Literal["engine", "unlimited", "mmap", "mmap-random", "torch", "torch-random", "accelerate", "mlx", "bandwidth"]
Count = Annotated[int, Field(ge=1)]

ENGINES: tuple[Kind, ...] = ("engine", "unlimited")
"""The kinds that run our executor; all others but `bandwidth` run every expert where another library puts it."""
TORCH: tuple[Kind, ...] = ("torch", "torch-random")
"""The kinds that compute as torch does, without our kernels: the model on mapped weights as others run it."""
FOREIGN: tuple[Kind, ...] = (*TORCH, "accelerate", "mlx")
"""The kinds whose products are another library's: their answers differ from ours by rounding."""

COMPONENTS = ("attention", "dense", "routing", "experts", "head")
"""What a step is made of, apart from waiting: attention with its projections and angles, and with the norms, sum and
router around it where one call computes them all; embedding, other norms, routers and sums into the residual stream,
dense and shared feed-forwards; the choice of experts from the routers' logits; routed
experts with their weighted sum; the LM head and the choice of tokens from its logits. What is left of a step's time is
scheduling, prediction and Python: its overhead."""


class Document(BaseModel):
    """A frozen document that refuses what it doesn't know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Workload(Document):
    """What every contender decodes: one answer to one prompt of fixed token ids."""

    prompt_tokens: Count = 64
    block_length: Count = 32
    steps: Count = 8
    """Denoising steps of a block: at threshold 1 the schedule alone decides, so that every block takes them all."""
    warm_up: Count = 1
    """Blocks decoded before the measured ones; the first one's step includes the prefill."""
    blocks: Count = 6
    """Blocks measured."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    seed: int = 0
    """Of the prompt, and of the sampler above temperature 0."""

    def sampling(self) -> SamplingParams:
        """How the answer is decoded. It ends with a block, the first of which may hold the end of the prompt."""
        return SamplingParams(
            max_new_tokens=self.block_length * (self.warm_up + self.blocks) - self.prompt_tokens % self.block_length,
            block_length=self.block_length,
            steps=min(self.steps, self.block_length),
            threshold=1.0,
            temperature=self.temperature,
            seed=self.seed,
        )


class Task(Document):
    """One contender."""

    name: str
    """`kind/routing`, and what else tells it from its siblings."""
    kind: Kind
    config: dict[str, Any] = {}
    """Fields of `EngineConfig`."""
    workload: Workload
    limited: bool = True
    """Whether it runs within the run's memory limit."""
    patience: Annotated[float, Field(gt=0)] = 900.0
    """Seconds after which an answer is cut short, and what was measured until then counts."""
    touched: int = 0
    """Bytes of memory to touch before the clock starts, as far as there are so many: what the model might take."""


class Measured(Document):
    """What one process of a contender measured, after its warm-up blocks."""

    step_seconds: list[float]
    """Duration of each denoising step."""
    seconds: dict[str, float]
    """Of these steps together, by what was done: `COMPONENTS` and "stall"; without those that were not told apart."""
    window_seconds: float
    """From the end of the warm-up to the end of the answer, commits included."""
    tokens: int
    """Answer tokens decided in that window."""
    disk_bytes: int | None
    """What the kernel says it fetched from disk in the window; None where it doesn't say."""
    peak_bytes: int
    """Largest resident set of the process, mapped files included."""
    answer: str
    """Digest of the answer's token ids: equal for contenders that compute the same."""
    startup_seconds: float
    """From the end of the imports to the first kernel of the first forward."""
    # Only where our decoder runs, whoever has the experts:
    requests: int | None = None
    """Experts asked for in the window, summed over MoE layers and forwards."""
    unique_experts: float | None = None
    """Distinct experts per MoE layer and denoising step."""
    expert_bytes: int | None = None
    """Bytes of one expert as it is stored."""
    step_bytes: float | None = None
    """Bytes of weights that a step has to read from memory: everything but the embedding table, and its experts."""
    step_flops: float | None = None
    """Operations of the products that a step can't do without."""
    # Only where our executor runs:
    loads: int | None = None
    """Transfers completed in the window."""
    bytes_moved: int | None = None
    belady_misses: int | None = None
    """Loads in the window under Belady's rule on the same requests, at the same slots; None for an unlimited budget,
    which has had them all before."""
    missed_bytes: int | None = None
    """See `overlap.Missed`."""
    early_bytes: int | None = None
    hidden_bytes: float | None = None
    slots: int | None = None
    planned_bytes: int | None = None
    resident_weights: int | None = None
    """Bytes of the weights that are not routed experts, as the plan counts them."""
    stats: dict[str, Any] | None = None
    """`EngineStats` of the window."""
    cut_short: bool = False
    """Patience ran out before the last block."""


class Bandwidth(Document):
    """What the machine gave in this run."""

    slab_bytes: int
    disk: dict[int, float]
    """Reads at once -> bytes per second, whole experts at random."""
    direct: bool
    """Whether these reads went past the page cache."""
    dram: float
    """Bytes per second of reading, all compute threads together."""
    gemm: float
    """Operations per second of a large product, in bf16 or where the CPU is faster at it, in float32."""
    fresh: float | None = None
    """Bytes per second of touching memory for the first time; None if not measured."""


class Report(Document):
    """What a contender's process leaves behind; one of the three is there."""

    measured: Measured | None = None
    bandwidth: Bandwidth | None = None
    error: str | None = None


class Run(Document):
    """One process of a contender, as its parent saw it."""

    task: str
    round: int
    report: Report
    seconds: float
    limit: int | None = None
    """Bytes its control group was allowed; None without one."""
    group_peak: int | None = None
    """The most its control group used at once, page cache included."""
    oom_kills: int = 0


def write_document(path: Path, document: Document) -> None:
    """Write it as JSON, whole or not at all."""
    write_aside(path, document.model_dump_json().encode())
