from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from offload_engine.decode.warm_up import warm_up

MEASURE = """
import sys, torch, psutil
import offload_engine.engine.engine
from offload_engine.decode.warm_up import warm_up
torch.set_num_threads(1)
rss = psutil.Process().memory_info
before = rss().rss
warm_up(torch.bfloat16)
warm = rss().rss
a = torch.ones(64, 512, dtype=torch.bfloat16)
for _ in range(3):
    torch.nn.functional.linear(a, torch.ones(256, 512, dtype=torch.bfloat16))
    torch.nn.functional.scaled_dot_product_attention(*(torch.ones(1, 4, 64, 64, dtype=torch.bfloat16),) * 3)
    a.float().sort(stable=True).values.softmax(-1).cumsum(-1).multinomial(1)
print(warm - before, rss().rss - warm)
"""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_leaves_the_random_numbers_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    warm_up.__wrapped__(dtype)
    assert torch.equal(torch.rand(1), expected)


def test_what_libraries_take_for_good_is_taken_by_it() -> None:
    root = Path(__file__).parents[2]
    ran = subprocess.run([sys.executable, "-c", MEASURE], cwd=root, capture_output=True, text=True, check=True)
    by_warm_up, later = map(int, ran.stdout.split())
    assert by_warm_up > 8 * 2**20
    assert later < by_warm_up / 2
