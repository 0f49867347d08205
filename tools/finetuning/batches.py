"""Which samples a step trains on, and their noise: a function of (seed, step, place in the batch) and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tools.finetuning.dataset import Dataset
from tools.training.diffusion import Batch, Noise, pack_seeded

ORDER, NOISE = 0, 1
"""Streams of random numbers under a seed."""


@dataclass(frozen=True)
class Batches:
    """The optimiser steps' batches of a run."""

    dataset: Dataset
    seed: int
    batch: int
    """Samples per step, over all processes."""
    micro_batch: int
    """Samples per forward of one process."""
    block_length: int = 32
    sigma: tuple[float, float] = (0.3, 0.8)
    """The range of the share of the answer that is masked, drawn for each noising (REFERENCE §4)."""
    noisings: int = 1
    """Of each sample, in one forward, for the price of one clean half."""

    def steps(self, epochs: float) -> int:
        """Whole batches in so many passes over the data."""
        return int(epochs * len(self.dataset)) // self.batch

    def micro_batches(self, processes: int = 1) -> int:
        """Forwards of each process in a step."""
        return -(-len(range(0, self.batch, processes)) // self.micro_batch)

    def sample(self, step: int, place: int) -> int:
        """The index of the sample at a place of a step's batch: one epoch's shuffled order after the other."""
        epoch, index = divmod(step * self.batch + place, len(self.dataset))
        return int(_order(self.seed, epoch, len(self.dataset))[index])

    def of_step(self, step: int, rank: int = 0, processes: int = 1) -> Iterator[Batch]:
        """The micro-batches that one of `processes` computes of a step, the same number for each of them."""
        noise = Noise(self.dataset.shape.mask, *self.sigma, full_share=0.0)
        places = range(rank, self.batch, processes)
        for start in range(0, len(places), self.micro_batch):
            samples = [
                (
                    self.dataset.example(self.sample(step, place)),
                    self.noisings,
                    np.random.default_rng((self.seed, NOISE, step, place)),
                )
                for place in places[start : start + self.micro_batch]
            ]
            yield pack_seeded(samples, noise, self.block_length)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, ORDER, epoch)).permutation(count)
