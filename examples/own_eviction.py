"""An eviction policy of one's own, held against the engine's: which expert makes room decides what is read again, and
never what is answered.

python examples/own_eviction.py [MODEL]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from offload_engine import Engine, ExpertKey, ForwardInfo, Outlook, SamplingParams

PROMPTS = [f"Tom has {number} apples and buys 4 more. How many apples does Tom have?" for number in range(3, 8)]


class FirstIn:
    """First in, first out. What each method has to promise is said by `offload_engine.EvictionPolicy`."""

    name = "first-in"

    def __init__(self) -> None:
        self._queue: dict[ExpertKey, None] = {}

    def begin(self, info: ForwardInfo) -> None:
        """A forward starts: no matter."""

    def on_route(self, layer: int, experts: Sequence[int], outlook: Outlook) -> None:
        """A layer wants experts: no matter."""

    def on_insert(self, key: ExpertKey) -> None:
        """It queues up."""
        self._queue[key] = None

    def on_use(self, key: ExpertKey, score: float) -> None:
        """Use earns nothing here."""

    def on_remove(self, key: ExpertKey) -> None:
        """It is gone."""
        del self._queue[key]

    def victim(self, evictable: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        """The oldest that may go."""
        return next((key for key in self._queue if evictable(key)), None)


def main(model: str | None = None) -> None:
    """The same questions under both policies, in a cache for a quarter of the experts.

    Nothing is fetched on a guess, so that every expert read was missed.
    """
    params = SamplingParams(max_new_tokens=256)
    with Engine.from_pretrained(model, gpu_mem="8GB") as engine:
        quarter = engine.plan.all_experts * engine.plan.slab_bytes // 4
    answers = []
    for eviction in ("next-use", FirstIn):
        with Engine.from_pretrained(
            model, gpu_mem="8GB", expert_mem=quarter, eviction=eviction, predictor="none"
        ) as engine:
            answers.append([done.text for done in engine.generate(PROMPTS, params)])
            read = engine.stats.loads
        name = eviction if isinstance(eviction, str) else eviction.name
        print(f"{name}: {read} experts read for {answers[-1]}")
    assert answers[0] == answers[1]


if __name__ == "__main__":
    main(*sys.argv[1:2])
