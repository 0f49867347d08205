"""What quantising has cost: the error of the stored weights, by kind of matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from offload_engine.core import ExpertKey
from offload_engine.model.moe import ExpertWeights
from offload_engine.model.quantized import in_dtype


@dataclass(slots=True)
class KindError:
    """The error of all matrices of one kind; relative errors are RMS of the differences over RMS of the weights."""

    squares: float = 0.0
    """Sum of the squared weights."""
    error_squares: float = 0.0
    """Sum of the squared differences."""
    largest: float = 0.0
    """The largest difference of a single weight."""
    worst: float = 0.0
    """The largest relative error of a single matrix, ..."""
    worst_key: ExpertKey | None = None
    """... and whose it is; None while none has any."""

    @property
    def relative(self) -> float:
        """The relative error of all together; 0 where all weights are 0."""
        return math.sqrt(self.error_squares / self.squares) if self.squares else 0.0

    def add(self, key: ExpertKey, original: Tensor, stored: Tensor) -> None:
        """Count one matrix, before and after, in float32."""
        difference = (stored - original).flatten()
        squares, error = float(original.norm()) ** 2, float(difference.norm()) ** 2
        self.squares += squares
        self.error_squares += error
        self.largest = max(self.largest, float(difference.abs().amax()))
        relative = math.sqrt(error / squares) if squares else 0.0
        if relative > self.worst:
            self.worst, self.worst_key = relative, key


class RoundingErrors:
    """The error of every kind of matrix, added up expert by expert."""

    def __init__(self) -> None:
        self.kinds = {name: KindError() for name in ExpertWeights._fields}

    def add(self, key: ExpertKey, original: ExpertWeights, stored: ExpertWeights) -> None:
        """Count one expert."""
        for error, one, other in zip(self.kinds.values(), original, stored, strict=True):
            error.add(key, in_dtype(one, torch.float32), in_dtype(other, torch.float32))

    @property
    def exact(self) -> bool:
        """Whether every weight is what it was."""
        return not any(error.error_squares for error in self.kinds.values())
