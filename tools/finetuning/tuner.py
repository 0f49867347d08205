"""One optimiser step of fine-tuning: forwards under autocast, one loss over them all, AdamW on float32 weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from offload_engine.routing import RoutingPolicy
from tools.finetuning.parallel import ALONE, Processes, local, whole
from tools.training.diffusion import Batch
from tools.training.trainer import Network


@dataclass(frozen=True)
class Optimisation:
    """AdamW and its cosine schedule (REFERENCE §4)."""

    steps: int
    lr: float = 2e-6
    final_lr: float = 1e-7
    warmup: float = 0.03
    """Share of the steps in which the rate rises."""
    weight_decay: float = 0.01
    """Of matrices; norms and linear biases have none."""
    clip: float = 1.0
    """Largest norm of the whole gradient."""

    def rate(self, step: int) -> float:
        """The learning rate of a step: a linear rise to `lr`, then half a cosine to `final_lr` at the last step."""
        rise = max(1, round(self.warmup * self.steps))
        if step < rise:
            return self.lr * (step + 1) / rise
        done = (step - rise) / max(1, self.steps - 1 - rise)
        return self.final_lr + (self.lr - self.final_lr) * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class StepReport:
    """What a step says of itself, over all processes."""

    loss: float
    """Mean over the step's masked tokens: cross-entropy, and the divergence from a teacher at its share."""
    accuracy: float
    """Share of the masked tokens that the argmax gets right."""
    norm: float
    """Of the gradient, before clipping."""
    masked: int
    """Tokens in the loss."""
    tokens: int
    """Positions computed: of [noisy | clean], those that the loss depends on."""


@dataclass(frozen=True)
class Teacher:
    """The model as it was, under the routing it was made for, to learn distributions from and not answers alone."""

    network: Network
    policy: RoutingPolicy
    share: float
    """Of the loss: this much is Kullback-Leibler divergence from the teacher, the rest cross-entropy."""

    def divergence(self, logits: Tensor, batch: Batch, block_length: int) -> Tensor:
        """Sum over the masked tokens of KL(teacher || student), for the student's `logits` [M, vocab] float32."""
        with torch.no_grad():
            wanted = self.network(batch, self.policy, block_length).log_softmax(dim=-1)
        return F.kl_div(logits.log_softmax(dim=-1), wanted, reduction="sum", log_target=True)


class Tuner:
    """A network and its optimiser."""

    def __init__(
        self,
        network: Network,
        policy: RoutingPolicy,
        options: Optimisation,
        *,
        block_length: int = 32,
        dtype: torch.dtype = torch.bfloat16,
        processes: Processes = ALONE,
    ) -> None:
        """`network` in float32; `dtype` is what its products are computed in, routers' excepted."""
        self.teacher: Teacher | None = None
        self.network, self.policy, self.options = network, policy, options
        self.block_length, self.processes = block_length, processes
        self.steps = 0
        kind = processes.device.type
        self.autocast = torch.autocast(kind, dtype=dtype, enabled=dtype != torch.float32)
        self._route_in_float32(network)
        weights = [weight for _, weight in network.named_weights()]
        groups = [
            {"params": [w for w in weights if w.dim() > 1], "weight_decay": options.weight_decay},
            {"params": [w for w in weights if w.dim() == 1], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.999), fused=True)

    def learn_from(self, teacher: Teacher) -> None:
        """Take the teacher's part of the loss in."""
        self._route_in_float32(teacher.network)
        self.teacher = teacher

    def _route_in_float32(self, network: Network) -> None:
        """Keep autocast out of the routers, as the engine does."""
        for _, router in network.routers():
            router.forward = torch.autocast(self.processes.device.type, enabled=False)(router.forward)

    def step(self, batches: Iterable[Batch], policies: Iterable[RoutingPolicy]) -> StepReport:
        """One update from this process's micro-batches, each under its policy.

        The loss is the mean over the masked tokens of all micro-batches of all processes, so that it doesn't matter how
        the step's samples are split up. Raises `FloatingPointError`, before any weight is changed, if it or its
        gradient isn't finite.
        """
        batches = list(batches)
        counts = [[len(batch.masked), len(batch.tokens)] for batch in batches]
        masked, tokens = self.processes.sum(torch.tensor(counts).sum(dim=0)).tolist()
        scale = self.processes.count / max(1, masked)  # sharding averages gradients over processes
        sums = torch.zeros(2, dtype=torch.float64)
        for batch, policy in zip(batches, policies, strict=True):
            sums += self._accumulate(batch, policy, scale)
        loss, right = (self.processes.sum(sums) / max(1, masked)).tolist()
        if not math.isfinite(loss):
            self._refuse(f"the loss is {loss}")
        norm = self._update()
        self.steps += 1
        return StepReport(loss, right, norm, masked, tokens)

    def _accumulate(self, batch: Batch, policy: RoutingPolicy, scale: float) -> Tensor:
        """Add a micro-batch's gradient; its summed loss and its number of right guesses, float64 on the CPU."""
        with self.autocast:
            logits = self.network(batch, policy, self.block_length)
        targets = torch.from_numpy(batch.targets).to(logits.device)
        total = F.cross_entropy(logits, targets, reduction="sum")
        if self.teacher is not None:
            with self.autocast:
                divergence = self.teacher.divergence(logits, batch, self.block_length)
            total = total * (1 - self.teacher.share) + divergence * self.teacher.share
        (total * scale).backward()
        right = (logits.detach().argmax(dim=-1) == targets).sum()
        return torch.stack((total.detach().double(), right.double())).cpu()

    def _update(self) -> float:
        weights = [weight for _, weight in self.network.named_weights()]
        grads = [weight.grad for weight in weights if weight.grad is not None]
        norm = float(whole(torch.nn.utils.get_total_norm(grads)))
        if not math.isfinite(norm):
            self._refuse(f"the gradient's norm is {norm}")
        if norm > self.options.clip:
            torch._foreach_mul_(grads, self.options.clip / norm)
        for group in self.adam.param_groups:
            group["lr"] = self.options.rate(self.steps)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        return norm

    def _refuse(self, reason: str) -> None:
        self.adam.zero_grad(set_to_none=True)
        raise FloatingPointError(f"step {self.steps}: {reason}")

    def state_dict(self) -> dict[str, Any]:
        """Everything of this process that the next step depends on, by names of weights."""
        weights = dict(self.network.named_weights())
        return {
            "steps": self.steps,
            "weights": {name: local(weight).detach() for name, weight in weights.items()},
            "adam": {
                name: {key: local(value) for key, value in self.adam.state[weight].items()}
                for name, weight in weights.items()
                if weight in self.adam.state
            },
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict` of the same process."""
        self.steps = state["steps"]
        for name, weight in self.network.named_weights():
            local(weight).copy_(state["weights"][name])
            mine = self.adam.state[weight]
            for key, value in state["adam"].get(name, {}).items():
                blank = torch.zeros_like(weight) if value.dim() else torch.zeros_like(value, device=weight.device)
                local(blank).copy_(value)
                mine[key] = blank
