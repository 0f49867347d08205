"""A peer: the same experts as modules whose weights `accelerate` fetches from disk before each use and drops after it.

`accelerate` is no dependency of this package; where it can't be imported its contenders are left out, and that is told.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from offload_engine.core import ForwardInfo, RoutingDecision
from offload_engine.errors import CheckpointError
from offload_engine.model.checkpoint import Checkpoint
from offload_engine.model.config import ModelConfig
from offload_engine.model.layers import SwiGLU
from offload_engine.model.moe import Beside, Decide, Preview, nothing, tokens_by_expert
from offload_engine.model.weights import MATRICES, split_name


class AccelerateExperts:
    """An `ExpertExecutor` that leaves the weights to accelerate's disk offload."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        """Raises `ImportError` without accelerate, `CheckpointError` unless a tensor holds one expert's matrix."""
        from accelerate.hooks import attach_align_device_hook
        from accelerate.utils import OffloadedWeightsLoader

        with torch.device("meta"):
            modules = nn.ModuleDict(
                {
                    f"{layer}-{expert}": SwiGLU(config.hidden_size, config.moe_intermediate_size).to(dtype)
                    for layer, expert in itertools.product(config.moe_layers, range(config.num_experts))
                }
            ).requires_grad_(False)
        index = _offload_index(config, checkpoint, dtype)
        attach_align_device_hook(
            modules, execution_device="cpu", offload=True, weights_map=OffloadedWeightsLoader(index=index)
        )
        self._modules = modules

    def begin(self, info: ForwardInfo) -> None:
        """See `ExpertExecutor`."""

    def prepare(self, layer: int, preview: Preview) -> None:
        """See `ExpertExecutor`: accelerate fetches nothing ahead."""

    def route(self, layer: int, hidden: Tensor, decide: Decide) -> RoutingDecision:  # noqa: ARG002
        """See `ExpertExecutor`."""
        return decide()

    def run(self, layer: int, hidden: Tensor, decision: RoutingDecision, beside: Beside = nothing) -> Tensor:  # noqa: ARG002
        """See `ExpertExecutor`."""
        return self.sweep(layer, hidden, decision, hidden.shape[0]).to(hidden.dtype)

    def sweep(self, layer: int, hidden: Tensor, decision: RoutingDecision, rows: int) -> Tensor:  # noqa: ARG002
        """See `ExpertExecutor`; however many tokens an expert has, it computes them together."""
        choices = decision.experts.shape[1]
        flat_weights = decision.weights.flatten()
        out = torch.zeros(hidden.shape, dtype=torch.float32)
        for group in tokens_by_expert(decision.experts):
            tokens = group.places.div(choices, rounding_mode="floor")
            computed = self._modules[f"{layer}-{group.expert}"](hidden.index_select(0, tokens))
            out.index_add_(0, tokens, computed.float() * flat_weights[group.places].unsqueeze(-1))
        return out


def _offload_index(config: ModelConfig, checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Where accelerate finds each parameter: the checkpoint's own shards, nothing is written again."""
    index = {}
    for layer, expert, which in itertools.product(config.moe_layers, range(config.num_experts), MATRICES):
        name = split_name(layer, expert, which)
        if name not in checkpoint.tensors:
            raise CheckpointError(
                f"{checkpoint.directory}: no tensor {name!r}; accelerate wants one tensor for each matrix"
            )
        index[f"{layer}-{expert}.{which}.weight"] = {
            "safetensors_file": str(checkpoint.tensors[name].path),
            "weight_name": name,
            "dtype": str(dtype).removeprefix("torch."),
        }
    return index
