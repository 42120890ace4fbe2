"""Ropes of cells: what is found to be the same tokens."""

import torch
import torch.nn.functional as F

from chipmunk_compile.passes.token_axis import Cell, analyse_tokens, cut_out, find, leaves, merge
from tests.token_graphs import traced


def X(*shape):
    return torch.randn(shape)


def axes_of(function, *inputs):
    gm = traced(function, *inputs)
    axes = analyse_tokens(gm)
    return axes, {node.name: node for node in gm.graph.nodes}


def lengths(cells):
    return [cell.length for cell in leaves(cells)]


def test_cells_split_where_ropes_meet():
    a, b, c = Cell(10), Cell(4), Cell(6)
    merge([a], [b, c])
    assert lengths([a]) == [4, 6] and leaves([a]) == leaves([b, c])
    d = Cell(10)
    cut_out([d], 2, 5)
    merge([d], [a])
    assert lengths([a]) == lengths([d]) == [2, 2, 3, 3] and lengths([b]) == [2, 2]
    assert all(find(x) is find(y) for x, y in zip(leaves([a]), leaves([d])))


def test_a_run_is_not_merged_with_its_neighbours():
    axes, nodes = axes_of(lambda x: (x[1:] + x[:-1], x * 2), X(100, 4))
    (first, middle, last), fresh = axes.rope(nodes["mul"], 0), axes.rope(nodes["add"], 0)
    assert (first.length, middle.length, last.length) == (1, 98, 1) and len({first, middle, last}) == 3
    assert [piece.length for piece in fresh] == [99] and fresh[0] not in (first, middle, last)


def test_halves_of_an_axis_can_be_the_same_tokens():
    axes, nodes = axes_of(lambda x: x[:5] + x[5:], X(10, 4))
    first, second = axes.rope(nodes["x_1"], 0)
    assert first == second and axes.rope(nodes["add"], 0) == (first,)


def test_segments_of_a_joint_sequence():
    def model(text, image):
        joint = torch.cat([text, image], 1) * 2
        return joint[:, 7:] + image, joint

    axes, nodes = axes_of(model, X(2, 7, 4), X(2, 60, 4))
    text, image = axes.segments(nodes["mul"], 1)
    assert (text.start, text.length, image.start, image.length) == (0, 7, 7, 60)
    assert axes.segments(nodes["image_1"], 1)[0].cell == image.cell == axes.segments(nodes["add"], 1)[0].cell
    assert axes.segments(nodes["text_1"], 1)[0].cell == text.cell != image.cell


def test_axes_of_equal_length_are_not_confused():
    axes, nodes = axes_of(lambda x, y: (x @ y, x + 1), X(8, 8), X(8, 8))
    rows, columns = axes.ropes[nodes["x_1"], 0]
    assert rows != columns
    assert axes.ropes[nodes["matmul"], 0] == (rows, axes.ropes[nodes["y_1"], 0][1])


def test_a_grid_does_not_cut_its_axis_into_rows():
    def model(x):
        q = x.flatten(1, 3)
        return F.scaled_dot_product_attention(q, q, q)

    axes, nodes = axes_of(model, X(2, 3, 4, 5, 8))
    assert [piece.length for piece in axes.rope(nodes["scaled_dot_product_attention"], 1)] == [60]


def test_a_flattened_batch_is_copies_of_the_tokens():
    def model(x, w):
        q = F.linear(x.flatten(0, 1), w).view(3, 5, 8)
        return F.scaled_dot_product_attention(q, q, q)

    axes, nodes = axes_of(model, X(3, 5, 8), X(8, 8))
    tokens = axes.rope(nodes["x_1"], 1)
    assert axes.rope(nodes["linear"], 0) == tokens * 3
    assert axes.rope(nodes["scaled_dot_product_attention"], 1) == tokens


def test_outputs_of_one_op_share_their_axes():
    axes, nodes = axes_of(lambda x: [part + 1 for part in x.chunk(3, -1)], X(2, 5, 6))
    assert axes.rope(nodes["add"], 1) == axes.rope(nodes["add_2"], 1) == axes.rope(nodes["x_1"], 1)
    assert len(axes.rope(nodes["x_1"], 2)) == 3


def test_an_op_without_a_rule_ends_an_axis():
    axes, nodes = axes_of(lambda x: torch.fft.fft(x, dim=2).real + 1, X(2, 5, 6))
    assert axes.rope(nodes["add"], 1) != axes.rope(nodes["x_1"], 1)
