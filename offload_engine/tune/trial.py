"""One trial: a trace under one setting of the options that move experts, on the virtual clock. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from offload_engine.experts.scheduling.sharing import ShareMode
from offload_engine.simulate.forwards import forwards, sized
from offload_engine.simulate.run import Figures, Setting, Simulation
from offload_engine.simulate.timing import Timing
from offload_engine.trace import TraceRecord
from offload_engine.tune.routing import blocks_of

WARM_UP = 3
"""One block in so many fills the cache and is not counted."""


@dataclass(frozen=True, slots=True)
class Knobs:
    """Options that change how experts move, and never an answer, but for `cpu_experts`, by rounding; fields of
    `EngineConfig`, by the same names.
    """

    eviction: str = "next-use"
    predictor: str = "combined"
    prefetch_depth: int = 2
    transfers_in_flight: int = 2
    cpu_experts: ShareMode = "off"


@dataclass(frozen=True, slots=True)
class Machine:
    """What a trace is replayed on."""

    timing: Timing
    layers: Sequence[int]
    """The MoE layers, in the order they run."""
    block_length: int
    host_slots: int | None
    """Of the host tier beside a GPU; None: there is none, or it holds every expert."""
    sharing: Sequence[ShareMode] = ("off",)
    """Ways to share misses with the CPU that may be chosen, the first unless another pays."""

    def run(self, records: Sequence[TraceRecord]) -> Simulation:
        """A simulation of `records`, which may be played in any number of settings."""
        trace = sized(list(forwards(records, self.block_length)), self.block_length)
        warm_up = blocks_of(records) // WARM_UP
        return Simulation(trace, self.layers, self.timing, self.block_length, warm_up)

    def trial(self, records: Sequence[TraceRecord], slots: int) -> Callable[[Knobs], Figures]:
        """What `records` take with so many slots, as a function of the options."""
        simulation = self.run(records)
        return lambda knobs: self.play(simulation, knobs, slots)

    def play(self, simulation: Simulation, knobs: Knobs, slots: int) -> Figures:
        """What the production cache, eviction, predictor and scheduler make of it."""
        return simulation.figures(
            Setting(
                slots=slots,
                host_slots=self.host_slots,
                eviction=knobs.eviction,
                predictor=knobs.predictor,
                depth=knobs.prefetch_depth,
                in_flight=knobs.transfers_in_flight,
                cpu_experts=knobs.cpu_experts,
            )
        )
