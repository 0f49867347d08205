"""Muon: momentum whose update is orthogonalised (Jordan et al., 2024), for matrices and for stacks of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration; they push singular values towards 1 fast rather than exactly."""


def orthogonalise(matrices: Tensor, rounds: int = 5) -> Tensor:
    """Matrices [.., M, N] with their singular values moved to about 1 by Newton-Schulz iterations, in bfloat16."""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT.contiguous()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class Muon(Optimizer):
    """Nesterov momentum, orthogonalised over the last two dimensions; decoupled weight decay.

    The update is scaled by 0.2 sqrt(max(M, N)), which gives it the size of an AdamW update (Liu et al., 2025), so that
    both can share a learning rate. A parameter attribute `stacked` = n says that its rows are n matrices on top of
    each other, to be orthogonalised apart.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                velocity = state["momentum"]
                velocity.lerp_(p.grad, 1 - group["momentum"])
                update = torch.lerp(p.grad, velocity, group["momentum"])
                pieces = getattr(p, "stacked", 1)
                split = update.unflatten(-2, (pieces, -1)) if pieces > 1 else update
                scale = 0.2 * max(split.shape[-2:]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(orthogonalise(split).reshape(p.shape), alpha=-group["lr"] * scale)
        return closure() if closure is not None else None
