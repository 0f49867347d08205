"""Which token each masked position takes, how sure the model is of it, and which are unmasked (REFERENCE §2)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from offload_engine import kernels
from offload_engine.core import SamplingParams


class Proposal(NamedTuple):
    """What `n` masked positions would become."""

    tokens: Tensor
    """[n] int64, never the mask."""
    confidence: Tensor
    """[n] float32: the token's probability in the plain softmax over the whole vocabulary, also when it was drawn from
    a distribution changed by temperature, top-k or top-p.
    """


def propose(logits: Tensor, mask_token_id: int, params: SamplingParams, generator: torch.Generator | None) -> Proposal:
    """A token and its confidence for each row of `logits` [n, vocab] float32, which is overwritten.

    Greedy at temperature 0 (ties to the lower id), in float32 on the CPU by our kernel, if it is there; otherwise drawn
    with `generator`. A confidence that is not finite says that nothing can be chosen or drawn from its row.
    """
    if params.temperature == 0 and kernels.serves_likeliest(logits):
        return Proposal(*kernels.likeliest(logits, mask_token_id))
    normaliser = logits.logsumexp(dim=-1)
    if not bool(normaliser.isfinite().all()):
        return Proposal(
            logits.new_zeros(len(logits), dtype=torch.int64), normaliser.new_full((len(logits),), torch.nan)
        )
    logits[:, mask_token_id] = -torch.inf
    tokens = logits.argmax(dim=-1) if params.temperature == 0 else _draw(logits, params, generator)
    confidence = (logits.gather(1, tokens.unsqueeze(-1)).squeeze(-1) - normaliser).exp()
    return Proposal(tokens, confidence)


def _draw(logits: Tensor, params: SamplingParams, generator: torch.Generator | None) -> Tensor:
    # Less the maximum first, so that a tiny temperature leaves the best token at 0 rather than at infinity.
    scaled = (logits - logits.max(dim=-1, keepdim=True).values) / params.temperature
    scaled = scaled.nan_to_num(nan=0.0)  # 0 / 0 where the temperature is too small for float32
    ranked = scaled.sort(dim=-1, descending=True, stable=True)
    keep = torch.ones_like(ranked.values, dtype=torch.bool)
    if params.top_k:
        keep[:, params.top_k :] = False
    probabilities = ranked.values.masked_fill(~keep, -torch.inf).softmax(dim=-1)
    if params.top_p < 1:
        before = probabilities.cumsum(dim=-1) - probabilities
        keep &= before < params.top_p
        keep[:, 0] = True
        probabilities = probabilities.masked_fill(~keep, 0.0)
    places = probabilities.multinomial(1, generator=generator)
    return ranked.indices.gather(1, places).squeeze(-1)


def accept(confidence: Sequence[float], minimum: int, threshold: float) -> list[int]:
    """Which of `n` masked positions to unmask, by `confidence` [n], float32 numbers: all above `threshold`, also in
    float32, or, if those are fewer than `minimum`, the `minimum` most confident (ties to the lower position). Rising.
    """
    limit = ctypes.c_float(threshold).value
    above = [place for place, sure in enumerate(confidence) if sure > limit]
    if len(above) >= minimum:
        return above
    ranked = sorted(range(len(confidence)), key=confidence.__getitem__, reverse=True)  # stable in reverse, too
    return sorted(ranked[:minimum])


def unmask_schedule(block_length: int, steps: int) -> list[int]:
    """How many positions each step unmasks at least: `block_length // steps`, the remainder first.

    Steps beyond `block_length` would unmask nothing and never come, so they are left out.
    """
    steps = min(steps, block_length)
    least, more = divmod(block_length, steps)
    return [least + (step < more) for step in range(steps)]
