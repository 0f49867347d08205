"""Which experts a layer will probably want before its routing is known. A wrong guess costs bandwidth, nothing else.

To add a predictor, derive from `ExpertPredictor` and enter it in `PREDICTORS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from offload_engine.core import ForwardInfo, Phase
from offload_engine.errors import ConfigError, TraceError

Prediction = list[tuple[int, float]]
"""(expert, score) of distinct experts, best first."""


@dataclass(slots=True)
class PredictionCounts:
    """Experts summed over the layers of all denoising and commit forwards; other forwards are not counted."""

    predicted: int = 0
    """Named by the last `predict` before the layer was observed, if there was one."""
    correct: int = 0
    """Of those, the ones the layer then chose."""
    actual: int = 0
    """Chosen by the layer, predicted or not."""

    @property
    def precision(self) -> float:
        """Share of the predicted that were chosen; 0 where nothing was predicted."""
        return self.correct / self.predicted if self.predicted else 0.0

    @property
    def recall(self) -> float:
        """Share of the chosen that were predicted; 0 where nothing was chosen."""
        return self.correct / self.actual if self.actual else 0.0


class ExpertPredictor(ABC):
    """Guesses a layer's experts and keeps count of how well it does.

    Called in this order in every forward: `begin` once, then per MoE layer any number of `offer` and `predict`, which
    may reach ahead to later layers, and `observe` when the layer has routed.
    """

    name: str
    """The predictor's name in configs and on the command line."""
    wants_preview = False
    """Whether it lives on `offer`; where False, the caller may save itself the previews."""

    def __init__(self) -> None:
        self.counts = PredictionCounts()
        self.info = ForwardInfo(Phase.PREFILL)
        self._guessed: dict[int, set[int]] = {}

    @property
    def generating(self) -> bool:
        """Whether the forward under way works on one block of an answer."""
        return self.info.phase in (Phase.DENOISE, Phase.COMMIT)

    def begin(self, info: ForwardInfo) -> None:
        """A forward starts."""
        self.info = info
        self._guessed.clear()
        self._begin()

    def offer(self, layer: int, experts: Sequence[int], scores: Sequence[float]) -> None:  # noqa: B027
        """What `layer`'s own router chose when shown an earlier hidden state; falling score. Ignored by default."""

    def predict(self, layer: int) -> Prediction:
        """What `layer` will probably want in this forward."""
        prediction = self._predict(layer)
        self._guessed[layer] = {expert for expert, _score in prediction}
        return prediction

    def observe(self, layer: int, experts: Sequence[int], scores: Sequence[float]) -> None:
        """What `layer` really chose: distinct experts, falling block score."""
        if self.generating:
            guessed = self._guessed.get(layer, set())
            self.counts.predicted += len(guessed)
            self.counts.correct += len(guessed.intersection(experts))
            self.counts.actual += len(experts)
        self._observe(layer, experts, scores)

    def _begin(self) -> None:  # noqa: B027
        """Nothing to prepare, unless a predictor says otherwise."""

    def _observe(self, layer: int, experts: Sequence[int], scores: Sequence[float]) -> None:  # noqa: B027
        """Nothing to learn, unless a predictor says otherwise."""

    @abstractmethod
    def _predict(self, layer: int) -> Prediction: ...


class NoPredictor(ExpertPredictor):
    """Never guesses: everything is fetched on demand."""

    name = "none"

    def _predict(self, layer: int) -> Prediction:  # noqa: ARG002
        return []


class PreviousStep(ExpertPredictor):
    """The layer's own set in the last forward of this sequence that worked on a block.

    Denoising steps hardly change a layer's set (REFERENCE §3), and a block's first step starts from the set of the
    commit before it. A prefill is neither predicted nor learnt from: it routes many blocks at once, whose union is
    nearly every expert. It begins a new sequence, and so does a denoising step that does not come after the last one (a
    prompt shorter than a block has no prefill): the sets of the sequence before are forgotten. Whole-sequence scoring
    leaves no trace and gets no prediction.
    """

    name = "previous-step"

    def __init__(self) -> None:
        super().__init__()
        self._sets: dict[int, Prediction] = {}
        self._reached = (-1, -1)
        """(block, step) of the last denoising step."""

    def _begin(self) -> None:
        phase, block, step = self.info.phase, self.info.block, self.info.step
        if phase is Phase.PREFILL or (phase is Phase.DENOISE and (block, step) <= self._reached):
            self._sets.clear()
            self._reached = (-1, -1)
        if phase is Phase.DENOISE:
            self._reached = (block, step)

    def _observe(self, layer: int, experts: Sequence[int], scores: Sequence[float]) -> None:
        if self.generating:
            self._sets[layer] = list(zip(experts, scores, strict=True))

    def _predict(self, layer: int) -> Prediction:
        return list(self._sets.get(layer, ())) if self.generating else []


class CrossLayerGate(ExpertPredictor):
    """What was last offered for the layer in this forward: its own router's choice for the state before its attention.

    Needs no history, so it holds in every kind of forward.
    """

    name = "cross-layer-gate"
    wants_preview = True

    def __init__(self) -> None:
        super().__init__()
        self._offers: dict[int, Prediction] = {}

    def offer(self, layer: int, experts: Sequence[int], scores: Sequence[float]) -> None:
        """See `ExpertPredictor`."""
        self._offers[layer] = list(zip(experts, scores, strict=True))

    def _begin(self) -> None:
        self._offers.clear()

    def _predict(self, layer: int) -> Prediction:
        return list(self._offers.get(layer, ()))


class Oracle(ExpertPredictor):
    """Reads the future from a recording: one mapping of layer to its experts per forward, in the order of forwards.

    For tests and simulation. Raises `TraceError` when more forwards begin than were recorded.
    """

    name = "oracle"

    def __init__(self, recorded: Sequence[Mapping[int, Prediction]]) -> None:
        super().__init__()
        self.recorded = recorded
        self._forward = -1

    def _begin(self) -> None:
        if self._forward + 1 >= len(self.recorded):
            raise TraceError(
                f"predictor 'oracle': forward {len(self.recorded) + 1} begins, but its recording holds "
                f"{len(self.recorded)}; replay the run that was recorded"
            )
        self._forward += 1

    def _predict(self, layer: int) -> Prediction:
        return list(self.recorded[self._forward].get(layer, ())) if self._forward >= 0 else []


PREDICTORS: dict[str, Callable[[], ExpertPredictor]] = {
    "none": NoPredictor,
    "previous-step": PreviousStep,
    "cross-layer-gate": CrossLayerGate,
}
"""What a user may choose; the oracle needs a recording."""


def make_predictor(name: str) -> ExpertPredictor:
    """A fresh predictor called `name`; raises `ConfigError` for an unknown name."""
    if name not in PREDICTORS:
        raise ConfigError(f"predictor is {name!r}; choose one of {', '.join(PREDICTORS)}")
    return PREDICTORS[name]()
