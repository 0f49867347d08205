"""What a user should know of the routing chosen."""

from __future__ import annotations

from offload_engine.config import EngineConfig
from offload_engine.model.config import ModelConfig
from offload_engine.routing import RoutingOptions


def routing_notices(config: EngineConfig, model: ModelConfig, name: str, options: RoutingOptions) -> list[str]:
    """One line each: where accuracy may suffer, what the checkpoint chose, what is ignored."""
    notices = []
    distilled = model.distilled_top_p is not None
    if name == "dmoe" and not distilled:
        notices.append(
            f"routing dmoe (top-p {options.top_p:g}) on weights that were not distilled for it: "
            "expect some loss of accuracy"
        )
    if name == "block-capacity" and model.expert_capacity is None:
        notices.append(
            f"routing block-capacity ({options.expert_capacity} experts) on weights that were not made for it: "
            "expect some loss of accuracy"
        )
    if name == "dmoe" and options.residency_bonus:
        notices.append(
            f"residency_bonus is {options.residency_bonus:g}: answers depend on what the expert cache holds, "
            "and may differ from one run to the next"
        )
    if name != "dmoe":
        notices += [
            f"{option} is ignored: it is an option of routing dmoe, and routing is {name}"
            for option in ("residency_bonus", "hold_steps")
            if getattr(options, option) != getattr(RoutingOptions(), option)
        ]
    if config.routing is None and name == "dmoe":
        notices.append(
            f"the checkpoint was distilled for dMoE: routing dmoe, top-p {options.top_p:g}, "
            f"at least {options.min_experts} experts per block"
        )
    if config.routing is None and name == "block-capacity":
        notices.append(
            f"the checkpoint routes by block: routing block-capacity, {options.expert_capacity} experts per block"
        )
    return notices
