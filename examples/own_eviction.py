"""An eviction policy of one's own, held against the engine's: which expert makes room decides what is read again, and
never what is answered.

python examples/own_eviction.py [MODEL]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from offload_engine import Engine, ExpertKey, ForwardInfo, Outlook, SamplingParams

PROMPT = "Tom has 3 apples and buys 4 more. How many apples does Tom have?"


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
    """The same question under both policies, in a cache for a quarter of the experts."""
    params = SamplingParams(max_new_tokens=256)
    with Engine.from_pretrained(model, gpu_mem="8GB") as engine:
        quarter = engine.plan.all_experts * engine.plan.slab_bytes // 4
    answers = []
    for eviction in ("next-use", FirstIn):
        with Engine.from_pretrained(model, gpu_mem="8GB", expert_mem=quarter, eviction=eviction) as engine:
            done = engine.generate(PROMPT, params)
        name = eviction if isinstance(eviction, str) else eviction.name
        print(f"{name}: {done.stats.loads} experts read, answer: {done.text}")
        answers.append(done.token_ids)
    assert answers[0] == answers[1]


if __name__ == "__main__":
    main(*sys.argv[1:2])
