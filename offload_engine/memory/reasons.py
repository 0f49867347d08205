"""How each number of a plan came about, in words for its table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_engine.config import format_bytes

if TYPE_CHECKING:
    from offload_engine.memory.plan import MemoryPlan, Setup
    from offload_engine.model.config import ModelConfig


def reasons_of(plan: MemoryPlan, config: ModelConfig, setup: Setup) -> dict[str, str]:
    """The reason of every row of `plan.table()` that needs one."""
    slab = format_bytes(plan.slab_bytes)
    measured = "estimated" if setup.runtime_bytes is None else "measured"
    where = "CUDA context and libraries" if plan.device == "cuda" else "the process without the model"
    graphs = ", and recordings of attention in denoising steps" if setup.step_graphs else ""
    several = f"{plan.sequences} sequences x " if plan.sequences > 1 else ""
    shared = ", outputs of experts computed on the CPU" if setup.shared_tokens else ""
    return {
        "weights": _weights(plan, config, setup),
        "KV cache": (
            f"{several}{plan.kv_positions} positions x {config.num_hidden_layers} layers x keys and values of "
            f"{config.num_key_value_heads} heads x {config.head_dim}, {setup.itemsize} bytes each"
        ),
        "workspace": f"upper bound for {plan.forward_tokens} tokens that see {plan.kv_positions} positions{graphs}",
        "staging": f"embedding rows of {plan.forward_tokens} tokens{shared}",
        "runtime": f"{where}, {measured}",
        "expert slots": (
            f"{plan.slots} of {plan.all_experts} experts x {slab}, {plan.slots_per_layer:.1f} per MoE layer"
            if plan.all_experts
            else "this model routes nothing"
        ),
        "total": "planned peak",
        "spare": _spare(plan),
        "embedding table": "only the rows of a forward's tokens go to the device" if plan.host_embedding else "none",
        "bounce buffers": f"{setup.transfers_in_flight} transfers in flight x {slab}"
        + (f"; activations and outputs of {setup.shared_tokens} tokens, {slab}" if setup.shared_tokens else ""),
        "host slots": f"{plan.host_slots} of {plan.all_experts} experts x {slab}",
    }


def _weights(plan: MemoryPlan, config: ModelConfig, setup: Setup) -> str:
    tables = "lm head" if plan.host_embedding else "embedding, lm head"
    if config.tie_word_embeddings:
        tables = "embedding tied to the lm head"
    shared = ", shared experts" if config.moe_layers and config.shared_intermediate_size else ""
    return f"all but routed experts: {tables}, attention, dense layers{shared}; {setup.itemsize} bytes each, routers 4"


def _spare(plan: MemoryPlan) -> str:
    if plan.slots == plan.all_experts:
        return "every expert has its slot"
    return "less than one slot" if plan.spare < plan.slab_bytes else "expert_mem caps the slots"
