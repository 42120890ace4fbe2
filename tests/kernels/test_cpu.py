"""The CPU's paths against DESIGN.md's formulas in float64: ragged shapes, masks, dtypes, strides, drift."""

from __future__ import annotations

import contextlib
import itertools
import logging
import pathlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from chipmunk_compile.kernels import cpu, native_build, ops, reference  # noqa: F401  (ops defines torch.ops.chipmunk)
from tests.kernels import formulas

refresh, delta = torch.ops.chipmunk.attention_refresh, torch.ops.chipmunk.attention_delta
mlp_delta = torch.ops.chipmunk.mlp_delta
needs_native = pytest.mark.skipif(cpu.prepare() != "native", reason="no C++ compiler or no SGEMM")
NATIVE = pytest.param("native", marks=needs_native)
PATHS = [NATIVE, "blocked", "reference"]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@contextlib.contextmanager
def poisoned():
    """Everything that torch.empty and new_empty give is NaN, or a huge integer."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def close(actual, expected, dtype=torch.float32, scale: float = 1.0) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), atol=scale * TOLERANCE[dtype], rtol=TOLERANCE[dtype])


class Attention:
    """Random inputs of one attention; layout "heads last" is diffusers' [B, N, H, D] seen transposed."""

    def __init__(
        self, batch=1, heads=2, kv_heads=None, segments=(100,), kv_len=None, dim=16, chunk=32, kept=20,
        samples=4, mask=None, dtype=torch.float32, layout="heads last",
    ) -> None:  # fmt: skip
        self.tokens, self.kept, self.chunk, self.scale = sum(segments), kept, chunk, dim**-0.5
        self.total = kv_len or self.tokens
        self.shapes = [(batch, heads, self.tokens, dim)] + 2 * [(batch, kv_heads or heads, self.total, dim)]
        self.layout, self.dtype = layout, dtype
        self.mask = self._mask(mask, batch)
        self.query, self.key, self.value = self.inputs()
        self.starts = reference.chunk_table(segments, chunk)
        self.samples = reference.sample_table(self.starts, samples)

    def inputs(self) -> list[torch.Tensor]:
        return [self._tensor(*shape) for shape in self.shapes]

    def _tensor(self, b: int, h: int, n: int, d: int) -> torch.Tensor:
        if self.layout == "heads last":
            return torch.randn(b, n, h, d).to(self.dtype).transpose(1, 2)
        if self.layout == "fused":  # a slice of one projection of queries, keys and values
            return torch.randn(b, n, h, 3 * d).to(self.dtype)[..., d : 2 * d].transpose(1, 2)
        if self.layout == "broadcast":  # one head for all
            return torch.randn(b, 1, n, d).to(self.dtype).expand(b, h, n, d)
        return torch.randn(b, h, d, n).to(self.dtype).transpose(2, 3)  # "transposed": no stride is 1 along D

    def _mask(self, kind, batch: int):
        if kind is None:
            return None
        allowed = torch.rand(1 if kind == "bool, shared" else batch, 1, 1, self.total) > 0.3
        if "bool" in kind:
            return allowed
        return torch.where(allowed, torch.randn(allowed.shape), -torch.inf).to(self.dtype)

    def state(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        (b, h, n, d), chunks = self.shapes[0], len(self.starts) - 1
        state = reference.attention_state(b, h, n, self.total, d, self.kept, chunks, self.dtype, "cpu")
        return state[0].fill_(torch.nan), state[1].fill_(-1), state[2].fill_(-1)

    def refresh(self, state) -> torch.Tensor:
        args = (self.query, self.key, self.value, self.mask, self.starts, self.samples)
        return refresh(*args, *state, self.scale, self.chunk)

    def delta(self, state, query, key, value) -> torch.Tensor:
        return delta(query, key, value, self.mask, self.starts, *state, self.scale, self.chunk)

    def check(self) -> None:
        """Refresh and delta on new inputs, against the formulas."""
        state = o_cache, columns, counts = self.state()
        with poisoned():
            o = self.refresh(state)
        dense = formulas.dense_attention(self.query, self.key, self.value, self.mask, self.scale)
        close(o, dense, self.dtype)
        scores = formulas.column_scores(self.query, self.key, self.mask, self.samples, self.scale)
        for b, h, c in itertools.product(*map(range, counts.shape)):
            valid = formulas.mask_of(self.mask, b, self.total)[0]
            chosen = columns[b, h, c, : counts[b, h, c]]
            formulas.assert_best(scores[b, h, c], chosen, valid, self.kept, 1e-5)
            unused = columns[b, h, c, counts[b, h, c] :]
            assert not unused.any()
            unused.fill_(-7)  # what lies past the count is not read
        args = (self.mask, self.starts, columns, counts, self.scale)
        close(o_cache, dense - formulas.sparse_attention(self.query, self.key, self.value, *args), self.dtype)
        with poisoned():
            unchanged = self.delta(state, self.query, self.key, self.value)
        close(unchanged, dense, self.dtype)
        fresh, before = self.inputs(), [t.clone() for t in state]
        with poisoned():
            o = self.delta(state, *fresh)
        close(o, o_cache.double() + formulas.sparse_attention(*fresh, *args), self.dtype)
        assert all(a.equal(b) for a, b in zip(state, before)), "a delta changes no state"
        assert o.transpose(1, 2).is_contiguous() and o.dtype == self.dtype


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


class Mlp:
    """A random MLP with caches that a refresh on its input `x` would leave."""

    def __init__(
        self, region="gelu_tanh(h0)", batch=1, segments=(100,), width=24, hidden=70, out_width=20, chunk=32,
        kept=21, samples=4, bias=True, dtype=torch.float32, fused=False,
    ) -> None:  # fmt: skip
        self.region, self.dtype, self.kept, self.chunk = region, dtype, kept, chunk
        parts = 2 if "h1" in region else 1
        whole = (torch.randn(parts * hidden + 5, width) / width**0.5).to(dtype)
        self.weights = list(whole[5:].split(hidden)) if fused else [w.clone() for w in whole[5:].split(hidden)]
        self.biases = [torch.randn(hidden).to(dtype) for _ in self.weights] if bias else []
        self.down_t = (torch.randn(hidden, out_width) / hidden**0.5).to(dtype)
        self.down_norm = self.down_t.float().norm(dim=1)
        self.starts = reference.chunk_table(segments, chunk)
        self.samples = reference.sample_table(self.starts, samples)
        self.x = torch.randn(batch, sum(segments), width).to(dtype)
        size = (batch, sum(segments), hidden, out_width, samples, len(self.starts) - 1)
        with poisoned():
            self.act, self.sampled, self.out = reference.mlp_state(*size, dtype, "cpu")
        before = self.activations(self.x).to(dtype)
        self.act.copy_(before.transpose(1, 2))
        self.sampled.copy_(self.sample(before))
        self.out.copy_(before.double() @ self.down_t.double())

    def activations(self, x) -> torch.Tensor:
        return formulas.activations(x, self.weights, self.biases, self.region)

    def sample(self, activations) -> torch.Tensor:
        return activations[:, self.samples.flatten().long()].view(self.sampled.shape)

    def delta(self, x, kept=None) -> torch.Tensor:
        caches = (self.act, self.sampled, self.out)
        return mlp_delta(
            x, self.weights, self.biases, self.down_t, self.down_norm, self.starts, self.samples, *caches,
            self.region, self.chunk, kept or self.kept,
        )  # fmt: skip

    def check(self, x) -> None:
        """One delta on the new input, against the formulas: which neurons, the caches, the output."""
        act, sampled, out = (t.clone() for t in (self.act, self.sampled, self.out))
        with poisoned():
            result = self.delta(x)
        after, before = self.activations(x), act.double().transpose(1, 2)
        changed = (self.act != act).transpose(1, 2)
        score = (self.sample(after) - sampled.double()).abs().sum(2) * self.down_norm.double()
        expected, hidden = before.clone(), after.shape[2]
        for b, (c, rows) in itertools.product(range(len(x)), enumerate(formulas.chunks_of(self.starts))):
            neurons = changed[b, rows].any(0).nonzero().flatten()
            slack = TOLERANCE[self.dtype] * (1 + score[b, c].max())
            formulas.assert_best(score[b, c], neurons, torch.ones(hidden, dtype=torch.bool), self.kept, slack)
            expected[b, rows, neurons] = after[b, rows, neurons]
        close(self.act.transpose(1, 2), expected, self.dtype)
        assert self.sampled.equal(self.sample(self.act.transpose(1, 2)))
        # The change of the rounded activations that the cache really holds, not of the exact ones.
        change = self.act.double().transpose(1, 2) - before
        close(self.out, out.double() + change @ self.down_t.double(), scale=10)
        assert result.equal(self.out.to(self.dtype)) and result.data_ptr() != self.out.data_ptr()


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


# --- which path runs, and how the native one is built ---


def test_float32_runs_native_where_it_can_and_other_dtypes_in_torch(monkeypatch):
    ran = []
    for module in (cpu.blocked, cpu.reference):
        real = module.attention_delta
        name = module.__name__.rsplit(".")[-1]
        monkeypatch.setattr(module, "attention_delta", lambda *a, real=real, name=name: (ran.append(name), real(*a))[1])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        a = Attention(dtype=dtype)
        state = a.state()
        a.refresh(state)
        a.delta(state, a.query, a.key, a.value)
    assert ran == ([] if cpu.prepare() == "native" else ["blocked"]) + ["blocked", "reference"]


def test_forcing_a_path_is_strict():
    with pytest.raises(ValueError, match="choose one of"), cpu.force("fast"):
        pass
    a = Attention(dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="native was forced"), cpu.force("native"):
        a.refresh(a.state())


@needs_native
def test_tables_that_do_not_cover_the_tokens_are_refused():
    a = Attention()
    a.starts[-1] -= 1
    with pytest.raises(ValueError, match="chunk_table"):
        a.refresh(a.state())
    mlp = Mlp()
    mlp.samples[0, 0] = 99  # a token of another chunk
    with pytest.raises(ValueError, match="sample_table"):
        mlp.delta(mlp.x)


@pytest.mark.parametrize("path", [NATIVE, "blocked"])
def test_state_that_no_refresh_has_filled_is_refused(path):
    a = Attention()
    o_cache, columns, counts = a.state()
    with cpu.force(path):
        for column, count in ((a.total, 3), (-1, 3)):
            with pytest.raises((ValueError, IndexError, RuntimeError)):
                a.delta((o_cache, columns.fill_(column), counts.fill_(count)), a.query, a.key, a.value)


@pytest.fixture
def fresh_build(monkeypatch, tmp_path):
    """An empty cache folder, and no library loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native_build, "_libraries", {})
    return tmp_path / "chipmunk_compile" / "native"


@needs_native
def test_a_library_is_built_once_and_found_again(fresh_build, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "chipmunk_compile")
    assert cpu.prepare("silu(h0)") == "native"
    (library,) = fresh_build.glob("*.so")
    assert library.with_suffix(".cpp").read_text().count("fast::region") > 0
    assert [r.levelname for r in caplog.records] == ["INFO", "INFO"] and len(list(fresh_build.iterdir())) == 2
    monkeypatch.setattr(native_build, "_libraries", {})
    monkeypatch.setattr(native_build, "_run", lambda command: pytest.fail("compiled again"))
    assert cpu.prepare("silu(h0)") == "native"


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_working_compiler_torch_does_the_work(fresh_build, monkeypatch, caplog, compiler):
    monkeypatch.setenv("CXX", compiler)
    assert cpu.prepare("gelu_tanh(h0)") == "blocked"
    assert cpu.prepare() == "blocked"
    mlp = Mlp()
    mlp.check(torch.randn_like(mlp.x))
    Attention().check()
    assert [r.levelname for r in caplog.records] == ["WARNING"] * 2, "once for each library"


@needs_native
def test_the_library_shares_torch_s_openmp_and_keeps_denormals(fresh_build):
    """A second OpenMP runtime would fight over the cores; flush-to-zero would reach the whole process."""
    assert native_build.library(None)
    mapped = pathlib.Path("/proc/self/maps").read_text().splitlines()
    assert len({line.split()[-1] for line in mapped if "libgomp" in line or "libomp" in line}) <= 1
    assert (torch.tensor([1e-39]) * 1.0).item() > 0
