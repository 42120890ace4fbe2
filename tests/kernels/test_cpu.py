"""The CPU's paths against DESIGN.md's formulas in float64: ragged shapes, masks, dtypes, strides, drift."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from chipmunk_compile.kernels import cpu
from tests.kernels import formulas
from tests.kernels.cases import PATHS, Attention, Mlp, close, needs_native


@pytest.fixture(autouse=True)
def two_threads():
    """The native ops share their work among OpenMP's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


SHAPES = {
    "one chunk": dict(segments=(63,), chunk=64),
    "odd length": dict(segments=(257,), chunk=64, kept=41),
    "segments": dict(batch=3, segments=(100, 63, 1), chunk=32),
    "short chunks": dict(segments=(9,), chunk=2, samples=4, kept=3),
    "head_dim 8": dict(dim=8, segments=(100,)),
    "head_dim 40": dict(dim=40, segments=(100,)),
    "head_dim 128": dict(dim=128, heads=1, segments=(70,)),
    "grouped queries": dict(batch=3, heads=4, kv_heads=2),
    "one key head": dict(heads=3, kv_heads=1),
    "more keys than queries": dict(kv_len=163, kept=50),
    "fewer keys than queries": dict(kv_len=40, kept=7),
    "several blocks of columns": dict(heads=1, segments=(20,), kv_len=1500, kept=1200),
    "one column": dict(kept=1),
    "everything": dict(kept=100),
    "boolean mask": dict(batch=3, mask="bool"),
    "one mask for the batch": dict(batch=3, mask="bool, shared"),
    "additive mask": dict(batch=3, mask="additive"),
    "mask leaves fewer than kept": dict(batch=3, mask="bool", kept=90),
    "everything, masked": dict(mask="additive", kept=100),
    "fused projection": dict(layout="fused", batch=3),
    "broadcast": dict(layout="broadcast"),
    "transposed": dict(layout="transposed"),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_attention_equals_the_formulas(shape, path):
    with cpu.force(path):
        Attention(**shape).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", ["blocked", "reference"])
def test_attention_in_half_precision(path, dtype):
    with cpu.force(path):
        Attention(dtype=dtype, batch=2, heads=4, kv_heads=2, segments=(63, 40), mask="additive").check()


@pytest.mark.parametrize("path", PATHS)
def test_a_full_count_means_every_column_whatever_the_list_says(path):
    a = Attention(segments=(100, 37), kept=20)
    state = o_cache, columns, counts = a.state()
    with cpu.force(path):
        a.refresh(state)
        counts[:, :, 1] = a.total
        columns[:, :, 1] = -1
        o = a.delta(state, a.query, a.key, a.value)
    sparse = formulas.sparse_attention(a.query, a.key, a.value, None, a.starts, columns, counts, a.scale)
    close(o, o_cache.double() + sparse)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("low", [None, -torch.inf, torch.finfo(torch.float32).min])
def test_a_batch_item_without_keys_makes_no_nan(path, low):
    a = Attention(batch=2, mask="bool")
    a.mask[1] = False
    if low is not None:
        a.mask = torch.where(a.mask, 0.0, low)
    dense = torch.nn.functional.scaled_dot_product_attention(a.query, a.key, a.value, a.mask, scale=a.scale)
    state = a.state()
    with cpu.force(path):
        close(a.refresh(state), dense.nan_to_num())
        assert state[2][1].eq(0).all() and state[0].isfinite().all()
        close(a.delta(state, a.query, a.key, a.value), dense.nan_to_num())


@pytest.mark.parametrize("path", PATHS)
def test_a_mask_that_closes_all_chosen_columns_leaves_the_cache(path):
    a = Attention(mask="bool")
    state = a.state()
    with cpu.force(path):
        a.refresh(state)
        a.mask = torch.zeros_like(a.mask)
        close(a.delta(state, *a.inputs()), state[0])


@pytest.mark.parametrize("path", PATHS)
def test_rows_whose_mass_lies_outside_the_chosen_columns(path):
    """Their chosen weights underflow beside the row's maximum; the softmax over them alone does not."""
    a = Attention(segments=(64,), chunk=64, kept=5, samples=2, dim=8)
    unsampled = [t for t in range(64) if t not in a.samples[0].tolist()]
    a.query.zero_()
    a.query[..., 0] = 40.0
    a.query[:, :, unsampled, 0] = -40.0
    a.key[..., 0] = torch.linspace(-8, 8, 64)
    with cpu.force(path):
        a.check()


@pytest.mark.parametrize("path", PATHS)
def test_equal_scores_do_not_crowd_out_better_ones(path):
    a = Attention(heads=1, segments=(100,), chunk=100, kept=10)
    a.query[..., 0], a.query[..., 1:] = 1.0, 0.0
    a.key[..., 0] = 0.0
    a.key[0, 0, 95:, 0] = torch.arange(5.0) + 1  # the best five are the last, all others tie
    state = a.state()
    with cpu.force(path):
        a.refresh(state)
    chosen = state[1].flatten().tolist()
    assert len(set(chosen)) == 10 and chosen[5:] == [95, 96, 97, 98, 99]


@pytest.mark.parametrize("path", PATHS)
def test_nan_passes_through_attention(path):
    a = Attention(segments=(40,), heads=1, kept=40)
    a.query[0, 0, 3] = torch.nan
    with cpu.force(path):
        o = a.refresh(a.state())
    assert o[0, 0, 3].isnan().all() and o[0, 0, 4].isfinite().all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("region", formulas.ACTIVATIONS)
def test_mlp_of_every_activation(region, path):
    mlp = Mlp(region, batch=3, segments=(63, 30), fused=True)
    with cpu.force(path):
        mlp.check(torch.randn_like(mlp.x))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "shape",
    [
        dict(segments=(257,), chunk=64),
        dict(segments=(9,), chunk=2),
        dict(bias=False, batch=3),
        dict(kept=1),
        dict(kept=70),
        dict(width=130, hidden=300, out_width=70, kept=200, segments=(63,), chunk=64, samples=8),
        dict(width=3000, hidden=400, out_width=8, kept=300, segments=(20,), region="mul(gelu(h0), h1)"),
    ],
    ids=[
        "odd length",
        "short chunks",
        "no bias",
        "one neuron",
        "every neuron",
        "wide",
        "several blocks of neurons",
    ],
)
def test_mlp_of_every_shape(shape, path):
    mlp = Mlp(**shape)
    with cpu.force(path):
        mlp.check(torch.randn_like(mlp.x))


@pytest.mark.parametrize("path", PATHS)
def test_mlp_input_of_any_stride(path):
    mlp = Mlp(batch=2)
    with cpu.force(path):
        mlp.check(torch.randn(2, 24, 100).transpose(1, 2))
        mlp.check(torch.randn(100, 2, 24).transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", ["blocked", "reference"])
def test_mlp_in_half_precision(path, dtype):
    mlp = Mlp("mul(gelu(h0), h1)", batch=2, segments=(63, 30), dtype=dtype)
    mlp.act.add_(3.0)  # so that no rounded activation can equal the cached one, and `changed` is what was chosen
    mlp.sampled.add_(3.0)
    with cpu.force(path):
        mlp.check(torch.randn_like(mlp.x))


@pytest.mark.parametrize("path, dtype", [*itertools.product(["blocked", "reference"], [torch.float32, torch.bfloat16])])
def test_mlp_error_stays_flat_over_fifty_steps(path, dtype):
    _assert_flat(path, dtype)


@needs_native
def test_native_mlp_error_stays_flat_over_fifty_steps():
    _assert_flat("native", torch.float32)


def _assert_flat(path: str, dtype: torch.dtype) -> None:
    mlp = Mlp(dtype=dtype, segments=(50,), kept=70)
    errors = []
    with cpu.force(path):
        for _ in range(50):
            mlp.x = (mlp.x + 0.3 * torch.randn_like(mlp.x)).to(dtype)
            mlp.delta(mlp.x)
            exact = mlp.activations(mlp.x) @ mlp.down_t.double()
            errors.append(((mlp.out - exact).norm() / exact.norm()).item())
    assert max(errors) < (5e-3 if dtype == torch.bfloat16 else 5e-6)
    if dtype == torch.bfloat16:
        assert sum(errors[-10:]) < 1.3 * sum(errors[:10])


@pytest.mark.parametrize("path", PATHS)
def test_an_unchanged_input_changes_nothing(path):
    mlp = Mlp(batch=2)
    dense = mlp.out.clone()
    with cpu.force(path):
        for kept in (1, 21, 70):
            close(mlp.delta(mlp.x, kept), dense)


@pytest.mark.parametrize("path", PATHS)
def test_the_same_call_gives_the_same_bits(path):
    def run() -> list[torch.Tensor]:
        torch.manual_seed(1)
        attention, mlp = Attention(mask="bool", batch=2), Mlp(batch=2)
        state = attention.state()
        outputs = [attention.refresh(state), attention.delta(state, *attention.inputs()), *state]
        return outputs + [mlp.delta(torch.randn_like(mlp.x)), mlp.act, mlp.sampled, mlp.out]

    with cpu.force(path):
        assert all(a.equal(b) for a, b in zip(run(), run()))


@needs_native
def test_scratch_memory_of_earlier_calls_does_not_leak_into_later_ones():
    with cpu.force("native"):
        for shape in (dict(segments=(70,), kv_len=90, kept=50), dict(segments=(33,), kept=5)):
            spoiled = Attention(**shape)
            spoiled.query.fill_(torch.nan)
            spoiled.value.fill_(torch.nan)
            spoiled.refresh(spoiled.state())
            Attention(**shape).check()
        spoiled = Mlp()
        spoiled.delta(torch.full_like(spoiled.x, torch.nan))
        mlp = Mlp()
        mlp.check(torch.randn_like(mlp.x))


@pytest.mark.parametrize("path", PATHS)
def test_calls_from_several_threads_do_not_meet(path):
    def work(seed: int) -> list[torch.Tensor]:
        attention, mlp = cases[seed]
        state = attention.state()
        return [attention.refresh(state), *state, mlp.delta(mlp.x + 1), mlp.act, mlp.out]

    def make() -> list[tuple[Attention, Mlp]]:
        torch.manual_seed(7)
        return [(Attention(segments=(90 + i,), kv_len=70 + 9 * i), Mlp(segments=(60 + i,))) for i in range(8)]

    with cpu.force(path):
        cases = make()
        alone = [work(i) for i in range(8)]
        cases = make()
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(work, range(8)))
    assert all(a.equal(b) for first, second in zip(alone, together) for a, b in zip(first, second))
