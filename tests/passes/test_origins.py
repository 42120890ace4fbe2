"""Labels of axes: exact over views, permutations, slices and concatenations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import fx

from chipmunk_compile.passes import origins as o
from chipmunk_compile.passes.nodes import aten, emit
from chipmunk_compile.passes.origin_labels import Origins
from tests.raised_attention import Call, check_constancy
from tests.record import record

# --- positions, on random programs of shape operations ----------------------------------------------------------


def offsets(label: o.Label, strides: dict[tuple, int]) -> torch.Tensor:
    """What each position of an axis adds to the flat index into the input, if the label says the truth."""
    parts = []
    for segment in label:
        (entry,) = segment.entries  # one input, so one track
        track = torch.zeros(1, dtype=torch.long)
        for axis in entry.track:
            track = (track[:, None] + _of_axis(axis, strides)).flatten()
        parts.append(track[entry.start : entry.start + segment.size])
    return torch.cat(parts)


def _of_axis(axis: o.Axis, strides: dict[tuple, int]) -> torch.Tensor:
    if axis.kind == "bundle":
        return offsets(axis.key[0], strides)
    if axis.kind in ("outer", "inner"):
        parent, inner = axis.key
        whole = _of_axis(parent, strides).view(-1, inner)
        return whole[:, 0] if axis.kind == "outer" else whole[0] - whole[0, 0]
    if axis.kind == "constant":
        return torch.zeros(axis.size, dtype=torch.long)
    assert axis.kind == "node"
    return torch.arange(axis.size) * strides[axis.key]


def divisions(size: int, draw) -> list[int]:
    """A random factorisation."""
    factors = []
    while size > 1 and draw(st.booleans()):
        factor = draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0]))
        factors.append(factor)
        size //= factor
    return [*factors, size]


def step(graph: fx.Graph, node: fx.Node, draw) -> fx.Node:
    size = tuple(node.meta["val"].shape)
    kind = draw(st.sampled_from(["merge", "split", "permute", "slice", "swap halves", "unsqueeze", "clone"]))
    dim = draw(st.integers(0, len(size) - 1))
    if kind == "merge" and dim:
        return emit(
            graph,
            aten.view.default,
            emit(graph, aten.contiguous.default, node),
            [*size[: dim - 1], -1, *size[dim + 1 :]],
        )
    if kind == "split" and len(size) < 6:
        contiguous = emit(graph, aten.contiguous.default, node)
        return emit(graph, aten.view.default, contiguous, [*size[:dim], *divisions(size[dim], draw), *size[dim + 1 :]])
    if kind == "permute":
        return emit(graph, aten.permute.default, node, draw(st.permutations(range(len(size)))))
    if kind == "slice":
        # Two positions at least: of an axis of one position no label remains.
        start = draw(st.integers(0, max(0, size[dim] - 2)))
        return emit(graph, aten.slice.Tensor, node, dim, start, draw(st.integers(min(start + 2, size[dim]), size[dim])))
    if kind == "swap halves" and size[dim] > 1:
        at = draw(st.integers(1, size[dim] - 1))
        halves = [emit(graph, aten.slice.Tensor, node, dim, a, b) for a, b in ((at, size[dim]), (0, at))]
        return emit(graph, aten.cat.default, halves, dim)
    if kind == "unsqueeze":
        return emit(graph, aten.unsqueeze.default, node, dim)
    return emit(graph, aten.clone.default, node)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_labels_say_where_every_element_comes_from(data):
    size = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 8]), min_size=1, max_size=4))
    value = torch.arange(math.prod(size)).view(size)
    graph = fx.Graph()
    root = node = graph.placeholder("x")
    node.meta["val"] = value
    for _ in range(data.draw(st.integers(1, 8))):
        node = step(graph, node, data.draw)
    labels = Origins().of(node)
    assert [o.size_of(label) for label in labels] == list(node.meta["val"].shape)
    # No sum of offsets: sizes that do not divide, one position left of an axis, a part of several segments.
    assume(not _opaque(tuple(labels)))
    strides = {(root, d): value.stride(d) for d in range(value.dim())}
    expected = torch.zeros((), dtype=torch.long)
    for label in labels:
        expected = expected[..., None] + offsets(label, strides)
    assert torch.equal(expected, node.meta["val"])


def _opaque(part) -> bool:
    if isinstance(part, o.Axis):
        cut_bundle = part.kind in ("outer", "inner") and "bundle" in _kinds(part)
        return part.kind in ("view", "at") or cut_bundle or _opaque(part.key)
    return isinstance(part, (tuple, frozenset)) and any(_opaque(p) for p in part)


def _kinds(axis: o.Axis) -> set[str]:
    return {axis.kind} | (_kinds(axis.key[0]) if axis.kind in ("outer", "inner") else set())


# --- the algebra ------------------------------------------------------------------------------------------------


def axis(name, size):
    return o.root("node", (name, 0), size)


def test_merge_and_split_cancel():
    t, h, w = axis("t", 3), axis("h", 4), axis("w", 6)
    (tokens,) = o.regroup([t, h, w], [3, 4, 6], [72])
    assert o.size_of(tokens) == 72 and o.regroup([tokens], [72], [3, 4, 6]) == [t, h, w]
    parts = o.regroup([tokens], [72], [6, 2, 2, 3])
    assert o.regroup(parts, [6, 2, 2, 3], [3, 4, 6]) == [t, h, w]
    assert o.regroup([tokens], [72], [1, 72, 1])[1] == tokens


def test_segments_survive_a_flat_batch():
    both, batch = o.concatenate([axis("text", 7), axis("image", 45)]), axis("batch", 3)
    (flat,) = o.regroup([batch, both], [3, 52], [156])
    assert o.regroup([flat], [156], [3, 52]) == [batch, both]


def test_cut_and_concatenate_cancel():
    tokens = axis("x", 52)
    text, image = o.cut(tokens, 0, 7), o.cut(tokens, 7, 45)
    assert o.concatenate([text, image]) == tokens != o.concatenate([image, text])


def test_union_refines_segments():
    joined = o.concatenate([axis("text", 7), axis("image", 45)])
    table = axis("table", 52)
    label = o.union([joined, table])
    assert [s.size for s in label] == [7, 45] and all(len(s.entries) == 2 for s in label)
    assert o.union([o.constant(52), joined]) == joined and o.is_constant(o.union([o.constant(5)] * 2))


def test_constants():
    assert o.is_constant(o.constant(5)) and not o.is_constant(axis("x", 5)) and not o.is_constant(o.feature(5))
    assert not o.is_constant(o.concatenate([o.constant(2), o.constant(3)]))  # two values
    (grouped,) = o.regroup([axis("kv", 4), o.constant(6)], [4, 6], [24])
    assert o.constant_run(grouped) == 6
    assert o.constant_run(o.union([grouped, o.regroup([axis("w", 8), o.constant(3)], [8, 3], [24])[0]])) == 3
    assert o.constant_run(o.union([grouped, axis("heads", 24)])) == 1
    (tiled,) = o.regroup([o.constant(6), axis("kv", 4)], [6, 4], [24])
    assert o.constant_run(tiled) == 1


# --- constancy, operation by operation --------------------------------------------------------------------------


def causal_attention(x, value):
    return F.scaled_dot_product_attention(x, x, value, is_causal=True)


# x is [2, 6, 8]: constant along dim 1. The number of axes of the result that do not change, or change every r-th only.
CONSTANCY = {
    "add": (lambda x: x + 1.0, 1),
    "add what changes": (lambda x: x + torch.arange(6.0)[:, None], 0),
    "where": (lambda x: torch.where(x > 0, x, torch.arange(8.0)), 1),
    "random": (torch.rand_like, 0),
    "dropout": (lambda x: F.dropout(x, 0.5, training=True), 0),
    "fill": (lambda x: x.transpose(0, 2).fill_(2.0), 3),
    "cumsum": (lambda x: x.cumsum(1), 0),
    "cumsum elsewhere": (lambda x: x.cumsum(2), 1),
    "flip": (lambda x: x.flip(1), 1),
    "roll": (lambda x: x.roll(2, 1), 1),
    "pad": (lambda x: F.pad(x, (0, 0, 1, 2)), 0),
    "pad elsewhere": (lambda x: F.pad(x, (1, 1)), 1),
    "cat of two": (lambda x: torch.cat([x, x + 1], 1), 0),
    "stack": (lambda x: torch.stack([x, x + 1]), 1),
    "layer_norm over it": (lambda x: F.layer_norm(x, (6, 8), torch.randn(6, 8)), 0),
    "layer_norm": (lambda x: F.layer_norm(x, (8,), torch.randn(8)), 1),
    "group_norm": (lambda x: F.group_norm(x, 2, torch.randn(6)), 0),
    "softmax over it": (lambda x: x.softmax(1), 1),
    "convolution": (lambda x: F.conv1d(x.mT, torch.randn(8, 8, 3), padding=1), 0),
    "convolution of one": (lambda x: F.conv1d(x.mT, torch.randn(8, 8, 1)), 1),
    "linear": (lambda x: F.linear(x, torch.randn(5, 8)), 1),
    "matmul": (lambda x: x @ x.mT, 2),
    "einsum": (lambda x: torch.einsum("bij,bkj->bik", x, x.cos()), 2),
    "sum": (lambda x: x.sum(1, keepdim=True).expand(-1, 4, -1), 1),
    "repeat": (lambda x: x.repeat(1, 2, 1), 1),
    "repeat_interleave": (lambda x: x.repeat_interleave(3, 2), 2),
    "tile": (lambda x: x.repeat(1, 1, 3), 1),
    "merge": (lambda x: x.mT.flatten(1), 1),
    "merge the other way": (lambda x: x.flatten(1), 0),
    "embedding": (lambda x: F.embedding((x > 0).long(), torch.randn(2, 4)), 1),
    "select_scatter": (lambda x: x.clone().select_scatter(x[:, 0] * 2, 1, 3), 0),
    "slice_scatter": (lambda x: x.clone().slice_scatter(x[:, :2] * 2, 1, 1, 3), 0),
    "index": (lambda x: x[:, torch.tensor([0, 2, 2])], 1),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x), 1),
    "causal attention": (
        lambda x: F.scaled_dot_product_attention(x, x + torch.arange(6.0)[:, None], x, is_causal=True),
        0,
    ),
    "unknown operation": (lambda x: x.sort(2)[0], 0),
}


@pytest.mark.parametrize("name", CONSTANCY)
def test_constancy(name):
    function, expected = CONSTANCY[name]
    model = Call(lambda x: function(x.expand(-1, 6, -1) * 1.0))
    _, (recorded,) = record(model, torch.randn(2, 1, 8))
    check_constancy(recorded)
    (output,) = (n for n in recorded.gm.graph.nodes if n.op == "output")
    labels = Origins().of(output.args[0][0])
    assert sum(o.is_constant(label) or o.constant_run(label) > 1 for label in labels) == expected
