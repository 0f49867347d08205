"""One training step: bfloat16 weights that compute as inference will, float32 masters that are updated."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offload_engine.model.config import ModelConfig
from offload_engine.model.llada2 import LLaDA2Model
from offload_engine.model.moe import MoEBlock
from offload_engine.routing import RoutingPolicy
from tools.training.diffusion import Batch, denoising_loss, masked_logits
from tools.training.experts import TrainableExperts
from tools.training.muon import Muon


@dataclass(frozen=True)
class Optimisation:
    """How weights are updated."""

    lr: float = 3e-3
    """Peak learning rate of the matrices."""
    adam_lr: float = 3e-3
    """Peak learning rate of embeddings, norms, routers and head."""
    weight_decay: float = 0.05
    clip: float = 1.0
    bias_rate: float = 2e-3
    """Step of the expert bias towards balance; 0 freezes it."""
    ema: float = 0.998
    """Decay of the averaged weights."""


@dataclass(frozen=True)
class StepReport:
    """What a step says of itself."""

    loss: float
    accuracy: float
    """Share of the masked tokens that the argmax gets right."""
    imbalance: float
    """Busiest expert's load over the mean load, averaged over layers."""


class Network(nn.Module):
    """The model and its experts as one module."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model = LLaDA2Model(config)
        self.experts = TrainableExperts(config)

    def forward(self, batch: Batch, policy: RoutingPolicy, block_length: int) -> Tensor:
        """Logits [M, vocab] float32 at the batch's masked tokens."""
        return masked_logits(self.model, batch, policy, self.experts, block_length)

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter, by the name and in the order that training checkpoints, seeds and exports know it by."""
        for name, parameter in self.model.named_parameters():
            yield f"model.{name}", parameter
        for kind, by_layer in (("gate_up", self.experts.gate_up), ("down", self.experts.down)):
            for layer, parameter in by_layer.items():
                yield f"experts.{kind}.{layer}", parameter

    def routers(self) -> Iterator[tuple[int, Any]]:
        """(layer, router) of every MoE layer."""
        for index, layer in enumerate(self.model.layers):
            if isinstance(layer.mlp, MoEBlock):
                yield index, layer.mlp.gate

    def cast(self, dtype: torch.dtype) -> Network:
        """Parameters in `dtype`; the expert biases stay in float32, unrounded."""
        biases = {layer: router.expert_bias for layer, router in self.routers()}
        self.to(dtype)
        for layer, router in self.routers():
            if biases[layer] is not None:
                router.expert_bias = biases[layer].float()
        return self


@torch.no_grad()
def initialise(network: Network, seed: int) -> None:
    """Random weights: matrices by fan-in, those that write to the residual stream a fifth of that, norms at one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_weights():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        std = 1 / math.sqrt(parameter.shape[-1])
        if "down" in name or "attention.dense" in name:
            std *= 0.2
        elif "lm_head" in name:
            std *= 0.1
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon updates a parameter (AdamW the others)."""
    return parameter.dim() >= 2 and not any(part in name for part in ("word_embeddings", "lm_head", "gate.weight"))


class Trainer:
    """The network, its masters, its average and its optimisers. `step` trains; everything else is state."""

    def __init__(
        self, config: ModelConfig, policy: RoutingPolicy, options: Optimisation, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.config, self.policy, self.options = config, policy, options
        self.network = Network(config).cast(dtype)
        self.steps = 0
        self.adopt(dict(self.network.named_weights()))

    @torch.no_grad()
    def adopt(self, weights: Mapping[str, Tensor]) -> None:
        """Start from these weights, named as in `Network`, with fresh masters, average and optimisers."""
        self.masters = {name: weights[name].detach().float().clone() for name, _ in self.network.named_weights()}
        for name, parameter in self.network.named_weights():
            parameter.copy_(self.masters[name])
        self.average = {n: m.clone() for n, m in self.masters.items()}
        for name, master in self.masters.items():
            if "gate_up" in name:
                master.stacked = 2  # type: ignore[attr-defined]
        matrices = [m for n, m in self.masters.items() if is_matrix(n, m)]
        others = [m for n, m in self.masters.items() if not is_matrix(n, m)]
        decay = self.options.weight_decay
        self.muon = Muon(matrices, lr=self.options.lr, weight_decay=decay)
        self.adam = torch.optim.AdamW(
            others, lr=self.options.adam_lr, betas=(0.9, 0.98), eps=1e-10, weight_decay=0.0, fused=True
        )

    def initialise(self, seed: int) -> None:
        """Start from random weights."""
        scratch = Network(self.config)
        initialise(scratch, seed)
        self.adopt(dict(scratch.named_weights()))

    def step(self, batch: Batch, factor: float, block_length: int = 32) -> StepReport:
        """One update at `factor` times the peak learning rates.

        Raises `FloatingPointError` if the loss or its gradient isn't finite, before any weight is changed.
        """
        logits = self.network(batch, self.policy, block_length)
        loss, accuracy = denoising_loss(logits, batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"step {self.steps}: the loss is {loss.item()}")
        loss.backward()
        self._update(factor)
        self.steps += 1
        return StepReport(loss.item(), accuracy, self._balance(factor))

    @torch.no_grad()
    def _update(self, factor: float) -> None:
        grads = []
        for name, parameter in self.network.named_weights():
            grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            self.masters[name].grad = grad.float()
            grads.append(self.masters[name].grad)
            parameter.grad = None
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        if not torch.isfinite(norm):
            raise FloatingPointError(f"step {self.steps}: the gradient's norm is {norm.item()}")
        torch._foreach_mul_(grads, float((self.options.clip / (norm + 1e-6)).clamp(max=1.0)))
        for optimiser, peak in ((self.muon, self.options.lr), (self.adam, self.options.adam_lr)):
            for group in optimiser.param_groups:
                group["lr"] = peak * factor
            optimiser.step()
        for name, parameter in self.network.named_weights():
            parameter.copy_(self.masters[name])
            self.masters[name].grad = None
        decay = min(self.options.ema, (self.steps + 1) / (self.steps + 10))
        torch._foreach_lerp_(list(self.average.values()), list(self.masters.values()), 1 - decay)

    @torch.no_grad()
    def _balance(self, factor: float) -> float:
        """Move every router's bias by the sign of its experts' lack of load; report the imbalance."""
        ratios = []
        for layer, router in self.network.routers():
            loads = self.network.experts.loads[layer].float()
            ratios.append(float(loads.max() / loads.mean()))
            if router.expert_bias is not None and self.options.bias_rate:
                router.expert_bias.add_((loads.mean() - loads).sign(), alpha=self.options.bias_rate * factor)
        return sum(ratios) / max(1, len(ratios))

    def biases(self) -> dict[str, Tensor]:
        """Every router's expert bias, by layer."""
        return {str(layer): r.expert_bias for layer, r in self.network.routers() if r.expert_bias is not None}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "steps": self.steps,
            "masters": self.masters,
            "average": self.average,
            "biases": self.biases(),
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.steps = state["steps"]
        for name, parameter in self.network.named_weights():
            self.masters[name].copy_(state["masters"][name])
            self.average[name].copy_(state["average"][name])
            parameter.copy_(self.masters[name])
        for key, bias in self.biases().items():
            bias.copy_(state["biases"][key])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
