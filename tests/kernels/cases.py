"""Random inputs of the sparse ops, and the checks of one op on them against tests/kernels/formulas.py."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch

from chipmunk_compile.kernels import cpu, ops, reference  # noqa: F401  (ops defines torch.ops.chipmunk)
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
