"""Which experts a layer will probably want before its routing is known. A wrong guess costs bandwidth, nothing else.

To add a predictor, derive from `ExpertPredictor` and enter it in `PREDICTORS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from offload_engine.core import ForwardInfo, Phase
from offload_engine.errors import ConfigError, TraceError

Prediction = list[tuple[int, float]]
"""(expert, score) of distinct experts, best first."""
Chosen = tuple[Sequence[int], Sequence[float]]
"""Distinct experts and their block scores, falling."""
GENERATING = frozenset((Phase.DENOISE, Phase.COMMIT))
"""Phases that work on one block of an answer."""


class Kind(NamedTuple):
    """What guesses that are as good as each other have in common."""

    opening: bool
    """Made in a block's first step."""
    ahead: int
    """Layers before the one predicted."""
    halves: int
    """A digit to base 3 by source, the first one's lowest: 1 where the expert is in the better half of what the source
    named, 2 in the worse, 0 where in neither.
    """


MEMORY = 4096
"""Guesses of a kind after which the older ones count half."""

LEAST_SHARE = 0.1
"""Faded share of first steps below which an expert is forgotten: three blocks after its last."""


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
    may reach ahead to later layers, and `observe`, layer after layer, at the latest when the forward's last has routed.
    """

    name: str
    """The predictor's name in configs and on the command line."""
    wants_preview = False
    """Whether it lives on `offer`; where False, the caller may save itself the previews."""
    within_forward = False
    """Whether what a layer chose tells it of later layers of the same forward. It then hears of each as soon as the
    host knows, which costs some time; else of all together.
    """

    def __init__(self) -> None:
        self.counts = PredictionCounts()
        self.info = ForwardInfo(Phase.PREFILL)
        self.generating = False
        """Whether the forward under way works on one block of an answer."""
        self.ahead = 0
        """Layers still to run before the one that is being predicted."""
        self._guessed: dict[int, set[int]] = {}

    def begin(self, info: ForwardInfo) -> None:
        """A forward starts."""
        self.info = info
        self.generating = info.phase in GENERATING
        self._guessed.clear()
        self._begin()

    def offer(self, layer: int, experts: Sequence[int], scores: Sequence[float]) -> None:  # noqa: B027
        """What `layer`'s own router chose when shown an earlier hidden state; falling score. Ignored by default."""

    def predict(self, layer: int, ahead: int = 0) -> Prediction:
        """What `layer`, `ahead` layers after the one about to run, will probably want in this forward."""
        self.ahead = ahead
        prediction = self._predict(layer)
        self._guessed[layer] = {expert for expert, _score in prediction}
        return prediction

    def observe(
        self, layer: int, experts: Sequence[int], scores: Sequence[float], learned: Chosen | None = None
    ) -> None:
        """What `layer` really chose: distinct experts, falling block score.

        Guesses are judged by all of it. `learned` is the part of it that later guesses are drawn from, None for all: a
        block committed along with others is over.
        """
        if self.generating:
            guessed = self._guessed.get(layer)
            if guessed:
                self.counts.predicted += len(guessed)
                self.counts.correct += len(guessed.intersection(experts))
            self.counts.actual += len(experts)
        self._observe(layer, *((experts, scores) if learned is None else learned))

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
    """The layer's own set in the last forward that worked on a block, or on one of each sequence of a batch.

    Denoising steps hardly change a layer's set (REFERENCE §3), and a block's first step starts from the set of the
    commit before it. A prefill is neither predicted nor learnt from: it routes many blocks at once, whose union is
    nearly every expert. It begins a new sequence in its lanes, and so does a lane's denoising step that does not come
    after its last one (a prompt shorter than a block has no prefill): once no lane goes on with what it did, the sets
    are forgotten. Whole-sequence scoring leaves no trace and gets no prediction.
    """

    name = "previous-step"

    def __init__(self) -> None:
        super().__init__()
        self._sets: dict[int, Chosen] = {}
        self._reached: dict[int, tuple[int, int]] = {}
        """By lane: (block, step) of its last denoising step."""

    def _begin(self) -> None:
        info = self.info
        passes = [one for one in info.blocks if one.phase is info.phase]
        steps = {one.lane: (one.block, one.step) for one in passes} or {0: (info.block, info.step)}
        if info.phase is Phase.PREFILL:
            for lane in steps:
                self._reached.pop(lane, None)
        elif info.phase is Phase.DENOISE:
            if not any(lane in self._reached and step > self._reached[lane] for lane, step in steps.items()):
                self._sets.clear()
            self._reached = steps

    def _observe(self, layer: int, experts: Sequence[int], scores: Sequence[float]) -> None:
        if self.generating:
            self._sets[layer] = experts, scores

    def _predict(self, layer: int) -> Prediction:
        return list(zip(*self._sets.get(layer, ((), ())), strict=True)) if self.generating else []


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


class FirstStep(ExpertPredictor):
    """For the first step of a block: what the first steps of earlier blocks chose, the newest counting most.

    All its open positions hold the mask token, so a layer wants much the same in every block, and in every sequence.
    Other steps get no prediction.
    """

    name = "first-step"

    def __init__(self) -> None:
        super().__init__()
        self._shares: dict[int, dict[int, float]] = {}
        """By layer: each expert's faded share of the first steps so far, from 0 to 1."""

    @property
    def opening(self) -> bool:
        """Whether the forward under way is a block's first step."""
        return self.info.phase is Phase.DENOISE and self.info.step == 0

    def _observe(self, layer: int, experts: Sequence[int], scores: Sequence[float]) -> None:  # noqa: ARG002
        if not self.opening:
            return
        shares = {expert: share / 2 for expert, share in self._shares.get(layer, {}).items() if share > LEAST_SHARE}
        for expert in experts:
            shares[expert] = shares.get(expert, 0.0) + 0.5
        self._shares[layer] = dict(sorted(shares.items(), key=lambda item: item[1], reverse=True))

    def _predict(self, layer: int) -> Prediction:
        return list(self._shares.get(layer, {}).items()) if self.opening else []


class Combined(ExpertPredictor):
    """What its sources say together: each guess with the chance that guesses of its kind come true, best first.

    Guesses are of one kind when the same sources name them, in the same halves of their rankings, and the forward is,
    or is not, a block's first step. How often each kind came true is counted as layers are observed; kinds below
    `least` are left out, for what they would bring costs more than it hides.
    """

    def __init__(self, name: str, sources: Sequence[ExpertPredictor], least: float = 0.6) -> None:
        super().__init__()
        self.name = name
        self.sources = list(sources)
        """Each keeps counts of its own."""
        self.wants_preview = any(source.wants_preview for source in sources)
        self.within_forward = any(source.within_forward for source in sources)
        self.least = least
        self._guesses: dict[int, dict[Kind, set[int]]] = {}
        """By layer and kind: the experts that a source named in this forward."""
        self._records: dict[Kind, list[float]] = {}
        """By kind: how many came true, and how many there were."""

    def offer(self, layer: int, experts: Sequence[int], scores: Sequence[float]) -> None:
        """See `ExpertPredictor`."""
        for source in self.sources:
            source.offer(layer, experts, scores)

    def chance(self, kind: Kind) -> float:
        """How often guesses of this kind come true; two of three before any was seen, so that they are tried."""
        true, all_ = self._records.get(kind, (0.0, 0.0))
        return (true + 2.0) / (all_ + 3.0)

    def _begin(self) -> None:
        self._guesses.clear()
        for source in self.sources:
            source.begin(self.info)

    def _predict(self, layer: int) -> Prediction:
        opening = self.info.phase is Phase.DENOISE and self.info.step == 0
        halves: dict[int, int] = {}
        """By expert, as in `Kind`."""
        digit = 1
        for source in self.sources:
            said = source.predict(layer, self.ahead)
            for rank, (expert, _score) in enumerate(said):
                halves[expert] = halves.get(expert, 0) + (digit if 2 * rank < len(said) else 2 * digit)
            digit *= 3
        alike: dict[int, list[int]] = {}
        for expert, code in halves.items():
            alike.setdefault(code, []).append(expert)
        guesses, chances = self._guesses.setdefault(layer, {}), {}
        for code, guessed in alike.items():
            kind = Kind(opening, self.ahead, code)
            guesses.setdefault(kind, set()).update(guessed)
            chances[code] = self.chance(kind)
        named = [(expert, chances[code]) for expert, code in halves.items() if chances[code] >= self.least]
        return sorted(named, key=lambda guess: guess[1], reverse=True)

    def observe(
        self, layer: int, experts: Sequence[int], scores: Sequence[float], learned: Chosen | None = None
    ) -> None:
        """See `ExpertPredictor`."""
        super().observe(layer, experts, scores, learned)
        for source in self.sources:
            source.observe(layer, experts, scores, learned)
        if self.generating:
            for kind, guessed in self._guesses.get(layer, {}).items():
                self._learn(kind, len(guessed.intersection(experts)), len(guessed))

    def _learn(self, kind: Kind, true: int, all_: int) -> None:
        record = self._records.setdefault(kind, [0.0, 0.0])
        record[0] += true
        record[1] += all_
        if record[1] >= MEMORY:
            record[0] /= 2
            record[1] /= 2


PREDICTORS: dict[str, Callable[[], ExpertPredictor]] = {
    "none": NoPredictor,
    "previous-step": PreviousStep,
    "cross-layer-gate": CrossLayerGate,
    "block-history": lambda: Combined("block-history", [PreviousStep(), FirstStep()]),
    "combined": lambda: Combined("combined", [PreviousStep(), FirstStep(), CrossLayerGate()]),
}
"""What a user may choose; the oracle needs a recording."""


def make_predictor(name: str) -> ExpertPredictor:
    """A fresh predictor called `name`; raises `ConfigError` for an unknown name."""
    if name not in PREDICTORS:
        raise ConfigError(f"predictor is {name!r}; choose one of {', '.join(PREDICTORS)}")
    return PREDICTORS[name]()
