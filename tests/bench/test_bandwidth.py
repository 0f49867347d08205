"""What a machine gives, where its processor knows nothing of 16-bit numbers."""

from __future__ import annotations

import pytest
import torch

from offload_engine.bench import bandwidth

RATES = {
    "no instructions for bf16": ({torch.float32: 1e11, torch.bfloat16: 1e9}, 1e11, False),
    "some": ({torch.float32: 1e11, torch.bfloat16: 8e11}, 8e11, True),
    "slow at small ones": ({torch.float32: 1e11, torch.bfloat16: 9e10}, 1e11, True),
}


@pytest.mark.parametrize("name", RATES)
def test_the_faster_product_counts_and_a_hopeless_one_is_not_waited_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates, best, both = RATES[name]
    large: list[torch.dtype] = []

    def product(size: int, _device: torch.device, dtype: torch.dtype) -> float:
        if size == bandwidth.GEMM_SIZE:
            large.append(dtype)
        return rates[dtype]

    monkeypatch.setattr(bandwidth, "_product", product)
    assert bandwidth._gemm() == best
    assert large == ([torch.float32, torch.bfloat16] if both else [torch.float32])


def test_a_device_is_measured_in_its_own_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_product", lambda _size, _device, dtype: 5.0 if dtype is torch.float16 else 9.0)
    assert bandwidth._gemm(torch.device("cuda"), torch.float16) == 5.0
