"""Planning: how a budget of fast memory is divided, and the refusal when it can't be."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from offload_engine.config import format_bytes
from offload_engine.errors import ConfigError, MemoryBudgetError
from offload_engine.memory import footprint
from offload_engine.memory.footprint import Forward, round_up
from offload_engine.memory.plan import RUNTIME_BYTES, MemoryPlan, Setup, prompt_tokens
from offload_engine.memory.reasons import reasons_of

if TYPE_CHECKING:
    from offload_engine.model.config import ModelConfig

MIN_SLOTS = 2
"""The fewest expert slots a plan may have: one computing, one loading."""
AUTO_CONTEXT = 4096
"""Positions an undecided context starts from, ..."""
AUTO_CONTEXT_STEP = 32
"""... in steps of which it grows ..."""
AUTO_KV_SHARE = 50
"""... while its KV cache takes at most 1/50 of the budget."""


def plan_memory(
    config: ModelConfig,
    setup: Setup,
    budget: int,
    *,
    max_context: int | None = None,
    expert_mem: int | None = None,
    host_mem: int | None = None,
    machine_limit: int | None = None,
) -> MemoryPlan:
    """Divide `budget` bytes of fast memory.

    `max_context` None: 4096 positions, more where their KV cache takes at most 2 % of the budget. Either way not more
    than the model has; a context cut down to that is a warning of the plan. `expert_mem` caps the slots alone;
    `host_mem` is the budget of the host tier, embedding table and bounce buffers included, None for no tier.
    `machine_limit`: bytes this process may reach in all (what it has and what is available), None where unknown. For a
    given `max_context`, a larger budget never has fewer slots.

    Raises `MemoryBudgetError`, whose message ends with the table, when a budget or the machine can't hold the plan with
    `MIN_SLOTS` slots; `ConfigError` for a context below 1, or a host tier on "cpu".
    """
    _refuse_unusable(setup, max_context, host_mem)
    context = max_context if max_context is not None else _auto_context(config, setup, budget)
    bare = _without_slots(config, setup, context, budget)
    least = replace(bare, slots=min(MIN_SLOTS, bare.all_experts))
    if least.total > budget:
        raise MemoryBudgetError(_too_small(config, setup, least))
    if expert_mem is not None and expert_mem < least.expert_slots:
        raise MemoryBudgetError(
            f"expert_mem is {format_bytes(expert_mem)}, but {least.slots} expert slots take "
            f"{_exact(least.expert_slots)}; set expert_mem to at least that, or leave it out"
            f"{_table(config, setup, least)}"
        )
    room = budget - bare.fixed if expert_mem is None else min(budget - bare.fixed, expert_mem)
    plan = replace(bare, slots=min(bare.all_experts, room // bare.slab_bytes))
    if host_mem is not None:
        plan = _with_host_tier(config, setup, plan, host_mem)
    if machine_limit is not None:
        plan = _held_by_machine(config, setup, plan, least.total, machine_limit)
    return replace(plan, reasons=reasons_of(plan, config, setup))


def smallest_budget(config: ModelConfig, setup: Setup, *, max_context: int | None = None) -> int:
    """The smallest budget `plan_memory` accepts: with one byte less it refuses."""
    context = max_context if max_context is not None else min(AUTO_CONTEXT, config.max_position_embeddings)
    bare = _without_slots(config, setup, context, 0)
    return bare.fixed + min(MIN_SLOTS, bare.all_experts) * bare.slab_bytes


def score_bytes(config: ModelConfig, setup: Setup, tokens: int) -> int:
    """Workspace of one forward over a whole sequence of `tokens` that returns all its logits, no cache involved.

    A plan doesn't allow for it; hold it against `MemoryPlan.workspace` and `spare` before running one.
    """
    forward = _forward(config, setup, tokens, tokens, block=1)
    logits = tokens * config.vocab_size * (setup.itemsize + footprint.FLOAT32)
    return footprint.workspace_bytes(config, forward, setup.device) + logits


def _forward(
    config: ModelConfig, setup: Setup, tokens: int, positions: int, block: int, prompt: int | None = None
) -> Forward:
    """The sizes of a forward; `prompt` None: one without a cache."""
    return Forward(
        tokens=tokens,
        positions=positions,
        block=block,
        choices=setup.choices or config.num_experts_per_tok,
        itemsize=setup.itemsize,
        dequantise=setup.stored_itemsize != setup.itemsize,
        prompt=prompt or 0,
        masked=prompt is None,
    )


def _refuse_unusable(setup: Setup, max_context: int | None, host_mem: int | None) -> None:
    if max_context is not None and max_context < 1:
        raise ConfigError(f"max_context is {max_context}, wanted at least 1")
    if setup.device == "cpu" and host_mem is not None:
        raise ConfigError(
            f"host_mem is {format_bytes(host_mem)}, but there is no host tier on a CPU-only machine; "
            f"leave host_mem out and give the memory to gpu_mem, which is RAM there"
        )


def _auto_context(config: ModelConfig, setup: Setup, budget: int) -> int:
    """The context for `max_context` None; never larger than leaves the smallest number of slots their place, so that
    a budget that holds `AUTO_CONTEXT` is never refused.
    """
    start = min(AUTO_CONTEXT, config.max_position_embeddings)
    share = budget // AUTO_KV_SHARE // (setup.sequences * footprint.kv_bytes_per_position(config, setup.itemsize))
    wanted = min(config.max_position_embeddings, _round_down(share))
    if wanted <= start:
        return start
    return max(start, min(wanted, _round_down(_largest_context(config, setup, budget))))


def _round_down(context: int) -> int:
    return context // AUTO_CONTEXT_STEP * AUTO_CONTEXT_STEP


def _largest_context(config: ModelConfig, setup: Setup, budget: int) -> int:
    """The largest multiple of the block length that `budget` holds with the fewest slots; 0 if there is none."""
    block = setup.block
    low, high = 0, config.max_position_embeddings // block
    while low < high:
        middle = (low + high + 1) // 2
        if smallest_budget(config, setup, max_context=middle * block) <= budget:
            low = middle
        else:
            high = middle - 1
    return low * block


def _without_slots(config: ModelConfig, setup: Setup, context: int, budget: int) -> MemoryPlan:
    """The plan of a model and a context, before any slot is given out."""
    warnings: tuple[str, ...] = ()
    if context > config.max_position_embeddings:
        warnings = (f"max_context is {context}, but this model has {config.max_position_embeddings} positions",)
        context = config.max_position_embeddings
    item, cuda = setup.itemsize, setup.device == "cuda"
    positions = round_up(context, setup.block)
    prompts = prompt_tokens(positions, setup.sequences)
    tokens = max(min(prompts, setup.chunk), min(setup.sequences * positions, setup.step_tokens))
    prompt = prompts if prompts > setup.chunk else 0
    forward = _forward(config, setup, tokens, positions, setup.block, prompt)
    step = _forward(config, setup, setup.block, positions, setup.block, prompt=0)
    graphs = footprint.step_graph_bytes(config, step) if setup.step_graphs else 0
    vocabulary = footprint.embedding_bytes(config, item)
    slab = setup.slab_bytes or footprint.estimated_slab_bytes(config, setup.stored_itemsize)
    hosted = cuda and not config.tie_word_embeddings  # a tied table is the lm head, which the device needs
    tables = 1 if hosted or config.tie_word_embeddings else 2
    results, shared = _sharing(config, setup, slab)
    return MemoryPlan(
        device=setup.device,
        budget=budget,
        weights=footprint.resident_bytes(config, item) + tables * vocabulary,
        kv_cache=setup.sequences * footprint.kv_bytes_per_position(config, item) * positions,
        workspace=footprint.workspace_bytes(config, forward, setup.device) + graphs,
        staging=(tokens * config.hidden_size * item if hosted else 0) + results,
        runtime=RUNTIME_BYTES[setup.device] if setup.runtime_bytes is None else setup.runtime_bytes,
        slab_bytes=slab,
        slots=0,
        all_experts=footprint.all_experts(config),
        moe_layers=len(config.moe_layers),
        context=context,
        kv_positions=positions,
        sequences=setup.sequences,
        forward_tokens=tokens,
        host_embedding=vocabulary if hosted else 0,
        host_staging=(setup.transfers_in_flight * slab if cuda else 0) + shared,
        host_slots=0,
        host_budget=None,
        reasons={},
        warnings=warnings,
    )


def _sharing(config: ModelConfig, setup: Setup, slab: int) -> tuple[int, int]:
    """Bytes on the device and on the host of what the CPU needs to compute experts beside it: activations, outputs, and
    an expert that has left the host tier at the last moment.
    """
    if setup.device != "cuda" or not setup.shared_tokens:
        return 0, 0
    choices = config.num_experts_per_tok if setup.choices is None else setup.choices
    down = footprint.shared_activation_bytes(setup.shared_tokens, config.hidden_size, setup.itemsize)
    up = footprint.shared_result_bytes(setup.shared_tokens * choices, config.hidden_size, setup.itemsize)
    return down + up, down + up + slab


def _with_host_tier(config: ModelConfig, setup: Setup, plan: MemoryPlan, host_mem: int) -> MemoryPlan:
    """`plan` with as many slots on the host as `host_mem` holds beside the embedding table and the bounce buffers."""
    room = host_mem - plan.host_total
    slots = min(plan.all_experts, max(room, 0) // plan.slab_bytes)
    tiered = replace(plan, host_budget=host_mem, host_slots=slots)
    fewest = min(MIN_SLOTS, plan.all_experts)
    if room < 0 or slots < fewest:
        least = replace(tiered, host_slots=fewest)
        raise MemoryBudgetError(
            f"host_mem is {format_bytes(host_mem)}, but embedding table, bounce buffers and {fewest} expert slots take "
            f"{_exact(least.host_total)}; set host_mem to at least that, or to none to read experts from disk"
            f"{_table(config, setup, least)}"
        )
    return tiered


def _held_by_machine(config: ModelConfig, setup: Setup, plan: MemoryPlan, least: int, limit: int) -> MemoryPlan:
    """`plan` with a warning if its budget exceeds what the machine can give; refused if its total does."""
    holder = "this GPU" if setup.device == "cuda" else "this machine"
    if plan.total > limit:
        if least > limit:
            way_out = f"this model needs at least {_exact(least)}: free memory, or use a larger machine"
        else:
            way_out = f"set gpu_mem to at most {limit} bytes, or free memory"
        raise MemoryBudgetError(
            f"gpu_mem is {format_bytes(plan.budget)} and allows a peak of {format_bytes(plan.total)}, but {holder} "
            f"has only {format_bytes(limit)} to give; {way_out}{_table(config, setup, plan)}"
        )
    if plan.budget > limit:
        warning = (
            f"gpu_mem is {format_bytes(plan.budget)}, but {holder} has only {format_bytes(limit)} to give; "
            f"this model's plan needs no more than {format_bytes(plan.total)}"
        )
        return replace(plan, warnings=(*plan.warnings, warning))
    return plan


def _too_small(config: ModelConfig, setup: Setup, least: MemoryPlan) -> str:
    """The refusal of a budget that doesn't hold `least`, the plan with the fewest slots."""
    context = _largest_context(config, setup, least.budget)
    shorter = f", or max_context to at most {context}" if 0 < context < least.context else ""
    return (
        f"gpu_mem is {format_bytes(least.budget)}, but the smallest budget for a context of {least.context} and "
        f"{least.slots} expert slots is {_exact(least.total)}; set gpu_mem to at least that{shorter}"
        f"{_table(config, setup, least)}"
    )


def _exact(size: int) -> str:
    """A size that can be typed as it stands, rounded up, and to the byte."""
    return f"{format_bytes(size, round_up=True)} ({size} bytes)"


def _table(config: ModelConfig, setup: Setup, plan: MemoryPlan) -> str:
    """The table that ends a refusal."""
    return "\n\n" + replace(plan, reasons=reasons_of(plan, config, setup)).table()
