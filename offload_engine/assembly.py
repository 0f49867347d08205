"""Puts an engine's parts together: from a config to a loaded model, a plan, and an executor with its slots."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from offload_engine import kernels
from offload_engine.config import EngineConfig
from offload_engine.decode.warm_up import warm_up
from offload_engine.errors import CheckpointError, MemoryBudgetError, TokenizerError
from offload_engine.experts.arena import SlotArena, Slots
from offload_engine.experts.cache import ExpertCache
from offload_engine.experts.eviction import make_eviction
from offload_engine.experts.executor import OffloadedExperts
from offload_engine.experts.hot_set import HotSet, recall, remember
from offload_engine.experts.opening import open_store
from offload_engine.experts.predictor import make_predictor
from offload_engine.experts.scheduler import ExpertScheduler
from offload_engine.experts.store import ExpertStore
from offload_engine.experts.transfer.base import TransferBackend
from offload_engine.experts.transfer.cpu import CpuTransfers
from offload_engine.extending import Custom
from offload_engine.memory import MemoryPlan, Setup, auto_budget, available_memory, plan_memory
from offload_engine.memory.footprint import round_up
from offload_engine.memory.refusal import check_still_there
from offload_engine.metrics import EngineStats, reset_peak
from offload_engine.model.checkpoint import Checkpoint
from offload_engine.model.config import ModelConfig
from offload_engine.model.hub import resolve_model
from offload_engine.model.llada2 import LLaDA2Model
from offload_engine.model.quantized import ExpertFormat
from offload_engine.model.weights import load_resident, unexpected_tensors
from offload_engine.placement import Gpu, find_gpu, moving
from offload_engine.routing import RoutingOptions, RoutingPolicy, SituatedCoreset, make_policy
from offload_engine.routing_notices import routing_notices
from offload_engine.text import Tokenizer, load_tokenizer

BUILT_IN = Path(__file__).parent / "assets" / "tiny"
"""The checkpoint of the built-in model."""

LLADA2_MASK, LLADA2_EOS = 156895, 156892
"""The special ids of published LLaDA2 checkpoints, for those that come without a tokenizer (REFERENCE §1)."""

RUNTIME_MARGIN = 16 * 2**20
"""Beside what the process takes once warm: kernels compiled for further shapes, stacks, the allocator's leftovers."""

EXPERT_SHAPES_MARGIN = 8 * 2**20
"""And where torch computes the experts: oneDNN compiles for every number of tokens that one of them gets."""

SMALL_MATRIX = 2**18
"""Weights of the largest matrix of a layer, below which a model counts as small."""

RUNTIME_STEP = 8 * 2**20
"""What the process takes is rounded up to this: no two runs measure the same."""

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done and how much there is, in bytes."""


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint found and understood, nothing of its weights read yet."""

    name: str
    directory: Path
    config: ModelConfig
    tokenizer: Tokenizer | None
    mask_token_id: int | None
    """None where nobody says what it is: such a checkpoint gives logits and routing, but generates nothing."""
    eos_token_id: int | None


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything an engine is made of."""

    source: Source
    setup: Setup
    plan: MemoryPlan
    policy: RoutingPolicy
    model: LLaDA2Model
    experts: OffloadedExperts
    store: ExpertStore
    dtype: torch.dtype
    gpu: Gpu | None
    """None: everything runs on the CPU."""
    threads: int | None
    """Compute threads; None: torch's choice."""
    notices: tuple[str, ...]
    """What the user should know and can't see: routing chosen, warnings of the plan."""

    @property
    def device(self) -> torch.device:
        """Where the layers run."""
        return torch.device("cpu") if self.gpu is None else self.gpu.device

    def close(self) -> None:
        """Join all threads, free the slots, close every file. Idempotent."""
        try:
            self.experts.close()
        finally:
            self.store.close()


def find_source(config: EngineConfig) -> Source:
    """Locate the model and read what describes it. Raises `ModelError`s."""
    directory = BUILT_IN if config.model is None else resolve_model(config.model)
    model_config = ModelConfig.from_file(directory / "config.json")
    tokenizer = load_tokenizer(directory, model_config.vocab_size)
    return Source(
        name="built-in" if config.model is None else config.model,
        directory=directory,
        config=model_config,
        tokenizer=tokenizer,
        mask_token_id=_special_id("mask", config.mask_token_id, tokenizer, model_config),
        eos_token_id=_special_id("eos", config.eos_token_id, tokenizer, model_config),
    )


def _special_id(kind: str, override: int | None, tokenizer: Tokenizer | None, config: ModelConfig) -> int | None:
    """The first that is known of: the override, the tokenizer's, config.json's, LLaDA2's if the vocabulary holds it.
    Refused if outside the vocabulary.
    """
    own = config.mask_token_id if kind == "mask" else config.eos_token_id
    if isinstance(own, list):
        own = own[0] if own else None
    if kind == "eos" and own is None:
        own = config.pad_token_id  # the same token in LLaDA2 (REFERENCE §1)
    of_tokenizer = getattr(tokenizer, f"{kind}_token_id") if tokenizer else None
    default = LLADA2_MASK if kind == "mask" else LLADA2_EOS
    found = next((value for value in (override, of_tokenizer, own) if value is not None), None)
    if found is None:
        return default if default < config.vocab_size else None
    if not 0 <= found < config.vocab_size:
        raise TokenizerError(
            f"the {kind} token id is {found}, but the vocabulary has {config.vocab_size} entries; "
            f"pass {kind}_token_id with the checkpoint's own"
        )
    return found


def choose_policy(config: EngineConfig, model: ModelConfig) -> tuple[RoutingPolicy, list[str]]:
    """The routing asked for, or the checkpoint's own; and what to tell the user about it."""
    name = config.routing or native_routing(model)
    options = routing_options(config, model)
    return make_policy(name, model.router, options), routing_notices(config, model, name, options)


def native_routing(model: ModelConfig) -> str:
    """The policy that a checkpoint was made for."""
    if model.distilled_top_p is not None:
        return "dmoe"
    return "block-capacity" if model.expert_capacity is not None else "original"


def routing_options(config: EngineConfig, model: ModelConfig) -> RoutingOptions:
    """What the config says; failing that the checkpoint; failing that the policies' defaults."""
    defaults = RoutingOptions()
    return RoutingOptions(
        top_p=config.top_p or model.distilled_top_p or defaults.top_p,
        min_experts=config.min_experts or model.core_min_experts or defaults.min_experts,
        top_k_experts=config.top_k_experts,
        des_k=config.des_k,
        des_beta=config.des_beta,
        expert_capacity=config.expert_capacity or model.expert_capacity or defaults.expert_capacity,
        residency_bonus=config.residency_bonus,
        hold_steps=config.hold_steps,
    )


def compute_dtype(config: EngineConfig, model: ModelConfig, stored: torch.dtype, gpu: Gpu | None = None) -> torch.dtype:
    """What to compute in. Auto is the stored dtype, but float32 where that is faster on a CPU: for fp16, and for models
    whose products are small; and fp16 on a GPU that has no bf16.
    """
    if config.dtype != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[config.dtype]
    if gpu is not None:
        return torch.float16 if stored == torch.bfloat16 and not gpu.has_bfloat16 else stored
    return torch.float32 if stored == torch.float16 or is_small(model) else stored


def compute_threads(config: EngineConfig, model: ModelConfig) -> int | None:
    """How many threads to compute with; None is torch's choice."""
    return 1 if config.threads is None and is_small(model) else config.threads


def is_small(model: ModelConfig) -> bool:
    """Whether a product of the model is over before a second thread has woken up or a 16-bit kernel has paid."""
    return model.hidden_size * model.intermediate_size < SMALL_MATRIX


def setup_for(
    config: EngineConfig,
    model: ModelConfig,
    *,
    dtype: torch.dtype,
    stored: ExpertFormat,
    slab_bytes: int | None = None,
    gpu: Gpu | None = None,
) -> Setup:
    """What decides the memory a run takes, for this process as it stands."""
    margin = RUNTIME_MARGIN + (EXPERT_SHAPES_MARGIN if kernels.status().variant is None else 0)
    process = round_up(psutil.Process().memory_info().rss + margin, RUNTIME_STEP)
    return Setup(
        device="cpu" if gpu is None else "cuda",
        itemsize=dtype.itemsize,
        stored_itemsize=stored.itemsize,
        slab_bytes=slab_bytes,
        prefill_chunk=config.prefill_chunk,
        sequences=config.batch_size,
        fused_commit=config.fused_commit,
        choices=max(config.top_k_experts, model.num_experts_per_tok) if config.routing == "top-k" else None,
        runtime_bytes=process if gpu is None else gpu.context_bytes(),
        transfers_in_flight=config.transfers_in_flight,
    )


def plan_for(config: EngineConfig, model: ModelConfig, setup: Setup, gpu: Gpu | None = None) -> MemoryPlan:
    """Divide the budget, or what the machine has. Raises `MemoryBudgetError`."""
    reachable = gpu.reachable() if gpu is not None else psutil.Process().memory_info().rss + available_memory()
    budget = auto_budget(reachable, setup.device) if config.gpu_mem == "auto" else config.gpu_mem

    def plan(setup: Setup) -> MemoryPlan:
        return plan_memory(
            model,
            setup,
            budget,
            max_context=config.max_context,
            expert_mem=config.expert_mem,
            host_mem=None if gpu is None else host_budget(config),
            machine_limit=reachable,
        )

    if gpu is not None:
        return _held_by_host(plan(setup))
    try:
        return plan(setup)
    except MemoryBudgetError as error:
        refusal = error
    # The next process may measure itself larger: nearly 60 MB where the libraries were not in the page cache when this
    # one touched them. The budget that the refusal names must do for it too, and be the only one that it names.
    plan(replace(setup, runtime_bytes=(setup.runtime_bytes or 0) + 8 * RUNTIME_STEP))
    raise refusal


def host_budget(config: EngineConfig) -> int | None:
    """Bytes of the host tier; None: there is none."""
    return auto_budget(available_memory(), "host") if config.host_mem == "auto" else config.host_mem


def _held_by_host(plan: MemoryPlan) -> MemoryPlan:
    """`plan`, if this machine has the RAM that it takes: pages of it can't be swapped. Raises `MemoryBudgetError`."""
    left = available_memory()
    if plan.host_total > left:
        raise MemoryBudgetError(
            f"host tier, its buffers and embedding table take {plan.host_total} bytes, but this machine has only "
            f"{left} to give; set host_mem to at most that, or to none to read experts from disk\n\n{plan.table()}"
        )
    return plan


def assemble(
    config: EngineConfig, stats: EngineStats, progress: Progress | None = None, custom: Custom | None = None
) -> Parts:
    """Find, plan, load. Nothing is allocated before the plan stands; nothing stays open if a step fails."""
    gpu = find_gpu(config)
    if gpu is None:
        reset_peak()  # what was before this engine, such as a larger one closed by now, is no business of its plan
    source = find_source(config)
    model_config = source.config
    custom = custom or Custom()
    own = custom.make_routing(model_config.router)
    policy, notices = choose_policy(config, model_config) if own is None else (own, list[str]())
    notices += custom.notices
    if gpu is None and isinstance(config.host_mem, int):
        notices.append("host_mem is ignored: on the CPU there is no host tier, gpu_mem is RAM already")
    ends = model_config.eos_token_id
    if isinstance(ends, list) and len(ends) > 1 and source.eos_token_id == ends[0]:
        notices.append(f"config.json names {len(ends)} eos ids; answers end with the first, {ends[0]}, alone")
    checkpoint = Checkpoint.open(source.directory)
    unused = unexpected_tensors(model_config, checkpoint)
    if unused:
        notices.append(f"{len(unused)} tensors of the checkpoint are not used, {unused[0]} the first of them")
    if not model_config.moe_layers:
        raise CheckpointError(f"{source.directory}: the model has no MoE layer, so there is nothing to offload")
    with ExitStack() as undo:
        store = open_store(model_config, checkpoint, verify=config.verify)
        undo.callback(store.close)
        dtype = compute_dtype(config, model_config, store.format.dtype, gpu)
        if gpu is None and dtype == torch.bfloat16 and kernels.status().variant is None:
            notices.append(f"torch computes the experts, more slowly than our kernel would: {kernels.status().reason}")
        device = torch.device("cpu") if gpu is None else gpu.device
        warm_up(dtype, device)
        if gpu is not None:
            gpu.reset_peak()
        setup = setup_for(config, model_config, dtype=dtype, stored=store.format, slab_bytes=store.slab_bytes, gpu=gpu)
        plan = plan_for(config, model_config, setup, gpu)
        model = load_resident(
            model_config,
            checkpoint,
            dtype,
            device,
            None if progress is None else lambda done, total: progress("weights", done, total),
        )
        remembered = recall(source.directory, store.keys()) if keeps_hot_set(config) else None
        if remembered is not None and remembered.notice:
            notices.append(remembered.notice)
        experts, slower = _executor(config, custom, store, plan, stats, remembered.hot if remembered else None, gpu)
        notices += slower
        undo.callback(experts.close)  # before the store: its threads read from there
        if isinstance(policy, SituatedCoreset):
            policy = replace(policy, residents=experts.residents)
        threads = compute_threads(config, model_config)
        undo.pop_all()
    return Parts(source, setup, plan, policy, model, experts, store, dtype, gpu, threads, (*notices, *plan.warnings))


def keeps_hot_set(config: EngineConfig) -> bool:
    """Whether the run starts with what earlier ones used most. Not where an answer depends on what the cache holds."""
    return config.hot_set == "on" and config.model is not None and not config.residency_bonus


def keep_hot_set(config: EngineConfig, parts: Parts) -> None:
    """At the end of a run: remember what it used most, where that is wanted. Never raises for what the disk does."""
    if keeps_hot_set(config):
        remember(parts.source.directory, parts.experts.hot, parts.plan.slots)


def _executor(
    config: EngineConfig,
    custom: Custom,
    store: ExpertStore,
    plan: MemoryPlan,
    stats: EngineStats,
    hot: HotSet | None,
    gpu: Gpu | None,
) -> tuple[OffloadedExperts, tuple[str, ...]]:
    """The executor, and what the user should know of how it moves experts."""
    check_still_there(plan, available_memory() if gpu is None else gpu.free())
    notices: tuple[str, ...] = ()
    with ExitStack() as undo:
        arena: Slots
        transfers: TransferBackend
        if gpu is None:
            arena = SlotArena(plan.slots, store.slab_bytes)
            undo.callback(arena.close)
            transfers = CpuTransfers(store, arena, config.reader_threads)
        else:
            arena, transfers, notices = moving(gpu, config, store, plan)
            undo.callback(arena.close)
        undo.callback(transfers.close)
        cache = ExpertCache(plan.slots, custom.make_eviction(lambda: make_eviction(config.eviction)))
        experts = OffloadedExperts(
            store=store,
            arena=arena,
            transfers=transfers,
            scheduler=ExpertScheduler(cache, config.transfers_in_flight),
            predictor=custom.make_predictor(lambda: make_predictor(config.predictor)),
            stats=stats,
            prefetch_depth=config.prefetch_depth,
            hot=hot,
        )
        undo.pop_all()
    return experts, notices
