"""The kernels against float64, in every format and on every instruction set that this machine has."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import FORMATS, dense, oracle, random_expert, random_hidden, relative_error

from offload_engine.kernels import Matrix, expert_ffn
from offload_engine.kernels.library import KernelStatus, Library, choose

VARIANTS = ("avx512_bf16", "avx2", "generic")
BF16_OUTPUT = 2.0**-8
"""Of the norm: rounding each output to bf16 costs at most 2^-9."""


def kernel_named(library: Library, variant: str) -> KernelStatus:
    if variant not in library.variants:
        pytest.skip(f"this CPU has no {variant}")
    return choose(library, variant)


def tolerance(form: str, variant: str) -> float:
    """Of the norm, before the output is rounded. float32 sums leave 1e-6; bf16 activations (2^-9 each, three times
    rounded: hidden, inner and the int4 weights) 5e-3; activations as integers 1e-3.
    """
    if form == "int8":
        return 1e-3
    return 5e-3 if variant == "avx512_bf16" else 3e-6


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("tokens", "width", "inner"),
    [(1, 2048, 512), (16, 2048, 512), (7, 160, 16), (5, 48, 80), (3, 32, 16), (67, 96, 48), (2, 1008, 336)],
)
def test_every_variant_computes_what_float64_does(
    library: Library, variant: str, form: str, tokens: int, width: int, inner: int
) -> None:
    kernel = kernel_named(library, variant)
    expert = random_expert(form, width, inner)
    for dtype, rounding in ((torch.float32, 0.0), (torch.bfloat16, BF16_OUTPUT)):
        hidden = random_hidden(tokens, width, dtype)
        found = expert_ffn(hidden, *expert, kernel=kernel)
        wanted = oracle(hidden, expert, int4_in_bf16=variant == "avx2")
        assert found.dtype == dtype
        assert relative_error(found, wanted) < tolerance(form, variant) + rounding


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group", [8, 24, 32, 48, 64, 96, 128])
def test_int4_is_exact_in_groups_of_any_size(library: Library, variant: str, group: int) -> None:
    """The default, 32, among them: what is looked up sixteen bytes at a time, and what is left over."""
    kernel = kernel_named(library, variant)
    expert = random_expert("int4", 4 * group, 2 * group, group, seed=group)
    hidden = random_hidden(5, 4 * group, torch.float32)
    found = expert_ffn(hidden, *expert, kernel=kernel)
    wanted = oracle(hidden, expert, int4_in_bf16=variant == "avx2")
    assert relative_error(found, wanted) < tolerance("int4", variant)


@pytest.mark.parametrize("variant", VARIANTS)
@given(
    form=st.sampled_from(FORMATS),
    tokens=st.integers(1, 20),
    pairs=st.tuples(st.integers(1, 80), st.integers(1, 50)),
    groups=st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
def test_any_shape(
    library: Library, variant: str, form: str, tokens: int, pairs: tuple[int, int], groups: tuple[int, int]
) -> None:
    kernel = kernel_named(library, variant)
    group = 2 * pairs[0]
    width, inner = (group * groups[0], group * groups[1]) if form == "int4" else (pairs[0] + 1, pairs[1])
    expert = random_expert(form, width, inner, group)
    hidden = random_hidden(tokens, width, torch.float32)
    found = expert_ffn(hidden, *expert, kernel=kernel)
    largest = max(float(dense(matrix).abs().max()) for matrix in expert)
    assert (found - oracle(hidden, expert)).norm() <= 0.02 * max(float(oracle(hidden, expert).norm()), largest)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_neither_threads_nor_neighbours_show_in_a_token(library: Library, variant: str, form: str) -> None:
    kernel = kernel_named(library, variant)
    expert = random_expert(form, 512, 208)
    hidden = random_hidden(150, 512, torch.bfloat16)  # blocks of 64, 64 and 22
    together = expert_ffn(hidden, *expert, kernel=kernel, threads=1)
    for threads in (2, 3):
        for _ in range(5):
            assert torch.equal(expert_ffn(hidden, *expert, kernel=kernel, threads=threads), together)
    for first, last in ((0, 1), (1, 9), (9, 23), (23, 60), (60, 150)):
        alone = expert_ffn(hidden[first:last], *expert, kernel=kernel, threads=1)
        assert torch.equal(alone, together[first:last])


def test_int8_sums_are_exact_so_that_all_variants_agree_bit_for_bit(library: Library) -> None:
    for width, inner in ((160, 16), (2048, 512), (4096, 1024)):
        expert = random_expert("int8", width, inner)
        hidden = random_hidden(5, width, torch.float32)
        found = [expert_ffn(hidden, *expert, kernel=choose(library, name)) for name in library.variants]
        assert all(torch.equal(other, found[0]) for other in found)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_widest_int8_rows_do_not_overflow(library: Library, variant: str) -> None:
    width, inner = 16384, 4
    worst = Matrix(torch.full((inner, width), -128, dtype=torch.int8), torch.full((inner,), 1e-4))
    down = Matrix(torch.full((width, inner), 127, dtype=torch.int8), torch.full((width,), 1e-3))
    hidden = torch.full((1, width), -1.0)
    found = expert_ffn(hidden, worst, worst, down, kernel=kernel_named(library, variant))
    assert relative_error(found, oracle(hidden, (worst, worst, down))) < 1e-3  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_a_damaged_token_spoils_itself_alone(library: Library, variant: str, form: str, damage: float) -> None:
    kernel = kernel_named(library, variant)
    expert = random_expert(form, 64, 32)
    hidden = random_hidden(5, 64, torch.float32)
    sound = expert_ffn(hidden, *expert, kernel=kernel)
    hidden[2, 7] = damage
    found = expert_ffn(hidden, *expert, kernel=kernel)
    assert not found[2].isfinite().any()
    others = [0, 1, 3, 4]
    assert torch.equal(found[others], sound[others])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", FORMATS)
def test_zeros_denormals_and_saturated_gates(library: Library, variant: str, form: str) -> None:
    kernel = kernel_named(library, variant)
    expert = random_expert(form, 64, 32)
    for scale in (0.0, 1e-38, 1e-44):
        assert expert_ffn(torch.full((2, 64), scale), *expert, kernel=kernel).abs().max() < 1e-30
    hidden = random_hidden(4, 64, torch.float32) * 1e4  # silu far beyond where exp over- and underflows
    assert relative_error(expert_ffn(hidden, *expert, kernel=kernel), oracle(hidden, expert)) < 0.01


def test_weights_at_odd_addresses(library: Library) -> None:
    """Slots hold matrices where the file put them."""
    expert = random_expert("int8", 96, 48)
    shifted = []
    for values, scales in expert:
        memory = torch.empty(values.numel() + 1, dtype=torch.int8)
        shifted.append(Matrix(memory[1:].view(values.shape).copy_(values), scales))
    hidden = random_hidden(3, 96, torch.float32)
    for name in library.variants:
        kernel = choose(library, name)
        assert torch.equal(expert_ffn(hidden, *shifted, kernel=kernel), expert_ffn(hidden, *expert, kernel=kernel))


def test_no_tokens_and_concurrent_callers(library: Library) -> None:
    kernel = choose(library, "auto")
    expert = random_expert("bf16", 160, 48)
    assert expert_ffn(torch.empty(0, 160, dtype=torch.bfloat16), *expert, kernel=kernel).shape == (0, 160)
    hidden = random_hidden(9, 160, torch.bfloat16)
    wanted = expert_ffn(hidden, *expert, kernel=kernel)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: expert_ffn(hidden, *expert, kernel=kernel), range(40)))
    assert all(torch.equal(one, wanted) for one in found)


GOOD = {form: random_expert(form, 64, 32) for form in FORMATS}


@pytest.mark.parametrize(
    ("form", "change", "told"),
    [
        ("bf16", {"up": Matrix(torch.zeros(32, 63).bfloat16())}, r"up is bfloat16 \[32, 63\], wanted .* \[32, 64\]"),
        ("bf16", {"down": Matrix(torch.zeros(32, 64).bfloat16())}, r"down is .* wanted contiguous \[64, 32\]"),
        ("bf16", {"down": Matrix(torch.zeros(32, 64).bfloat16().T)}, "down is .* wanted contiguous"),
        ("bf16", {"up": GOOD["int8"].up}, r"up is int8 \[32, 64\], wanted .* in gate's dtype"),
        ("bf16", {"gate": Matrix(torch.zeros(32, 64))}, "gate is float32"),
        ("bf16", {"gate": Matrix(GOOD["bf16"].gate.values, torch.zeros(32))}, "gate has scales, which bf16"),
        ("int8", {"down": Matrix(GOOD["int8"].down.values)}, "down's scales are absent"),
        ("int8", {"up": Matrix(GOOD["int8"].up.values, torch.zeros(31))}, r"up's scales are float32 \[31\]"),
        ("int8", {"up": Matrix(GOOD["int8"].up.values, torch.zeros(32).bfloat16())}, "up's scales are bfloat16"),
        ("int4", {"gate": Matrix(GOOD["int4"].gate.values)}, "gate has no scales"),
        ("int4", {"gate": Matrix(GOOD["int4"].gate.values, torch.zeros(32, 7).bfloat16())}, "7 scales per row of 64"),
        ("int4", {"down": Matrix(GOOD["int4"].down.values, torch.zeros(64, 1).bfloat16())}, "down's scales are"),
        (
            "int4",
            {"up": Matrix(torch.zeros(32, 31, dtype=torch.uint8), GOOD["int4"].up.scales)},
            r"wanted .* \[32, 32\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(library: Library, form: str, change: dict[str, Matrix], told: str) -> None:
    expert = GOOD[form]._replace(**change)
    with pytest.raises(ValueError, match=told):
        expert_ffn(random_hidden(3, 64, torch.bfloat16), *expert, kernel=choose(library, "auto"))


@pytest.mark.parametrize("hidden", [torch.zeros(3, 64).half(), torch.zeros(64), torch.zeros(3, 64, dtype=torch.int8)])
def test_hidden_that_does_not_fit_is_refused(library: Library, hidden: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"hidden is .* wanted contiguous bf16 or float32"):
        expert_ffn(hidden, *GOOD["bf16"], kernel=choose(library, "auto"))


def test_rows_too_wide_for_exact_sums_are_refused(library: Library) -> None:
    wide = Matrix(torch.zeros(2, 16386, dtype=torch.int8), torch.zeros(2))
    with pytest.raises(ValueError, match="16384"):
        expert_ffn(torch.zeros(1, 16386), wide, wide, GOOD["int8"].down, kernel=choose(library, "auto"))
