"""What a layer's routing says of the layer's next one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

FURTHEST = 30
"""Runners-up worth telling of: within a block, 97 % of what is new in a layer's next forward is among them
(docs/LOG.md).
"""


class Outlook(NamedTuple):
    """How a layer's experts stand after the vote of the blocks that go on being denoised, best first."""

    chosen: Sequence[int]
    runners_up: Sequence[int] = ()
    """Named by some token, but chosen by none; at most `FURTHEST`."""
