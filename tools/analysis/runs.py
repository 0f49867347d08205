"""Which evaluations the tables are made of."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from tools.analysis.study import BLOCK, Effort, Role

BASELINE = "original"
OURS = "dmoe-p0.6"
MATCHED = "des-vote-keep"
"""Beginning of the names of the runs that try to match dMoE's compression."""


@dataclass(frozen=True)
class Run:
    """One evaluation of one model under one routing."""

    name: str
    """Names its folder, after the task's name."""
    label: str
    """What tables call it."""
    role: Role
    routing: dict[str, Any] = field(hash=False)
    """Fields of `EngineConfig`."""
    block_length: int = BLOCK
    tight: bool = False
    """Whether the expert cache holds only the study's `tight_share` of the experts."""


def original() -> Run:
    """What everything is compared with: the base model as it was published."""
    return Run(BASELINE, "Original", "base", {"routing": "original"})


def dmoe(top_p: float) -> Run:
    """The distilled model with dMoE routing."""
    return Run(f"dmoe-p{top_p:g}", f"dMoE (p = {top_p:g})", "distilled", {"routing": "dmoe", "top_p": top_p})


def dmoe_from(floor: int) -> Run:
    """The distilled model with dMoE routing, p = 0.6, and coresets of at least `floor` experts."""
    rule = {"routing": "dmoe", "top_p": 0.6, "min_experts": floor}
    return Run(f"{OURS}-min{floor}", f"dMoE (p = 0.6), at least {floor}", "distilled", rule)


def des_seq(k: int) -> Run:
    """DES-Seq on the base model; k = 1 is as few experts as it can go down to."""
    star = "*" if k == 1 else ""
    return Run(f"des-seq-k{k}", f"DES-S{star} (k = {k})", "base", {"routing": "des-seq", "des_k": k})


def des_vote(beta: float) -> Run:
    """DES-Vote on the base model."""
    return Run(f"des-vote-b{beta:g}", f"DES-V (β = {beta:.2f})", "base", {"routing": "des-vote", "des_beta": beta})


def coreset_of(beta: float, num_experts: int) -> int:
    """Experts that DES-Vote's coreset holds (`RoutingOptions.des_beta`)."""
    return math.floor(beta * num_experts + 1e-9)


def matched_des_vote(keep: int, num_experts: int) -> Run:
    """DES-Vote with a coreset of `keep` experts, chosen so that about as many are used as by dMoE."""
    beta = keep / num_experts
    return Run(f"{MATCHED}{keep}", f"DES-V* (β = {beta:.3f})", "base", {"routing": "des-vote", "des_beta": beta})


def baselines(effort: Effort) -> list[Run]:
    """The paper's baselines and LLaDA2.2's own block routing (Table 2)."""
    return [
        original(),
        Run("top-4", "Top-4", "base", {"routing": "top-k", "top_k_experts": 4}),
        *(des_seq(k) for k in effort.des_ks if k > 1),
        *(des_vote(beta) for beta in (0.15, 0.10)),
        Run("capacity-48", "Block capacity (C = 48)", "base", {"routing": "block-capacity", "expert_capacity": 48}),
    ]


def main_comparison(effort: Effort) -> list[Run]:
    """The rows of Table 2 whose settings are known beforehand."""
    return [
        *baselines(effort),
        des_seq(1),
        dmoe(0.6),
        dmoe(0.5),
        Run("base-dmoe-p0.6", "dMoE (p = 0.6), not distilled", "base", {"routing": "dmoe", "top_p": 0.6}),
        Run("distilled-original", "Original routing, distilled", "distilled", {"routing": "original"}),
    ]


def top_p_ablation(effort: Effort) -> list[Run]:
    """Table 3."""
    return [original(), *(dmoe(top_p) for top_p in effort.top_ps)]


def floor_ablation(effort: Effort) -> list[Run]:
    """Smallest coresets, of which the paper's two versions have different ones."""
    return [dmoe(0.6), *(dmoe_from(floor) for floor in effort.floors)]


def coreset_ablation(effort: Effort) -> list[Run]:
    """Both."""
    return [*top_p_ablation(effort), *floor_ablation(effort)]


def block_ablation(effort: Effort) -> list[Run]:
    """Table 4: pairs of original and dMoE, block length by block length."""
    return [run for length in effort.block_lengths for run in of_block_length(length)]


def of_block_length(length: int) -> tuple[Run, Run]:
    """Original and dMoE with blocks of `length` tokens."""
    if length == BLOCK:
        return original(), dmoe(0.6)
    return (
        Run(f"original-block{length}", "Original", "base", {"routing": "original"}, length),
        Run(f"dmoe-p0.6-block{length}", "dMoE (p = 0.6)", "distilled", {"routing": "dmoe", "top_p": 0.6}, length),
    )


def trade_off(effort: Effort) -> list[Run]:
    """Fig. 6."""
    ks = (des_seq(k) for k in effort.des_ks)
    return [*top_p_ablation(effort), *(des_vote(beta) for beta in effort.betas), *ks]


def options(effort: Effort) -> list[Run]:
    """What spares transfers: dMoE behind a small expert cache, alone and with each option that spares transfers."""
    rule = {"routing": "dmoe", "top_p": 0.6}
    plain = Run("tight-dmoe", "dMoE (p = 0.6)", "distilled", rule, tight=True)
    bonuses = [
        Run(
            f"tight-bonus{bonus:g}",
            f"cache-aware coreset, bonus {bonus:g}",
            "distilled",
            rule | {"residency_bonus": bonus},
            tight=True,
        )
        for bonus in effort.bonuses
    ]
    holds = [
        Run(f"tight-hold{steps}", f"coreset held {steps} steps", "distilled", rule | {"hold_steps": steps}, tight=True)
        for steps in effort.holds
    ]
    return [plain, *bonuses, *holds]
