"""Random graphs: whatever is planned is exact, and whatever is claimed about tokens does not matter to that."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.token_graphs import attention_sites, difference, in_double, traced

from chipmunk_compile.passes import permute_tokens as module
from chipmunk_compile.passes.permute_tokens import index_inputs, permute_tokens, plan_permutation
from chipmunk_compile.passes.sites import Declined

BATCH, TOKENS, TEXT, DIM = 2, 12, 5, 4
GRID = (1, 3, 4)


def _features(x):
    return x.ndim >= 2 and x.shape[-1] == DIM


def _joint(x):
    return x.ndim == 3 and _features(x) and x.shape[1] > 1


def _attend(q, k, v, **kwargs):
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], **kwargs)[:, 0]


def _self_attention(x, w):
    return x + _attend(F.linear(x, w[0]), F.linear(x, w[1]), F.linear(x, w[2]))


# Each takes values x and y of the graph, weights w [3, DIM, DIM], and a number k; None where it does not apply.
STEPS = {
    "attention": lambda x, y, w, k: _self_attention(x, w) if _joint(x) else None,
    "cross attention": lambda x, y, w, k: _attend(F.linear(x, w[0]), y, y)
    if _joint(x) and _joint(y) and len(x) == len(y)
    else None,
    "causal attention": lambda x, y, w, k: x + _attend(x, x, x, is_causal=True) if _joint(x) else None,
    "masked attention": lambda x, y, w, k: _attend(x, x, x, attn_mask=y[:, None, None, :, 0].clamp(-2, 2))
    if _joint(x) and x.shape == y.shape
    else None,
    "scores": lambda x, y, w, k: (x @ F.linear(y, w[0]).transpose(1, 2)).softmax(-1) @ y
    if _joint(x) and _joint(y) and len(x) == len(y)
    else None,
    "linear": lambda x, y, w, k: F.linear(x, w[k % 3]) if _features(x) else None,
    "gelu": lambda x, y, w, k: F.gelu(x),
    "scale": lambda x, y, w, k: x * 0.5 + 1,
    "add": lambda x, y, w, k: x + y if x.shape == y.shape else None,
    "broadcast": lambda x, y, w, k: x * y[..., :1] if x.shape[:-1] == y.shape[:-1] else None,
    "batch scale": lambda x, y, w, k: x + y.mean(1, keepdim=True) if _joint(x) and _joint(y) and len(x) == len(y) else None,
    "norm": lambda x, y, w, k: F.layer_norm(x, [DIM]) if _features(x) else None,
    "softmax": lambda x, y, w, k: x.softmax(k % x.ndim),
    "transpose": lambda x, y, w, k: x.transpose(k % x.ndim, -1),
    "flatten": lambda x, y, w, k: x.flatten(0, 1) if x.ndim > 2 else None,
    "batch": lambda x, y, w, k: x.unflatten(0, (BATCH, -1)) if x.ndim < 4 and len(x) % BATCH == 0 and len(x) > BATCH else None,
    "heads": lambda x, y, w, k: x.unflatten(-1, (2, 2)).transpose(1, 2) if _joint(x) else None,
    "cat": lambda x, y, w, k: torch.cat([x, y], 1)
    if x.ndim == y.ndim == 3 and x.shape[0] == y.shape[0] and x.shape[2] == y.shape[2] and x.shape[1] + y.shape[1] < 40
    else None,
    "tail": lambda x, y, w, k: x[:, TEXT:] if x.ndim > 1 and x.shape[1] > TEXT else None,
    "head": lambda x, y, w, k: x[:, :TOKENS] if x.ndim > 1 and x.shape[1] > TOKENS else None,
    "split": lambda x, y, w, k: x.split([TEXT, x.shape[1] - TEXT], 1)[k % 2] if x.ndim == 3 and x.shape[1] > TEXT else None,
    "halves": lambda x, y, w, k: torch.cat([half * (1 + j) for j, half in enumerate(x.chunk(2, 1))], 1) if _joint(x) else None,
    "stack": lambda x, y, w, k: torch.stack([x, y], k % 3) if x.shape == y.shape and x.ndim == 3 else None,
    "unbind": lambda x, y, w, k: x.unbind(k % x.ndim)[0] if x.ndim == 4 else None,
    "fill": lambda x, y, w, k: x + torch.ones_like(x).cumsum(0) * torch.zeros_like(y).sum() if x.ndim > 1 else None,
    "repeat": lambda x, y, w, k: x.repeat(*[1] * (x.ndim - 1), 2)[..., DIM:] if _features(x) else None,
    "interleave": lambda x, y, w, k: x.repeat_interleave(2, -1)[..., ::2],
    "pad": lambda x, y, w, k: F.pad(x, (0, 0, k % 3, 0)) if _joint(x) and x.shape[1] < 30 else None,
    "outer": lambda x, y, w, k: torch.einsum("bnc,bmc->bnm", x, y) if _joint(x) and _joint(y) and len(x) == len(y) else None,
    "pool": lambda x, y, w, k: x + x.amax(1, keepdim=True) if _joint(x) else None,
    "positions": lambda x, y, w, k: x + torch.arange(x.shape[1], dtype=x.dtype)[:, None] if _joint(x) else None,
    "in place": lambda x, y, w, k: torch.slice_scatter(x, -x[..., :2], -1, 0, 2) if _features(x) else None,
    "over text": lambda x, y, w, k: torch.slice_scatter(x, y, 1, 0, y.shape[1])
    if _joint(x) and _joint(y) and len(x) == len(y) and y.shape[1] <= x.shape[1]
    else None,
    "pointwise conv": lambda x, y, w, k: F.conv1d(x.transpose(1, 2), w[k % 3][..., None]).transpose(1, 2) if _joint(x) else None,
    "where": lambda x, y, w, k: torch.where(y > 0, x, 0.0) if x.shape == y.shape else None,
    "index": lambda x, y, w, k: x[:, torch.arange(x.shape[1] - 1, -1, -1)] if _joint(x) else None,
    # rigid along tokens
    "cumsum": lambda x, y, w, k: x.cumsum(1) if _joint(x) else None,
    "flip": lambda x, y, w, k: x.flip(1) if _joint(x) else None,
    "roll": lambda x, y, w, k: x.roll(1, 1) if _joint(x) else None,
    "shift": lambda x, y, w, k: F.pad(x[:, 1:] + x[:, :-1], (0, 0, 0, 1)) if _joint(x) else None,
    "conv": lambda x, y, w, k: F.conv1d(x.transpose(1, 2), w[:, :, :].permute(1, 2, 0), padding=1).transpose(1, 2)
    if _joint(x)
    else None,
    "fold": lambda x, y, w, k: x.unflatten(1, (3, 4)).mean(1) if _joint(x) and x.shape[1] == TOKENS else None,
    "window": lambda x, y, w, k: x.unflatten(1, (3, 4)).flip(2).flatten(1, 2) if _joint(x) and x.shape[1] == TOKENS else None,
    "halve and add": lambda x, y, w, k: sum(x.chunk(2, 1)) if _joint(x) and x.shape[1] % 2 == 0 else None,
}
NAMES = list(STEPS)
RECIPES = st.lists(
    st.tuples(st.sampled_from(NAMES), st.integers(0, 9), st.integers(0, 9), st.integers(0, 5)), min_size=2, max_size=12
)


def graph_of(recipe):
    """The traced graph of a recipe, ended by an attention, and its inputs in double precision."""
    generator = torch.Generator().manual_seed(0)
    shapes = (BATCH, TOKENS, DIM), (BATCH, TEXT, DIM), (TOKENS, DIM), (3, DIM, DIM)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]

    def function(tokens, text, table, w):
        pool = [tokens, text, _self_attention(tokens + table, w)]
        for name, i, j, k in recipe:
            made = STEPS[name](pool[-1 - i % len(pool)], pool[-1 - j % len(pool)], w, k)
            if made is not None and made.numel() < 4096:
                pool.append(made)
        last = next(x for x in reversed(pool) if _joint(x))
        return [_self_attention(last, w), *pool[2:]]

    return traced(function, *inputs), inputs


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


@some_settings(150)
@given(RECIPES, st.integers(0, 99))
def test_any_graph_that_is_permuted_is_the_same(recipe, seed):
    check(recipe, seed)


@pytest.mark.slow
@some_settings(5000)
@given(RECIPES, st.integers(0, 99))
def test_thousands_of_graphs(recipe, seed):
    check(recipe, seed)


def test_most_random_graphs_are_permuted():
    rng = random.Random(0)
    recipes = [[(rng.choice(NAMES), *(rng.randrange(10) for _ in "ijk")) for _ in range(8)] for _ in range(40)]
    assert sum(map(check, recipes)) >= 30


@some_settings(100)
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
