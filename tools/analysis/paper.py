"""What the paper reports (dMoE, second version), to stand beside ours. Shares are in percent.

Its benchmarks are in the order of its tables; `of(task)` gives the one of a task, or the mean over the four where the
task isn't one of them.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

BENCHMARKS: Final = ("math500", "gsm8k", "arc-c", "mmlu")
MEAN: Final = "mean of 4"


class Row(NamedTuple):
    """Distinct experts and accuracy on each benchmark."""

    experts: tuple[float, float, float, float]
    accuracy: tuple[float, float, float, float]

    def of(self, task: str) -> tuple[float, float]:
        """(distinct experts, accuracy) on `task`, or their means."""
        name = task.partition(":")[0]
        if name in BENCHMARKS:
            place = BENCHMARKS.index(name)
            return self.experts[place], self.accuracy[place]
        return math.fsum(self.experts) / 4, math.fsum(self.accuracy) / 4


def column(task: str) -> str:
    """Which of the paper's columns `Row.of(task)` is."""
    name = task.partition(":")[0]
    return name if name in BENCHMARKS else MEAN


ORIGINAL: Final = Row((70.0, 71.5, 65.9, 70.6), (72.0, 90.8, 84.4, 88.6))

TABLE_2: Final = {
    "original": ORIGINAL,
    "top-4": Row((43.5, 44.3, 42.2, 43.8), (52.6, 72.4, 74.0, 61.5)),
    "des-seq": Row((41.0, 41.9, 39.9, 41.4), (70.8, 90.7, 83.3, 87.1)),
    "des-vote": Row((36.9, 37.0, 36.8, 37.0), (71.8, 90.5, 82.3, 85.6)),
    "des-seq-matched": Row((12.9, 13.2, 13.0, 13.0), (53.8, 74.0, 62.9, 70.7)),
    "des-vote-matched": Row((13.0, 12.9, 13.0, 13.0), (53.0, 73.5, 49.1, 72.6)),
    "dmoe-p0.6": Row((16.3, 16.6, 16.9, 16.5), (71.2, 88.6, 87.1, 87.4)),
    "dmoe-p0.5": Row((13.7, 13.8, 13.9, 13.6), (69.8, 87.1, 84.7, 86.7)),
}
"""The row p = 0.5 is the model that was trained with p = 0.5, as its equality with Table 3 shows."""

TABLE_3: Final = {
    0.4: Row((13.7, 13.9, 13.1, 13.5), (67.0, 86.0, 83.7, 84.1)),
    0.5: Row((14.0, 14.2, 13.8, 13.7), (68.8, 87.5, 85.5, 87.0)),
    0.6: Row((16.3, 16.6, 16.9, 16.5), (71.2, 88.6, 87.1, 87.4)),
    0.7: Row((19.8, 20.1, 20.0, 20.2), (73.0, 90.2, 88.1, 87.4)),
    0.8: Row((27.0, 28.3, 28.0, 27.6), (73.2, 90.0, 89.2, 88.9)),
}
"""The model trained with p = 0.6, evaluated with these."""

TABLE_4: Final = {
    32: (ORIGINAL, TABLE_3[0.6]),
    24: (
        Row((60.7, 62.2, 57.8, 61.6), (73.6, 91.0, 82.3, 86.9)),
        Row((16.2, 17.4, 16.1, 15.8), (68.6, 87.4, 87.9, 85.3)),
    ),
    16: (
        Row((48.6, 49.8, 47.0, 49.6), (70.2, 90.5, 86.9, 88.5)),
        Row((14.8, 16.7, 15.1, 14.9), (70.0, 89.9, 88.1, 87.4)),
    ),
    8: (
        Row((31.5, 32.2, 31.1, 32.3), (71.0, 90.1, 87.7, 87.4)),
        Row((14.1, 16.1, 14.2, 14.1), (70.2, 88.1, 87.2, 86.7)),
    ),
}
"""Block length -> original, dMoE with p = 0.6."""

TABLE_1: Final = {
    "gsm8k": (70.01, 11.96, 17.09),
    "math500": (71.09, 11.34, 15.95),
    "arc-c": (62.85, 10.01, 15.93),
    "mmlu": (66.57, 11.85, 17.80),
}
"""Mean, standard deviation and coefficient of variation of the distinct experts in layer 10."""

PEARSON: Final = 0.462
"""Fig. 3a, over 108 data points of GSM8K."""
MEMORY_SAVED: Final = (74.36, 76.78)
"""Expert memory, against the original (abstract)."""
SPEED_UP: Final = (1.14, 1.66)
"""End to end on an H100, as the first version of the paper reports it; the second gives no number in its text."""
ACCURACY_KEPT: Final = 99.55
EXPERTS_SAVED: Final = 76.15
