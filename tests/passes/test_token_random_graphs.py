"""Random graphs: whatever is planned is exact, whatever the analysis believes about tokens."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chipmunk_compile.passes import permute_tokens as module
from chipmunk_compile.passes.permute_tokens import index_inputs, permute_tokens, plan_permutation
from chipmunk_compile.passes.sites import Declined
from tests.token_graphs import attention_sites, difference, in_double, traced

BATCH, TOKENS, TEXT, DIM = 2, 12, 5, 4
GRID = (1, 3, 4)


def _is_sequence(x):
    return x.ndim == 3 and x.shape[-1] == DIM and x.shape[1] > 1


def _attend(q, k, v, **kwargs):
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], **kwargs)[:, 0]


def _self_attention(x, w):
    return x + _attend(F.linear(x, w[0]), F.linear(x, w[1]), F.linear(x, w[2]))


# Steps take values x and y, weights w [3, DIM, DIM] and a number k. What does not fit is left out of a graph.
ON_SEQUENCES = {
    "attention": lambda x, y, w, k: _self_attention(x, w),
    "cross attention": lambda x, y, w, k: _attend(F.linear(x, w[0]), y, y),
    "masked attention": lambda x, y, w, k: _attend(x, y, y, attn_mask=y[:, None, None, :, 0].clamp(-2, 2)),
    "scores": lambda x, y, w, k: (x @ F.linear(y, w[0]).transpose(1, 2)).softmax(-1) @ y,
    "outer": lambda x, y, w, k: torch.einsum("bnc,bmc->bnm", x, y),
    "pooled": lambda x, y, w, k: x + y.mean(1, keepdim=True),
    "largest": lambda x, y, w, k: x + y.amax(1, keepdim=True),
    "norm": lambda x, y, w, k: F.layer_norm(x, [DIM]),
    "heads": lambda x, y, w, k: x.unflatten(-1, (2, 2)).transpose(1, 2),
    "cat": lambda x, y, w, k: torch.cat([x, y], 1),
    "over text": lambda x, y, w, k: torch.slice_scatter(x, y, 1, 0, y.shape[1]),
    "in place": lambda x, y, w, k: torch.slice_scatter(x, -x[..., :2], -1, 0, 2),
    "pad": lambda x, y, w, k: F.pad(x, (0, 0, k % 3, 0)),
    "pointwise conv": lambda x, y, w, k: F.conv1d(x.transpose(1, 2), w[k % 3][..., None]).transpose(1, 2),
    "halves": lambda x, y, w, k: torch.cat([half * (1 + j) for j, half in enumerate(x.chunk(2, 1))], 1),
    # rigid along tokens
    "causal attention": lambda x, y, w, k: x + _attend(x, x, x, is_causal=True),
    "positions": lambda x, y, w, k: x + torch.arange(x.shape[1], dtype=x.dtype)[:, None],
    "index": lambda x, y, w, k: x[:, torch.arange(x.shape[1] - 1, -1, -1)],
    "cumsum": lambda x, y, w, k: x.cumsum(1),
    "flip": lambda x, y, w, k: x.flip(1),
    "roll": lambda x, y, w, k: x.roll(1, 1),
    "shift": lambda x, y, w, k: F.pad(x[:, 1:] + x[:, :-1], (0, 0, 0, 1)),
    "conv": lambda x, y, w, k: F.conv1d(x.transpose(1, 2), w.permute(1, 2, 0), padding=1).transpose(1, 2),
    "fold": lambda x, y, w, k: x.unflatten(1, (3, 4)).mean(1),
    "window": lambda x, y, w, k: x.unflatten(1, (3, 4)).flip(2).flatten(1, 2),
    "half and half": lambda x, y, w, k: sum(x.chunk(2, 1)),
}
ON_ANYTHING = {
    "linear": lambda x, y, w, k: F.linear(x, w[k % 3]),
    "gelu": lambda x, y, w, k: F.gelu(x),
    "scale": lambda x, y, w, k: x * 0.5 + 1,
    "add": lambda x, y, w, k: x + y,
    "gate": lambda x, y, w, k: x * y[..., :1],
    "where": lambda x, y, w, k: torch.where(y > 0, x, 0.0),
    "softmax": lambda x, y, w, k: x.softmax(k % x.ndim),
    "transpose": lambda x, y, w, k: x.transpose(k % x.ndim, -1),
    "flatten": lambda x, y, w, k: x.flatten(0, 1),
    "batch": lambda x, y, w, k: x.unflatten(0, (BATCH, -1)),
    "tail": lambda x, y, w, k: x[:, TEXT:],
    "head": lambda x, y, w, k: x[:, :TOKENS],
    "split": lambda x, y, w, k: x.split([TEXT, x.shape[1] - TEXT], 1)[k % 2],
    "stack": lambda x, y, w, k: torch.stack([x, y], k % 3),
    "unbind": lambda x, y, w, k: x.unbind(k % x.ndim)[0],
    "fill": lambda x, y, w, k: x + torch.ones_like(x).cumsum(0) * torch.zeros_like(y).sum(),
    "repeat": lambda x, y, w, k: x.repeat(*[1] * (x.ndim - 1), 2)[..., DIM:],
    "interleave": lambda x, y, w, k: x.repeat_interleave(2, -1)[..., ::2],
}
NAMES = [*ON_SEQUENCES, *ON_ANYTHING]
RECIPES = st.lists(
    st.tuples(st.sampled_from(NAMES), st.integers(0, 9), st.integers(0, 9), st.integers(0, 5)),
    min_size=2,
    max_size=12,
)


def graph_of(recipe):
    """The traced graph of what fits in a recipe, ended by an attention, and its inputs in double precision."""
    generator = torch.Generator().manual_seed(0)
    shapes = (BATCH, TOKENS, DIM), (BATCH, TEXT, DIM), (TOKENS, DIM), (3, DIM, DIM)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    fitting = []
    pool, w = _start(*inputs), inputs[-1]
    for step in recipe:  # once without tracing: what fails while it is traced leaves nodes behind
        try:
            made = _made(step, pool, w)
        except (RuntimeError, ValueError, IndexError):
            continue
        if made is not None and 0 < made.numel() < 4096:
            pool.append(made)
            fitting.append(step)

    def function(tokens, text, table, w):
        pool = _start(tokens, text, table, w)
        for step in fitting:
            pool.append(_made(step, pool, w))
        last = next(x for x in reversed(pool) if _is_sequence(x))
        return [_self_attention(last, w), *pool[2:]]

    return traced(function, *inputs), inputs


def _start(tokens, text, table, w):
    return [tokens, text, _self_attention(tokens + table, w)]


def _made(step, pool, w):
    name, i, j, k = step
    x, y = pool[-1 - i % len(pool)], pool[-1 - j % len(pool)]
    if name in ON_ANYTHING:
        return ON_ANYTHING[name](x, y, w, k)
    return ON_SEQUENCES[name](x, y, w, k) if _is_sequence(x) and _is_sequence(y) else None


def check(recipe, seed=0) -> bool:
    """Whether the graph was permuted; fails if it then differs."""
    gm, inputs = graph_of(recipe)
    plan = plan_permutation(gm, attention_sites(gm), grid=GRID, share=math.inf)
    if isinstance(plan, Declined):
        return False
    plain = in_double(gm, *inputs)
    permute_tokens(gm, plan)
    generator = torch.Generator().manual_seed(seed)
    indices = index_inputs(plan, [torch.randperm(run.length, generator=generator) for run in plan.runs])
    assert difference(in_double(gm, *inputs, *indices), plain) < 1e-11
    return True


def some_settings(count):
    unhurried = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, deadline=None, suppress_health_check=unhurried, database=None)


@some_settings(60)
@given(RECIPES, st.integers(0, 99))
def test_any_graph_that_is_permuted_is_the_same(recipe, seed):
    check(recipe, seed)


@pytest.mark.slow
@some_settings(2000)
@given(RECIPES, st.integers(0, 99))
def test_thousands_of_graphs(recipe, seed):
    check(recipe, seed)


def test_most_random_graphs_are_permuted():
    rng = random.Random(0)
    recipes = [[(rng.choice(NAMES), *(rng.randrange(10) for _ in "ijk")) for _ in range(8)] for _ in range(40)]
    assert sum(map(check, recipes)) >= 30


@some_settings(40)
@given(RECIPES, st.randoms(use_true_random=False))
def test_the_proof_holds_whatever_the_analysis_believes(recipe, rng):
    """Occurrences are thrown away and invented at random: walls grow, results stay."""
    gm, inputs = graph_of(recipe)
    true, runs = module.occurrences, module.runs_of_option

    def lies(axes, pattern):
        held = {}
        for value, places in true(axes, pattern).items():
            kept = {place for place in places if rng.random() > 0.05}
            held[value] = frozenset(kept)
        length = sum(piece.length for piece in pattern)
        for value, ropes in axes.ropes.items():
            for dim, rope in enumerate(ropes):
                size = sum(piece.length for piece in rope)
                if size >= length and rng.random() < 0.02 and not held.get(value):
                    held[value] = frozenset({(dim, rng.randrange(size - length + 1))})
        return {value: places for value, places in held.items() if places}

    plain = in_double(gm, *inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "occurrences", lies)
        patch.setattr(module, "runs_of_option", lambda *args: runs(*args)[:1])
        plan = plan_permutation(gm, attention_sites(gm), grid=GRID, share=math.inf)
    if not isinstance(plan, Declined):
        permute_tokens(gm, plan)
        indices = index_inputs(plan, [torch.randperm(run.length) for run in plan.runs])
        assert difference(in_double(gm, *inputs, *indices), plain) < 1e-11
