"""Random graphs: whatever is planned is exact, whatever the analysis believes about tokens."""

import functools
import math
import operator
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx

from chipmunk_compile.passes import permute_tokens as module
from chipmunk_compile.passes.permute_tokens import index_inputs, permute_tokens, plan_permutation
from chipmunk_compile.passes.reasons import Reason
from chipmunk_compile.passes.sites import Declined
from tests.token_graphs import attention_sites, difference, in_double

aten = torch.ops.aten
BATCH, TOKENS, TEXT, DIM = 2, 12, 5, 4
GRID = (1, 3, 4)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Graphs of a hundred numbers: threads would do nothing but wait for each other, for half of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Tape:
    """Builds a graph op by op: `tape.linear(x, w)` runs `aten.linear` on the values and adds the node.

    Thirty times as quick as tracing, so that thousands of graphs take minutes.
    """

    def __init__(self) -> None:
        self.graph = fx.Graph()

    def input(self, value: torch.Tensor) -> fx.Node:
        node = self.graph.placeholder(f"x{len(self.graph.nodes)}")
        node.meta["val"] = value
        return node

    def __getattr__(self, name: str):
        def call(*args, **kwargs):
            values = fx.map_arg((args, kwargs), lambda node: node.meta["val"])
            target = getattr(
                getattr(aten, name), torch._C._jit_resolve_packet(f"aten::{name}", *values[0], **values[1])
            )
            value = target(*values[0], **values[1])
            node = self.graph.call_function(target, args, kwargs)
            node.meta["val"] = value
            if isinstance(value, torch.Tensor):
                return node
            parts = [self.graph.call_function(operator.getitem, (node, k)) for k in range(len(value))]
            for part, tensor in zip(parts, value):
                part.meta["val"] = tensor
            return parts

        return call

    def attempt(self, step: Callable[[], fx.Node | None]) -> fx.Node | None:
        """What `step` makes; None, and nothing left behind, where it does not fit."""
        before = len(self.graph.nodes)
        try:
            made = step()
            if made is not None and 0 < shape(made).numel() < 4096:
                return made
        except (RuntimeError, ValueError, IndexError):
            pass
        for node in list(self.graph.nodes)[before:][::-1]:
            self.graph.erase_node(node)
        return None


def shape(x: fx.Node) -> torch.Size:
    return x.meta["val"].shape


def _is_sequence(x):
    return len(shape(x)) == 3 and shape(x)[-1] == DIM and shape(x)[1] > 1


def _attend(t, q, k, v, **kwargs):
    out = t.scaled_dot_product_attention(t.unsqueeze(q, 1), t.unsqueeze(k, 1), t.unsqueeze(v, 1), **kwargs)
    return t.select(out, 1, 0)


def _causal_attention(t, x, w):
    return t.add(x, _attend(t, x, x, x, is_causal=True))


def _project(t, x, w, k):
    return t.linear(x, t.select(w, 0, k % 3))


def _self_attention(t, x, w):
    return t.add(x, _attend(t, *(_project(t, x, w, k) for k in range(3))))


def _masked(t, x, y):
    mask = t.clamp(t.unsqueeze(t.unsqueeze(t.select(y, 2, 0), 1), 1), -2.0, 2.0)
    return _attend(t, x, y, y, attn_mask=mask)


def _scores(t, x, y, w):
    return t.matmul(t.softmax(t.matmul(x, t.transpose(_project(t, y, w, 0), 1, 2)), -1), y)


def _conv(t, x, w, *args):
    return t.transpose(t.conv1d(t.transpose(x, 1, 2), w, *args), 1, 2)


def _halves(t, x):
    return t.cat([t.mul(half, 1.0 + j) for j, half in enumerate(t.chunk(x, 2, 1))], 1)


def _shift(t, x):
    return t.constant_pad_nd(t.add(t.slice(x, 1, 1), t.slice(x, 1, 0, -1)), [0, 0, 0, 1])


# Steps take a tape t, values x and y, weights w [3, DIM, DIM] and a number k. What does not fit is left out.
ON_SEQUENCES = {
    "attention": lambda t, x, y, w, k: _self_attention(t, x, w),
    "cross attention": lambda t, x, y, w, k: _attend(t, _project(t, x, w, 0), y, y),
    "masked attention": lambda t, x, y, w, k: _masked(t, x, y),
    "scores": lambda t, x, y, w, k: _scores(t, x, y, w),
    "outer": lambda t, x, y, w, k: t.einsum("bnc,bmc->bnm", [x, y]),
    "pooled": lambda t, x, y, w, k: t.add(x, t.mean(y, [1], True)),
    "largest": lambda t, x, y, w, k: t.add(x, t.amax(y, [1], True)),
    "norm": lambda t, x, y, w, k: t.layer_norm(x, [DIM]),
    "heads": lambda t, x, y, w, k: t.transpose(t.unflatten(x, -1, [2, 2]), 1, 2),
    "cat": lambda t, x, y, w, k: t.cat([x, y], 1),
    "over text": lambda t, x, y, w, k: t.slice_scatter(x, y, 1, 0, shape(y)[1]),
    "in place": lambda t, x, y, w, k: t.slice_scatter(x, t.neg(t.slice(x, 2, 0, 2)), 2, 0, 2),
    "pad": lambda t, x, y, w, k: t.pad(x, [0, 0, k % 3, 0]),
    "pointwise conv": lambda t, x, y, w, k: _conv(t, x, t.unsqueeze(t.select(w, 0, k % 3), -1)),
    "halves": lambda t, x, y, w, k: _halves(t, x),
    # rigid along tokens
    "causal attention": lambda t, x, y, w, k: _causal_attention(t, x, w),
    "positions": lambda t, x, y, w, k: t.add(x, t.unsqueeze(t.arange(shape(x)[1], dtype=torch.float64), 1)),
    "index": lambda t, x, y, w, k: t.index(x, [None, t.arange(shape(x)[1] - 1, -1, -1)]),
    "cumsum": lambda t, x, y, w, k: t.cumsum(x, 1),
    "flip": lambda t, x, y, w, k: t.flip(x, [1]),
    "roll": lambda t, x, y, w, k: t.roll(x, [1], [1]),
    "shift": lambda t, x, y, w, k: _shift(t, x),
    "conv": lambda t, x, y, w, k: _conv(t, x, t.permute(w, [1, 2, 0]), None, [1], [1]),
    "fold": lambda t, x, y, w, k: t.mean(t.unflatten(x, 1, [3, 4]), [1]),
    "window": lambda t, x, y, w, k: t.flatten(t.flip(t.unflatten(x, 1, [3, 4]), [2]), 1, 2),
    "half and half": lambda t, x, y, w, k: t.add(*t.chunk(x, 2, 1)),
}
ON_ANYTHING = {
    "linear": lambda t, x, y, w, k: _project(t, x, w, k),
    "gelu": lambda t, x, y, w, k: t.gelu(x),
    "scale": lambda t, x, y, w, k: t.add(t.mul(x, 0.5), 1.0),
    "add": lambda t, x, y, w, k: t.add(x, y),
    "gate": lambda t, x, y, w, k: t.mul(x, t.slice(y, -1, 0, 1)),
    "where": lambda t, x, y, w, k: t.where(t.gt(y, 0.0), x, t.zeros_like(x)),
    "softmax": lambda t, x, y, w, k: t.softmax(x, k % len(shape(x))),
    "transpose": lambda t, x, y, w, k: t.transpose(x, k % len(shape(x)), -1),
    "flatten": lambda t, x, y, w, k: t.flatten(x, 0, 1),
    "batch": lambda t, x, y, w, k: t.unflatten(x, 0, [BATCH, -1]),
    "tail": lambda t, x, y, w, k: t.slice(x, 1, TEXT),
    "head": lambda t, x, y, w, k: t.slice(x, 1, 0, TOKENS),
    "split": lambda t, x, y, w, k: t.split_with_sizes(x, [TEXT, shape(x)[1] - TEXT], 1)[k % 2],
    "stack": lambda t, x, y, w, k: t.stack([x, y], k % 3),
    "unbind": lambda t, x, y, w, k: t.unbind(x, k % len(shape(x)))[0],
    "fill": lambda t, x, y, w, k: t.add(x, t.mul(t.cumsum(t.ones_like(x), 0), t.sum(t.zeros_like(y)))),
    "repeat": lambda t, x, y, w, k: t.slice(t.repeat(x, [1] * (len(shape(x)) - 1) + [2]), -1, DIM),
    "interleave": lambda t, x, y, w, k: t.slice(t.repeat_interleave(x, 2, -1), -1, 0, 2**62, 2),
}
NO_ATTENTION = [n for n in (*ON_SEQUENCES, *ON_ANYTHING) if "attention" not in n]
NAMES = [*ON_SEQUENCES, *ON_ANYTHING]
RECIPES = st.lists(
    st.tuples(st.sampled_from(NAMES), st.integers(0, 9), st.integers(0, 9), st.integers(0, 5)),
    min_size=2,
    max_size=12,
)


def graph_of(recipe, attention=_self_attention):
    """The graph of what fits in a recipe, begun and ended by an attention, and its inputs in double precision."""
    generator = torch.Generator().manual_seed(0)
    shapes = (BATCH, TOKENS, DIM), (BATCH, TEXT, DIM), (TOKENS, DIM), (3, DIM, DIM)
    inputs = [torch.randn(size, generator=generator, dtype=torch.float64) for size in shapes]
    tape = Tape()
    tokens, text, table, w = map(tape.input, inputs)
    pool = [tokens, text, attention(tape, tape.add(tokens, table), w)]
    for name, i, j, k in recipe:
        x, y = pool[-1 - i % len(pool)], pool[-1 - j % len(pool)]
        if name in ON_SEQUENCES and not (_is_sequence(x) and _is_sequence(y)):
            continue
        build = ON_SEQUENCES.get(name) or ON_ANYTHING[name]
        made = tape.attempt(functools.partial(build, tape, x, y, w, k))
        if made is not None:
            pool.append(made)
    last = next(x for x in reversed(pool) if _is_sequence(x))
    tape.graph.output([attention(tape, last, w), *pool[2:]])
    return fx.GraphModule({}, tape.graph), inputs


def check(recipe, seed=0) -> bool:
    """Whether the graph was permuted; fails if it then differs."""
    gm, inputs = graph_of(recipe)
    plan = plan_permutation(gm, attention_sites(gm), grid=GRID, share=math.inf)
    if isinstance(plan, Declined):
        return False
    plain = values(gm)
    permute_tokens(gm, plan)
    generator = torch.Generator().manual_seed(seed)
    indices = index_inputs(plan, [torch.randperm(run.length, generator=generator) for run in plan.runs])
    assert difference(in_double(gm, *inputs, *indices), plain) < 1e-11
    return True


def values(gm: fx.GraphModule) -> list[torch.Tensor]:
    """What the graph returned when it was taped."""
    output = next(iter(reversed(gm.graph.nodes)))
    return [node.meta["val"] for node in output.args[0]]


def some_settings(count):
    unhurried = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, deadline=None, suppress_health_check=unhurried, database=None)


@some_settings(1000)
@given(RECIPES, st.integers(0, 99))
def test_any_graph_that_is_permuted_is_the_same(recipe, seed):
    check(recipe, seed)


@pytest.mark.slow
@some_settings(5000)
@given(RECIPES, st.integers(0, 99))
def test_thousands_of_graphs(recipe, seed):
    check(recipe, seed)


def test_nearly_all_random_graphs_are_permuted():
    rng = random.Random(0)
    recipes = [[(rng.choice(NAMES), *(rng.randrange(10) for _ in "ijk")) for _ in range(8)] for _ in range(40)]
    assert sum(map(check, recipes)) >= 38


@pytest.mark.parametrize("name", NAMES)
def test_every_step_fits_somewhere(name):
    before = graph_of([("cat", 0, 1, 0)])[0]
    longer = (graph_of([("cat", 0, 1, 0), (name, i, j, 0)])[0] for i in range(4) for j in range(4))
    assert any(len(gm.graph.nodes) > len(before.graph.nodes) for gm in longer)


@some_settings(60)
@given(st.lists(st.tuples(st.sampled_from(NO_ATTENTION), *[st.integers(0, 9)] * 3), max_size=12), st.booleans())
def test_graphs_with_nothing_to_permute_are_refused(recipe, causal):
    """All self-attention is causal, or there is none."""
    gm, _ = graph_of(recipe, _causal_attention if causal else lambda t, x, w: _project(t, x, w, 0))
    plan = plan_permutation(gm, attention_sites(gm), grid=GRID, share=math.inf)
    assert plan.reason in ((Reason.WALLED_IN, Reason.GRID_MISMATCH) if causal else (Reason.NO_SITES,))


def test_what_is_read_of_an_op_must_be_what_it_holds(monkeypatch):
    """The first part of an unbind is believed to hold no tokens: nothing would put them back in order behind it."""
    gm, inputs = graph_of([("attention", 0, 0, 0), ("softmax", 0, 0, 0), ("unbind", 0, 0, 0)])
    true = module.occurrences

    def lies(axes, pattern):
        return {
            value: places for value, places in true(axes, pattern).items() if value[0].target is not operator.getitem
        }

    assert any(node.target is operator.getitem for node in gm.graph.nodes)
    plain = values(gm)
    monkeypatch.setattr(module, "occurrences", lies)
    plan = plan_permutation(gm, attention_sites(gm), grid=GRID, share=math.inf)
    assert any("what is read of it" in wall.why for wall in plan.walls)
    permute_tokens(gm, plan)
    indices = index_inputs(plan, [torch.randperm(run.length) for run in plan.runs])
    assert difference(in_double(gm, *inputs, *indices), plain) < 1e-11


@some_settings(200)
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

    plain = values(gm)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "occurrences", lies)
        patch.setattr(module, "runs_of_option", lambda *args: runs(*args)[:1])
        plan = plan_permutation(gm, attention_sites(gm), grid=GRID, share=math.inf)
    if not isinstance(plan, Declined):
        permute_tokens(gm, plan)
        indices = index_inputs(plan, [torch.randperm(run.length) for run in plan.runs])
        assert difference(in_double(gm, *inputs, *indices), plain) < 1e-11
