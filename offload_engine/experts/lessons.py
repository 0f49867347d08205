"""What the decisions of a forward teach those that look to the next one."""

from __future__ import annotations

from offload_engine.core import ForwardInfo
from offload_engine.experts.hot_set import HotSet
from offload_engine.experts.ranked import Standing
from offload_engine.experts.scheduling.predictor import ExpertPredictor


class Lessons:
    """Tells predictor and hot set of a forward's decisions, of all layers together once the last one has decided: they
    are needed in the next forward, and one by one, each between weights that have just run through the processor's
    caches, they would take several times as long.
    """

    def __init__(self, predictor: ExpertPredictor, hot: HotSet, last_layer: int) -> None:
        self.predictor = predictor
        self.hot = hot
        self.last_layer = last_layer
        self._noted: list[tuple[int, Standing]] = []

    def begin(self, info: ForwardInfo) -> None:
        """A forward starts. What is noted of one that broke off is still learnt from."""
        self._tell()
        self.predictor.begin(info)
        if self.predictor.generating:
            self.hot.begin()

    def note(self, layer: int, said: Standing) -> None:
        """`layer` has decided."""
        self._noted.append((layer, said))
        if layer == self.last_layer or self.predictor.within_forward:
            self._tell()

    def _tell(self) -> None:
        noted, self._noted = self._noted, []
        for layer, (ranked, learned, _outlook) in noted:
            self.predictor.observe(layer, ranked.experts, ranked.scores, learned)
            if self.predictor.generating:
                self.hot.use(layer, learned.experts)
