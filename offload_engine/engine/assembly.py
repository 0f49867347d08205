"""Puts an engine's parts together: from a config to a loaded model, a plan, and an executor with its slots."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from offload_engine import kernels
from offload_engine.config import EngineConfig
from offload_engine.decode.warm_up import warm_up
from offload_engine.engine.extending import Custom
from offload_engine.engine.learned import Learned, device_name, recall_tuning, routing_settings
from offload_engine.engine.notices import routing_notices
from offload_engine.engine.placement import (
    Gpu,
    choice_notice,
    find_gpu,
    layer_graphs,
    moving,
    share_with_cpu,
    shared_tokens,
    sharing_notice,
    without_kernels,
)
from offload_engine.engine.planning import RUNTIME_STEP, plan_for
from offload_engine.errors import CheckpointError, TokenizerError
from offload_engine.experts.arena import SlotArena
from offload_engine.experts.device.executor import DeviceExperts
from offload_engine.experts.executor import OffloadedExperts
from offload_engine.experts.hot_set import HotSet, recall, remember
from offload_engine.experts.scheduling.cache import ExpertCache
from offload_engine.experts.scheduling.eviction import make_eviction
from offload_engine.experts.scheduling.predictor import make_predictor
from offload_engine.experts.scheduling.scheduler import ExpertScheduler
from offload_engine.experts.storage.opening import open_store
from offload_engine.experts.storage.store import ExpertStore
from offload_engine.experts.transfer.cpu import CpuTransfers
from offload_engine.memory import MemoryPlan, Setup, available_memory
from offload_engine.memory.footprint import round_up
from offload_engine.memory.refusal import check_still_there
from offload_engine.metrics import EngineStats, reset_peak
from offload_engine.model.checkpoint import Checkpoint
from offload_engine.model.config import ModelConfig
from offload_engine.model.graphs import LayerGraphs
from offload_engine.model.hub import Progress, resolve_model
from offload_engine.model.llada2 import LLaDA2Model
from offload_engine.model.quantized import ExpertFormat
from offload_engine.model.weights import load_resident, unexpected_tensors
from offload_engine.routing import RoutingOptions, RoutingPolicy, SituatedCoreset, make_policy
from offload_engine.text import Tokenizer, load_tokenizer

BUILT_IN = Path(__file__).parents[1] / "assets" / "tiny"
"""The checkpoint of the built-in model."""

LLADA2_MASK, LLADA2_EOS = 156895, 156892
"""The special ids of published LLaDA2 checkpoints, for those that come without a tokenizer (REFERENCE §1)."""

RUNTIME_MARGIN = 8 * 2**20
"""Beside what the process takes once warm: stacks, the allocator's leftovers."""

SHAPES_MARGIN = 16 * 2**20
"""And where torch computes all products: oneDNN compiles for every shape, such as the tokens that an expert gets."""

SMALL_MATRIX = 2**18
"""Weights of the largest matrix of a layer, below which a model counts as small."""


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
    graphs: LayerGraphs | None
    """Of what layers do ahead of their experts; None: nothing is recorded."""
    threads: int | None
    """Compute threads; None: torch's choice."""
    notices: tuple[str, ...]
    """What the user should know and can't see: routing chosen, warnings of the plan."""

    @property
    def device(self) -> torch.device:
        """Where the layers run."""
        return torch.device("cpu") if self.gpu is None else self.gpu.device

    def notices_in_use(self) -> tuple[str, ...]:
        """What came up since."""
        return (*self.experts.transfers.notices, *(() if self.graphs is None else self.graphs.notices))

    def close(self) -> None:
        """Join all threads, free the slots, close every file. Idempotent."""
        try:
            self.experts.close()
        finally:
            self.store.close()

    def unload(self) -> None:
        """Close every file and free the weights, once nobody computes with them."""
        if self.graphs is not None:
            self.graphs.close()
        self.store.close()
        self.model.to("meta")


def find_source(config: EngineConfig, progress: Progress | None = None) -> Source:
    """Locate the model, download it if need be, and read what describes it. Raises `ModelError`s."""
    directory = BUILT_IN if config.model is None else resolve_model(config.model, progress=progress)
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
    margin = RUNTIME_MARGIN + (SHAPES_MARGIN if kernels.status().variant is None else 0)
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
        shared_tokens=shared_tokens(config, on_gpu=gpu is not None),
        step_graphs=gpu is not None and config.cuda_graphs != "off",
    )


def learned_for(config: EngineConfig, source: Source, policy: RoutingPolicy, gpu: Gpu | None) -> Learned | None:
    """What `dmoe tune` found for such a run; None if nothing, or nobody wants it."""
    if config.tuned == "off" or config.model is None or config.gpu_mem != "auto":
        return None
    device = device_name(None if gpu is None else gpu.name)
    settings = routing_settings(policy.name, routing_options(config, source.config))
    found = recall_tuning(source.directory)
    return next((one for one in found if one.serves(config, device, settings)), None)


def assemble(
    config: EngineConfig, stats: EngineStats, progress: Progress | None = None, custom: Custom | None = None
) -> Parts:
    """Find, plan, load. Nothing is allocated before the plan stands; nothing stays open if a step fails."""
    gpu = find_gpu(config)
    if gpu is None:
        reset_peak()  # what was before this engine, such as a larger one closed by now, is no business of its plan
    source = find_source(config, progress)
    model_config = source.config
    custom = custom or Custom()
    own = custom.make_routing(model_config.router)
    policy, notices = choose_policy(config, model_config) if own is None else (own, list[str]())
    notices += [*custom.notices, *_choice_notices(config, gpu)]
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
        learned, given = learned_for(config, source, policy, gpu), config
        config = config if learned is None else learned.applied(config)
        dtype = compute_dtype(config, model_config, store.format.dtype, gpu)
        notices += without_kernels(dtype, gpu)
        device = torch.device("cpu") if gpu is None else gpu.device
        warm_up(dtype, device)
        if gpu is not None:
            gpu.reset_peak()
        setup = setup_for(config, model_config, dtype=dtype, stored=store.format, slab_bytes=store.slab_bytes, gpu=gpu)
        plan = plan_for(config, model_config, setup, gpu, None if learned is None else learned.slots)
        notices += [] if learned is None else [learned.notice(plan.slots, plan.total, given)]
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
        share_with_cpu(config, model_config, setup, dtype, experts)
        if isinstance(policy, SituatedCoreset):
            policy = replace(policy, residents=experts.residents)
        threads, graphs = compute_threads(config, model_config), layer_graphs(config, gpu)
        undo.pop_all()
    notices += plan.warnings
    return Parts(source, setup, plan, policy, model, experts, store, dtype, gpu, graphs, threads, tuple(notices))


def _choice_notices(config: EngineConfig, gpu: Gpu | None) -> list[str]:
    """Which GPU was chosen unasked; what was asked for and only a GPU has, or only a host tier."""
    told = [notice for notice in (choice_notice(config, gpu), sharing_notice(config, gpu)) if notice is not None]
    if gpu is None and isinstance(config.host_mem, int):
        told.append("host_mem is ignored: on the CPU there is no host tier, gpu_mem is RAM already")
    if gpu is None and config.cuda_graphs == "on":
        told.append("cuda_graphs is ignored: the CPU has none")
    return told


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
    cache = ExpertCache(plan.slots, custom.make_eviction(lambda: make_eviction(config.eviction)))
    scheduler = ExpertScheduler(cache, config.transfers_in_flight)
    predictor = custom.make_predictor(lambda: make_predictor(config.predictor))
    policies = (scheduler, predictor, stats, config.prefetch_depth, hot)
    experts: OffloadedExperts
    with ExitStack() as undo:
        if gpu is None:
            arena = SlotArena(plan.slots, store.slab_bytes)
            undo.callback(arena.close)
            transfers = CpuTransfers(store, arena, config.reader_threads)
            undo.callback(transfers.close)
            experts = OffloadedExperts(store, arena, transfers, *policies)
        else:
            slots, copies, notices = moving(gpu, config, store, plan)
            undo.callback(slots.close)
            undo.callback(copies.close)
            experts = DeviceExperts(store, slots, copies, *policies)
        undo.pop_all()
    return experts, notices
