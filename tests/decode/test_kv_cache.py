"""The memory of keys and values: zeros, there in time, given back."""

from __future__ import annotations

import errno

import pytest
import torch

from offload_engine import pages
from offload_engine.decode import kv_cache
from offload_engine.decode.kv_cache import PrefixCache
from offload_engine.errors import MemoryBudgetError
from offload_engine.model.config import ModelConfig
from tests.checkpoints import tiny_config
from tests.experts.test_arena import resident_memory

CPU = torch.device("cpu")
CONFIG = ModelConfig.from_dict(tiny_config(num_hidden_layers=4, head_dim=64))
LONG = 20_000
"""Positions that take some megabytes."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("context", [1, 33, LONG])
def test_keys_and_values_are_zeros_apart(context: int, dtype: torch.dtype) -> None:
    cache = PrefixCache(CONFIG, context, dtype, CPU)
    shape = (4, context, CONFIG.num_key_value_heads, 64)
    assert cache.keys.shape == cache.values.shape == shape
    assert cache.keys.dtype == cache.values.dtype == dtype
    assert cache.keys.is_contiguous()
    assert cache.values.is_contiguous()
    assert not cache.keys.any()
    cache.keys.fill_(1.0)
    assert not cache.values.any()
    cache.values.fill_(2.0)
    assert bool((cache.keys == 1).all())
    cache.release()


def test_its_memory_comes_while_it_is_used_and_goes_at_the_end() -> None:
    PrefixCache(CONFIG, LONG, torch.float32, CPU).release()
    before = resident_memory()
    cache = PrefixCache(CONFIG, LONG, torch.float32, CPU)
    cache.keys[:, ::7] = 3.0
    nbytes = cache.keys.nbytes + cache.values.nbytes
    cache.wait_touched()
    assert resident_memory() - before >= 0.95 * nbytes
    assert bool((cache.keys[:, ::7] == 3).all())
    assert not cache.values.any()
    cache.release()
    assert resident_memory() - before <= 0.1 * nbytes


def test_memory_that_the_system_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(10))
    with monkeypatch.context() as patch:
        patch.setattr(pages, "_populate", lambda _piece: next(calls) < 2)
        cache = PrefixCache(CONFIG, LONG, torch.float32, CPU)
        with pytest.raises(MemoryBudgetError, match=r"refused \d+ bytes of those for keys and values; ask"):
            cache.wait_touched()
        cache.release()

    def refuse(_nbytes: int) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(kv_cache, "huge_pages", refuse)
    with pytest.raises(MemoryBudgetError, match=r"refused \d+ bytes for keys and values \(.*Cannot allocate"):
        PrefixCache(CONFIG, 1, torch.float32, CPU)
