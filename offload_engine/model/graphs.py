"""What a layer does ahead of its experts, attention and router, recorded once and replayed in later denoising steps.

A layer's attention and router are some sixty small kernels, which a host launches more slowly than a device runs them.
All denoising steps of a block have the same shapes and, in the prefix cache, the same places; so what was enqueued for
one can be enqueued for the next as a whole. Nothing is rounded otherwise: the same kernels run with the same sizes.
That is also why a recording is good for one place of the cache, and made anew for each block, rather than for a bucket
of lengths under a mask, whose products would be others.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from offload_engine.errors import DeviceError


class Attended(NamedTuple):
    """What the rest of a MoE layer needs."""

    hidden: Tensor
    """[T, H]: the residual stream after attention."""
    normed: Tensor
    """[T, H]: what experts see."""
    logits: Tensor
    """[T, E] float32: the router's; of a dense layer nothing, [T, 0]."""


Work = Callable[[Tensor], Attended]
"""A layer from its residual stream [T, H] to its router. May leave keys and values in the prefix cache, again each time
it is called."""


class RecordingError(Exception):
    """Something was not to be recorded; the message says why, in one line. Nothing was enqueued."""


class Recording(Protocol):
    """Work that can be enqueued again as it was recorded."""

    outputs: Attended
    """Where every replay leaves its results."""

    def replay(self) -> None:
        """Enqueue it, on what its inputs hold by then."""


class Recorder(Protocol):
    """Records work for a device."""

    def record(self, work: Callable[[], Attended]) -> Recording:
        """Record what `work` enqueues, without having it run. It is called once, now; all memory that it reads from or
        writes to must stay where it is for as long as the recording lives. Raises `RecordingError`.
        """


class _Kept(NamedTuple):
    key: Hashable
    recording: Recording
    work: Work
    """Whatever it holds on to is what the recording reads."""


class LayerGraphs:
    """The recordings of all layers, one each. A layer's work runs plainly where it is new, is recorded the second time
    it comes with the same key and shape, and is replayed from then on. Its first recording is held against what was
    computed plainly, bit for bit: if it differs, or there is none, nothing is recorded any more.

    What `run` returns holds until the layer's next run. A recording is dropped in a later forward than its last replay,
    when the host has read what came of that: it is never under way.
    """

    def __init__(self, recorder: Recorder, required: bool = False) -> None:
        """`required`: raise `DeviceError` rather than do without."""
        self._recorder = recorder
        self._required = required
        self._input: Tensor | None = None
        """[T, H]: where recordings find their residual stream."""
        self._seen: dict[int, Hashable] = {}
        """By layer, the key it had last."""
        self._kept: dict[int, _Kept] = {}
        self._proven: set[int] = set()
        self.refusal: str | None = None
        """Why nothing is recorded any more; None: it is."""

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know so far."""
        if self.refusal is None:
            return ()
        return (f"attention is launched kernel by kernel, more slowly than in CUDA graphs: {self.refusal}",)

    def run(self, layer: int, key: Hashable, hidden: Tensor, work: Work) -> Attended:
        """The work of `layer` on `hidden` [T, H]. `key`: everything that `work` depends on beside `hidden`, such as
        the addresses of weights and cache and the place there.
        """
        if self.refusal is not None:
            return work(hidden)
        if self._input is None or (self._input.shape, self._input.dtype) != (hidden.shape, hidden.dtype):
            self.close()
            self._input = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        kept = self._kept.get(layer)
        if kept is not None and kept.key == key:
            self._input.copy_(hidden)
            kept.recording.replay()
            return kept.recording.outputs
        plain = work(hidden)
        if self._seen.get(layer) == key:
            self._record(layer, key, hidden, work, plain)
        self._seen[layer] = key
        return plain

    def close(self) -> None:
        """Drop all recordings. Idempotent; none may be under way."""
        self._kept.clear()
        self._seen.clear()
        self._input = None

    def _record(self, layer: int, key: Hashable, hidden: Tensor, work: Work, plain: Attended) -> None:
        """Keep a recording of `work`, which gave `plain` for `hidden`."""
        place = self._input
        assert place is not None
        try:
            kept = _Kept(key, self._recorder.record(lambda: work(place)), work)
        except RecordingError as error:
            self._give_up(str(error))
            return
        if layer not in self._proven:
            place.copy_(hidden)
            kept.recording.replay()
            if not all(map(torch.equal, kept.recording.outputs, plain)):
                self._give_up(f"what was recorded of layer {layer} gave other results than the same work launched")
                return
            self._proven.add(layer)
        self._kept[layer] = kept  # the one before goes only now: the memory of recordings is shared while one is left

    def _give_up(self, reason: str) -> None:
        self.close()
        self.refusal = reason
        if self._required:
            raise DeviceError(f"cuda_graphs is on, but {reason}; set cuda_graphs to auto or off")


class StepGraphs(NamedTuple):
    """`LayerGraphs` for one forward."""

    graphs: LayerGraphs
    place: Hashable
    """Where the forward's keys and values go, and what it sees."""

    def run(self, layer: int, weights: Tensor, hidden: Tensor, work: Work) -> Attended:
        """See `LayerGraphs`; `weights` are of the layer, which is known by where they lie."""
        return self.graphs.run(layer, (self.place, weights.data_ptr()), hidden, work)
