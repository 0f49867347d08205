"""The pieces that both dense and MoE layers are made of."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offload_engine import kernels


class _Part:
    """See `part`."""

    def __set_name__(self, owner: type[nn.Module], name: str) -> None:
        self.name = name

    def __get__(self, module: nn.Module | None, owner: type[nn.Module] | None = None) -> Any:
        if module is None:
            return self
        name, parameters, modules = self.name, module._parameters, module._modules
        if name in parameters:
            return parameters[name]
        if name in modules:
            return modules[name]
        raise AttributeError(name)  # upon which torch looks, and tells


def part() -> Any:
    """A parameter or submodule of the class it is assigned to, found where torch keeps it. Torch's own way there is an
    `AttributeError` and a search: some 6 us between products that have used up the processor's caches, and a layer
    looks for two dozen.
    """
    return _Part()


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32 and scaled in the input's dtype; in bf16 on
    the CPU by our kernel, if it is there and no gradient is wanted.
    """

    weight: Tensor = part()

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[.., size] in any float dtype -> the same."""
        if kernels.serves_norm(x, self.weight):
            return kernels.rms_norm(x, self.weight, self.eps)
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class Linear(nn.Linear):
    """As torch's; in bf16 on the CPU by our kernel, if it is there and no gradient is wanted."""

    weight: Tensor = part()
    bias: nn.Parameter = part()

    def forward(self, x: Tensor) -> Tensor:
        """[.., in] -> [.., out]."""
        if kernels.serves_linear(x, self.weight, self.bias):
            return kernels.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)

    def unrounded(self, x: Tensor) -> Tensor:
        """[.., in] -> [.., out] float32: our kernel's sums as they are, torch's after rounding to `x`'s dtype."""
        if kernels.serves_linear(x, self.weight, self.bias):
            return kernels.linear(x, self.weight, self.bias, dtype=torch.float32)
        return F.linear(x, self.weight, self.bias).float()


class SwiGLU(nn.Module):
    """Gated feed-forward: down(silu(gate(x)) * up(x)); the dense layers' MLP and the shared experts."""

    gate_proj: Linear = part()
    up_proj: Linear = part()
    down_proj: Linear = part()

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, intermediate, bias=False)
        self.up_proj = Linear(hidden, intermediate, bias=False)
        self.down_proj = Linear(intermediate, hidden, bias=False)
        self._expert: kernels.Expert | None = None
        self._places: tuple[int, ...] = ()
        """Where the weights lay when `_expert` was made of them."""

    def forward(self, x: Tensor) -> Tensor:
        """[.., hidden] -> [.., hidden]; where our kernel computes it, the inner activation is not rounded to bf16."""
        expert = self.kernel_expert(x)
        if expert is None:
            out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
            return out
        return kernels.one_expert_ffn(x.reshape(-1, x.shape[-1]), expert).view(x.shape)

    def kernel_expert(self, x: Tensor) -> kernels.Expert | None:
        """The weights as our kernel takes them with `x`; None where it does not, or a gradient is wanted. Kept while no
        gradient is: checking takes a fifth as long as computing.
        """
        if x.dtype != torch.bfloat16 or not kernels.serves(x):
            return None
        weights = (self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
        places = tuple(weight.data_ptr() for weight in weights)
        if torch.is_grad_enabled() or places != self._places:
            if not all(kernels.serves_linear(x, weight) for weight in weights):
                return None
            self._expert, self._places = kernels.Expert.of(*map(kernels.Matrix, weights)), places
        return self._expert


def rotary_angles(positions: Tensor, dims: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [.., T, dims] of rotary embedding for int positions [.., T]; computed in float32, then cast."""
    exponents = torch.arange(0, dims, 2, dtype=torch.float32, device=positions.device) / dims
    half = positions.unsqueeze(-1).float() * (1.0 / theta**exponents)
    both = torch.cat((half, half), dim=-1)
    return both.cos().to(dtype), both.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the leading dims of each head of `x` [.., T, heads, head_dim] by angles [.., T, dims], rotate-half form;
    the rest stays as it is.
    """
    dims = cos.shape[-1]
    turned, rest = x[..., :dims], x[..., dims:]
    first, second = turned.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    turned = turned * cos.unsqueeze(-2) + rotated * sin.unsqueeze(-2)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
