"""The sections of the report, each with what it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tools.analysis import runs
from tools.analysis.runs import Run
from tools.analysis.sections import ablations, comparison, costs, latency, observations
from tools.analysis.sections.content import Content, Data
from tools.analysis.study import Effort


def _none(_effort: Effort) -> list[Run]:
    return []


def _concentration(_effort: Effort) -> list[Run]:
    return [runs.original(), runs.dmoe(0.6)]


@dataclass(frozen=True)
class Section:
    """One section of the report."""

    name: str
    """What `--only` calls it."""
    title: str
    build: Callable[[Data], Content]
    runs: Callable[[Effort], list[Run]] = _none
    """Evaluations it is made of."""
    measurements: tuple[str, ...] = ()
    compares: bool = False
    """Whether it also needs DES-Vote at dMoE's compression, which is known only when dMoE has been evaluated."""


SECTIONS = (
    Section("table2", "Main comparison (Table 2)", comparison.table_2, runs.main_comparison, compares=True),
    Section("fig5a", "Expert memory (Fig. 5a)", costs.figure_5a, runs.main_comparison, compares=True),
    Section("fig5b", "Speed (Fig. 5b)", costs.figure_5b, measurements=("speed",)),
    Section("fig6", "Accuracy against unique experts (Fig. 6)", ablations.figure_6, runs.trade_off),
    Section("table3", "The threshold p (Table 3)", ablations.table_3, runs.coreset_ablation),
    Section("table4", "Block lengths (Table 4)", ablations.table_4, runs.block_ablation),
    Section("options", "Options that spare transfers", ablations.transfer_options, runs.options),
    Section("fig2ab", "Latency by component (Fig. 2a, b)", latency.components, measurements=("components",)),
    Section("fig2c", "MoE latency and unique experts (Fig. 2c)", latency.moe_latency, measurements=("moe-latency",)),
    Section("fig3a", "Router weight and importance (Fig. 3a)", observations.masking, measurements=("masking",)),
    Section("fig3b", "Experts over denoising steps (Fig. 3b, Table 1)", observations.concentration, _concentration),
)
BY_NAME = {section.name: section for section in SECTIONS}
