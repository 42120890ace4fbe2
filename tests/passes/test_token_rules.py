"""The rule table of the token permutation: every rule's claims hold in numbers, and say what they should."""

import pytest
import torch
from torch import fx

from chipmunk_compile.passes import token_rules  # noqa: F401  (registers the rules)
from chipmunk_compile.passes.token_links import RULES, Call, Link, Span, call_of
from tests.token_graphs import assert_links_hold

aten = torch.ops.aten


def X(*shape):
    """Random float64 values, new at each call."""
    return torch.randn(shape, dtype=torch.float64)


def Int(high, *shape):
    return torch.randint(high, shape)


def B(*shape):
    return torch.rand(shape) > 0.5


def call(overload: str, *args, **kwargs) -> tuple[Call | None, list[torch.Tensor]]:
    """A graph of one op, and its inputs. Tensors become placeholders."""
    name, _, form = overload.partition(".")
    target = getattr(getattr(aten, name), form or "default")
    graph, tensors = fx.Graph(), []

    def node(value):
        if isinstance(value, (list, tuple)):
            return [node(v) for v in value]
        if not isinstance(value, torch.Tensor):
            return value
        tensors.append(value)
        placeholder = graph.placeholder(f"x{len(tensors)}")
        placeholder.meta["val"] = value
        return placeholder

    op = graph.call_function(target, tuple(node(a) for a in args), {k: node(a) for k, a in kwargs.items()})
    op.meta["val"] = target(*args, **kwargs)
    return call_of(op), tensors


# One call or more of every overload in the table: (overload, arguments, keyword arguments).
SAMPLES = [
    # pointwise by name
    *((name, (X(2, 5, 3),), {}) for name in ("alias", "detach", "contiguous", "absolute", "negative", "hardswish")),
    *((name, (X(2, 5, 3),), {}) for name in ("lift_fresh_copy", "log_sigmoid", "special_expit", "conj", "resolve_neg")),
    ("_to_copy", (X(2, 5, 3),), {"dtype": torch.float32}),
    ("to.dtype", (X(2, 5), torch.float32), {}),
    ("to.device", (X(2, 5), "cpu", torch.float32), {}),
    ("to.dtype_layout", (X(2, 5),), {"dtype": torch.float32}),
    *((f"{name}.Tensor", (B(2, 5), B(5)), {}) for name in ("__and__", "__or__")),
    *((f"{name}.Scalar", (Int(9, 2, 5), 3), {}) for name in ("__and__", "__or__", "floor_divide")),
    *((f"{name}.Scalar", (X(2, 5), 3.0), {}) for name in ("divide", "multiply", "subtract")),
    *((f"{name}.Tensor", (X(2, 5, 3), X(5, 1)), {}) for name in ("divide", "multiply", "subtract", "rsub")),
    ("floor_divide", (X(2, 5, 3), X(5, 1)), {}),
    ("float_power.Scalar", (2.0, X(5)), {}),
    ("float_power.Tensor_Scalar", (X(5), 2.0), {}),
    ("float_power.Tensor_Tensor", (X(4, 5).abs(), X(5)), {}),
    ("complex", (X(4, 5), X(4, 5)), {}),
    ("polar", (X(4, 5).abs(), X(4, 5)), {}),
    *((name, (torch.complex(X(4, 5), X(4, 5)),), {}) for name in ("real", "imag", "resolve_conj")),
    ("masked_fill.Tensor", (X(2, 5, 3), B(5, 1), torch.tensor(2.0)), {}),
    ("where.Scalar", (B(4, 5), 1.0, 2.0), {}),
    ("where.ScalarOther", (B(4, 5), X(4, 5), 2.0), {}),
    ("where.ScalarSelf", (B(4, 5), 2.0, X(4, 5)), {}),
    *((name, (X(2, 5, 3), 0.5, False), {}) for name in ("dropout", "alpha_dropout")),
    ("type_as", (X(2, 5), X(7, 3)), {}),
    ("copy", (X(2, 5, 3), X(5, 1)), {}),
    # fills
    *((name, ([2, 5],), {}) for name in ("zeros", "ones")),
    ("empty.memory_format", ([2, 5],), {}),
    ("full", ([2, 5], 3.0), {}),
    *((name, (X(2, 5),), {}) for name in ("zeros_like", "ones_like", "empty_like")),
    ("full_like", (X(2, 5), 3.0), {}),
    *((name, (X(2, 5), [4, 3]), {}) for name in ("new_zeros", "new_ones", "new_empty")),
    ("new_full", (X(2, 5), [4, 3], 2.0), {}),
    ("fill.Scalar", (X(2, 5), 3.0), {}),
    ("fill.Tensor", (X(2, 5), torch.tensor(3.0, dtype=torch.float64)), {}),
    ("arange", (5,), {}),
    ("arange.start", (1, 5), {}),
    ("arange.start_step", (1, 9, 2), {}),
    ("linspace", (0.0, 1.0, 5), {}),
    ("eye", (4,), {}),
    ("eye.m", (4, 3), {}),
    # products
    ("linear", (X(2, 5, 3), X(4, 3), X(4)), {}),
    ("linear", (X(5, 3), X(4, 3)), {}),
    ("linear", (X(5, 5, 5), X(5)), {}),  # a weight without rows
    ("mm", (X(5, 4), X(4, 3)), {}),
    ("bmm", (X(2, 5, 4), X(2, 4, 3)), {}),
    ("mv", (X(5, 4), X(4)), {}),
    ("dot", (X(5), X(5)), {}),
    *((name, (X(5), X(4)), {}) for name in ("outer", "ger")),
    ("addmm", (X(3), X(5, 4), X(4, 3)), {}),
    ("addmm", (X(5, 1), X(5, 4), X(4, 3)), {}),
    ("baddbmm", (X(5, 3), X(2, 5, 4), X(2, 4, 3)), {}),
    ("matmul", (X(2, 1, 5, 4), X(3, 4, 6)), {}),
    ("matmul", (X(5, 4), X(4)), {}),
    ("matmul", (X(4), X(2, 4, 3)), {}),
    ("matmul", (X(2, 5, 4), X(4)), {}),
    ("matmul", (X(4), X(4)), {}),
    ("einsum", ("bnd,bmd->bnm", [X(2, 5, 3), X(2, 4, 3)]), {}),
    ("einsum", ("bnd,bmd", [X(2, 5, 3), X(2, 4, 3)]), {}),
    ("einsum", ("...N,Nk->...k", [X(2, 3, 5), X(5, 4)]), {}),
    ("einsum", ("ii->i", [X(5, 5)]), {}),
    ("scaled_dot_product_attention", (X(2, 3, 5, 4), X(2, 3, 6, 4), X(2, 3, 6, 4)), {}),
    ("scaled_dot_product_attention", (X(2, 3, 5, 4), X(2, 3, 6, 4), X(2, 3, 6, 4), B(2, 1, 5, 6) | True), {}),
    ("scaled_dot_product_attention", (X(2, 3, 5, 4), X(2, 3, 6, 4), X(2, 3, 6, 4), X(6, 6)[:1]), {}),
    ("scaled_dot_product_attention", (X(2, 3, 5, 4), X(2, 3, 5, 4), X(2, 3, 5, 4)), {"is_causal": True}),
    ("scaled_dot_product_attention", (X(2, 4, 5, 4), X(2, 2, 5, 4), X(2, 2, 5, 4)), {"enable_gqa": True}),
    ("conv1d", (X(2, 3, 7), X(4, 3, 1)), {}),
    ("conv1d", (X(3, 7), X(4, 3, 1)), {}),
    ("conv1d", (X(2, 3, 7), X(4, 3, 3), None, [1], [1]), {}),
    ("conv2d", (X(2, 3, 6, 8), X(4, 3, 2, 2), None, [2, 2]), {}),
    ("conv2d", (X(2, 3, 6, 7), X(4, 3, 1, 3), X(4), [1, 1], [0, 1]), {}),
    ("conv3d", (X(2, 3, 2, 4, 5), X(4, 3, 1, 1, 1)), {}),
    ("conv3d", (X(2, 3, 2, 4, 5), X(4, 3, 1, 1, 1), None, [1, 1, 2]), {}),
    ("conv1d.padding", (X(2, 3, 7), X(4, 3, 3), None, [1], "same"), {}),
    ("conv2d.padding", (X(2, 3, 6, 7), X(4, 3, 1, 1), None, [1, 1], "valid"), {}),
    ("conv3d.padding", (X(2, 3, 2, 4, 5), X(4, 3, 1, 3, 3), None, [1, 1, 1], "same"), {}),
    ("convolution", (X(2, 3, 6), X(4, 3, 1), None, [1], [0], [1], False, [0], 1), {}),
    ("convolution", (X(2, 3, 6), X(3, 4, 1), None, [1], [0], [1], True, [0], 1), {}),
    # reductions and norms
    *((name, (X(4, 5, 3),), {}) for name in ("sum", "mean", "amax", "amin", "std", "var", "prod", "max", "min")),
    *((name, (B(4, 5, 3),), {}) for name in ("any", "all")),
    ("logsumexp", (X(4, 5, 3), [1]), {}),
    ("linalg_vector_norm", (X(4, 5, 3), 2, [1], True), {}),
    ("linalg_vector_norm", (X(4, 5, 3),), {}),
    *((name, (X(4, 5, 3), [-2]), {}) for name in ("sum.dim_IntList", "mean.dim", "std.dim", "var.dim", "amax")),
    *((name, (X(4, 5, 3), [0, 2], True), {}) for name in ("sum.dim_IntList", "mean.dim", "amin")),
    ("sum.dim_IntList", (X(4, 5), None), {}),
    *((name, (X(4, 5, 3), [1]), {"correction": 0}) for name in ("std.correction", "var.correction")),
    ("var_mean.correction", (X(4, 5, 3), [2]), {"correction": 0, "keepdim": True}),
    ("norm.ScalarOpt_dim", (X(4, 5, 3), 2, [1]), {}),
    ("prod.dim_int", (X(4, 5, 3), 1), {}),
    *((name, (B(4, 5, 3), 1), {}) for name in ("any.dim", "all.dim")),
    *((name, (B(4, 5, 3), [0, 1]), {}) for name in ("any.dims", "all.dims")),
    *((name, (X(4, 5, 3), 1), {}) for name in ("max.dim", "min.dim", "argmax", "argmin", "median.dim")),
    ("argmax", (X(4, 5),), {}),
    *((name, (X(2, 5, 3), -1), {}) for name in ("softmax.int", "log_softmax.int", "_safe_softmax")),
    ("softmax.int", (X(2, 5, 3), 1), {}),
    ("_softmax", (X(2, 5, 3), 1, False), {}),
    ("layer_norm", (X(2, 5, 3, 4), [3, 4], X(3, 4), X(3, 4)), {}),
    ("native_layer_norm", (X(2, 5, 3), [3], X(3), X(3), 1e-5), {}),
    ("rms_norm", (X(2, 5, 3), [3], X(3)), {}),
    ("_fused_rms_norm", (X(2, 5, 3), [3], X(3), 1e-5), {}),
    ("group_norm", (X(2, 6, 5, 4), 3, X(6), X(6)), {}),
    ("instance_norm", (X(2, 6, 5), X(6), X(6), None, None, True, 0.1, 1e-5, False), {}),
    ("instance_norm", (X(2, 6, 5), None, None, X(6), X(6).abs(), False, 0.1, 1e-5, False), {}),
    *((name, (X(2, 5, 3), 1), {}) for name in ("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin")),
    ("flip", (X(2, 5, 3), [1, 2]), {}),
    ("roll", (X(2, 5, 3), [2], [1]), {}),
    ("roll", (X(2, 5, 3), [2]), {}),
    ("glu", (X(2, 5, 6), -1), {}),
    ("sort", (X(2, 5, 3), 1), {}),
    ("sort.stable", (X(2, 5, 3),), {"stable": True, "dim": 1}),
    ("topk", (X(2, 5, 3), 2, 1), {}),
    *((f"{kind}_pool1d", (X(5, 3, 6), [2]), {}) for kind in ("max", "avg")),
    *((f"{kind}_pool2d", (X(5, 3, 6, 4), [2, 2]), {}) for kind in ("max", "avg")),
    *((f"{kind}_pool3d", (X(5, 3, 2, 6, 4), [2, 2, 2]), {}) for kind in ("max", "avg")),
    ("adaptive_avg_pool1d", (X(5, 3, 6), [2]), {}),
    ("adaptive_avg_pool2d", (X(5, 3, 6, 4), [2, 2]), {}),
    ("adaptive_avg_pool3d", (X(5, 3, 2, 6, 4), [2, 2, 2]), {}),
    ("upsample_nearest1d", (X(5, 3, 6), [12]), {}),
    ("upsample_nearest2d", (X(5, 3, 6, 4), [12, 8]), {}),
    ("upsample_nearest3d", (X(5, 3, 2, 6, 4), [4, 12, 8]), {}),
    ("upsample_nearest1d.vec", (X(5, 3, 6), [12], None), {}),
    ("upsample_nearest2d.vec", (X(5, 3, 6, 4), [12, 8], None), {}),
    ("upsample_nearest3d.vec", (X(5, 3, 2, 6, 4), [4, 12, 8], None), {}),
    *((f"upsample_{kind}2d", (X(5, 3, 6, 4), [12, 8], False), {}) for kind in ("bilinear", "bicubic")),
    *((f"upsample_{kind}2d.vec", (X(5, 3, 6, 4), [12, 8], False, None), {}) for kind in ("bilinear", "bicubic")),
    ("pixel_shuffle", (X(5, 2, 8, 3, 3), 2), {}),
    ("pixel_unshuffle", (X(5, 2, 4, 4), 2), {}),
    # shapes
    *((name, (X(2, 12, 6), [2, 3, 4, 2, 3]), {}) for name in ("view", "reshape", "_unsafe_view")),
    ("view", (X(2, 12, 6), [24, 6]), {}),
    ("view", (X(24, 6), [2, 12, 1, 6]), {}),
    ("view", (X(2, 3, 4, 6), [2, 12, 6]), {}),
    ("view", (X(12, 6), [6, 12]), {}),
    *((name, (X(2, 12, 6), X(24, 6)), {}) for name in ("view_as", "reshape_as")),
    ("flatten.using_ints", (X(2, 3, 4, 5), 1, 2), {}),
    ("unflatten.int", (X(2, 12, 5), 1, [3, 4]), {}),
    ("ravel", (X(2, 5),), {}),
    ("squeeze", (X(2, 1, 5, 1),), {}),
    ("squeeze.dim", (X(2, 1, 5), 1), {}),
    ("squeeze.dims", (X(2, 1, 5, 1), [1, 3]), {}),
    ("unsqueeze", (X(2, 5), 1), {}),
    *((name, (X(2, 1, 3), [4, 2, 5, 3]), {}) for name in ("expand", "broadcast_to")),
    ("expand_as", (X(2, 1, 3), X(2, 5, 3)), {}),
    *((name, (X(2, 1, 5), [3, 4, 2]), {}) for name in ("repeat", "tile")),
    ("repeat", (X(5), [3, 2]), {}),
    ("repeat_interleave.self_int", (X(2, 5), 3, 1), {}),
    ("repeat_interleave.self_int", (X(2, 5), 1, 1), {}),
    ("permute", (X(2, 5, 3, 4), [0, 2, -1, 1]), {}),
    *((name, (X(2, 5, 3, 4), 1, -2), {}) for name in ("transpose.int", "swapaxes", "swapdims")),
    ("t", (X(5, 3),), {}),
    ("t", (X(5),), {}),
    ("mT", (X(2, 5, 3),), {}),
    ("numpy_T", (X(2, 5, 3),), {}),
    *((f"{name}.int", (X(2, 5, 3, 4), 1, -1), {}) for name in ("movedim", "moveaxis")),
    *((f"{name}.intlist", (X(2, 5, 3, 4), [1, 2], [0, 1]), {}) for name in ("movedim", "moveaxis")),
    *((name, ([X(2, 5, 3), X(2, 4, 3), X(2, 1, 3)], 1), {}) for name in ("cat", "concat", "concatenate")),
    ("cat", ([X(0), X(5, 3)],), {}),
    ("split.Tensor", (X(2, 7, 3), 3, 1), {}),
    ("split.sizes", (X(2, 7, 3), [3, 4], 1), {}),
    ("split_with_sizes", (X(2, 7, 3), [3, 4], -2), {}),
    ("chunk", (X(2, 7, 3), 2, 1), {}),
    ("tensor_split.sections", (X(2, 7, 3), 3, 1), {}),
    ("tensor_split.indices", (X(2, 7, 3), [2, 5], 1), {}),
    ("unsafe_split.Tensor", (X(2, 7, 3), 3, 1), {}),
    ("unsafe_split_with_sizes", (X(2, 7, 3), [3, 4], 1), {}),
    ("unsafe_chunk", (X(2, 7, 3), 2, 1), {}),
    ("stack", ([X(2, 5), X(2, 5)], -2), {}),
    ("unbind.int", (X(2, 5, 3), 1), {}),
    ("slice.Tensor", (X(2, 9, 3), 1, 3, 7), {}),
    ("slice.Tensor", (X(2, 9, 3), 1, -4), {}),
    ("slice.Tensor", (X(2, 9, 3), 1, 0, 9, 2), {}),
    ("narrow", (X(2, 9, 3), 1, 3, 4), {}),
    ("select.int", (X(2, 9, 3), 1, -3), {}),
    ("slice_scatter", (X(2, 9, 3), X(2, 4, 3), 1, 3, 7), {}),
    ("slice_scatter", (X(2, 9, 3), X(2, 3, 3), 1, 0, 9, 3), {}),
    ("select_scatter", (X(2, 9, 3), X(2, 3), 1, 4), {}),
    ("pad", (X(2, 5, 3), [0, 0, 2, 4]), {}),
    ("pad", (X(2, 9, 3), [1, 0, -2, 4], "constant", 2.0), {}),
    ("pad", (X(2, 5, 3), [1, 1], "replicate"), {}),
    ("constant_pad_nd", (X(2, 9, 3), [0, 0, 3, -2]), {}),
    ("pad_sequence", ([X(5, 3), X(5, 3)], True), {}),
    ("pad_sequence", ([X(7, 3), X(4, 3), X(4, 3)],), {}),
    ("pad_sequence", ([X(7, 3), X(4, 3)], True, 0.0, "left"), {}),
    ("view_as_complex", (X(5, 3, 2),), {}),
    ("view_as_real", (torch.complex(X(5, 3), X(5, 3)),), {}),
    ("tril", (X(3, 5, 4),), {}),
    ("triu", (X(3, 5, 4),), {}),
    # selection
    ("embedding", (X(9, 4), Int(9, 2, 5)), {}),
    ("index.Tensor", (X(9, 5, 3), [Int(9, 4)]), {}),
    ("index.Tensor", (X(2, 9, 3), [None, Int(9, 6)]), {}),
    ("index.Tensor", (X(2, 9, 8, 3), [None, Int(9, 6, 1), Int(8, 5)]), {}),
    ("index.Tensor", (X(9, 4, 8, 3), [Int(9, 6), None, Int(8, 6)]), {}),
    ("index.Tensor", (X(4, 3), [torch.tensor([True, False, True, True])]), {}),
    ("index_select", (X(2, 9, 3), 1, Int(9, 5)), {}),
    ("gather", (X(2, 9, 3), 1, Int(9, 2, 5, 3)), {}),
    ("gather", (X(4, 9, 3), 1, Int(9, 1, 5, 2)), {}),
    ("meshgrid", ([X(4), X(5)],), {}),
    ("meshgrid.indexing", ([X(4), X(5), X(3)],), {"indexing": "xy"}),
    ("meshgrid.indexing", ([X(4), X(5), X(3)],), {"indexing": "ij"}),
    # pointwise by torch's tag
    ("mul.Tensor", (X(2, 5, 3), X(5, 1)), {}),
    ("gelu", (X(2, 5),), {"approximate": "tanh"}),
    ("where.self", (B(5, 1), X(2, 5, 3), X(3)), {}),
    ("pow.Scalar", (2.0, X(5)), {}),
    ("clamp", (X(5, 3), 0.0), {}),
    ("masked_fill.Scalar", (X(2, 5, 3), B(5, 1), 0.0), {}),
]


@pytest.mark.parametrize("overload", sorted({overload for overload, _, _ in SAMPLES}))
def test_every_claim_of_the_rule_holds(overload):
    for name, args, kwargs in SAMPLES:
        if name == overload:
            op, tensors = call(name, *args, **kwargs)
            if op is not None:
                assert_links_hold(op.signature, op.links, tensors)
                spots = [(s.slot, s.dim, p) for link in op.links for s in link.spans for p in _positions(s)]
                assert len(spots) == len(set(spots)), "links of one call overlap"


def _positions(span: Span) -> range:
    return range(span.start, span.start + span.length)


def test_no_rule_without_a_sample():
    sampled = {getattr(getattr(aten, o.partition(".")[0]), o.partition(".")[2] or "default") for o, _, _ in SAMPLES}
    assert not set(RULES) - sampled


def test_a_false_claim_is_noticed():
    op, tensors = call("cumsum", X(2, 5, 3), 1)
    false = Link((Span(0, 1, 0, 5), Span(-1, 1, 0, 5)))
    with pytest.raises(AssertionError):
        assert_links_hold(op.signature, (false,), tensors)


def spelled(overload: str, *args, **kwargs) -> set[str]:
    """Links as text: `0.1[3:7]` is 3 to 7 of dim 1 of input 0, `o0` is output 0, `~` is weak."""
    op, _ = call(overload, *args, **kwargs)

    def side(span: Span) -> str:
        operand = span.slot if span.slot >= 0 else f"o{~span.slot}"
        return f"{operand}.{span.dim}[{span.start}:{span.start + span.length}]"

    return {"~" * link.weak + " ".join(map(side, link.spans)) for link in op.links} if op else set()


def test_attention_moves_queries_apart_from_keys():
    q, kv, mask = X(2, 3, 5, 4), X(2, 3, 6, 4), X(2, 1, 5, 6)
    assert spelled("scaled_dot_product_attention", q, kv, kv, mask) == {
        "0.0[0:2] 1.0[0:2] 2.0[0:2] 3.0[0:2] o0.0[0:2]",
        "0.1[0:3] 1.1[0:3] 2.1[0:3] o0.1[0:3]",
        "0.2[0:5] 3.2[0:5] o0.2[0:5]",
        "1.2[0:6] 2.2[0:6] 3.3[0:6]",
    }
    causal = spelled("scaled_dot_product_attention", q, q, q, is_causal=True)
    assert not any(".2[" in link for link in causal)
    assert spelled("scaled_dot_product_attention", q, kv, kv, None, 0.1) == set()


def test_cat_and_slice_cut_an_axis_into_segments():
    assert spelled("cat", [X(2, 5, 3), X(2, 4, 3)], 1) == {
        "o0.0[0:2] 0.0[0:2] 1.0[0:2]",
        "o0.1[0:5] 0.1[0:5]",
        "o0.1[5:9] 1.1[0:4]",
        "o0.2[0:3] 0.2[0:3] 1.2[0:3]",
    }
    assert spelled("slice.Tensor", X(9, 3), 0, 2, 6) == {
        "0.1[0:3] o0.1[0:3]",
        "0.0[2:6] o0.0[0:4]",
        "0.0[0:2]",
        "0.0[6:9]",
    }


def test_views_keep_what_stands_at_the_same_place():
    assert spelled("view", X(2, 12, 6), [2, 3, 4, 6]) == {
        "0.0[0:2] o0.0[0:2]",
        "0.2[0:6] o0.3[0:6]",
        "~o0.2[0:4] 0.1[0:4] 0.1[4:8] 0.1[8:12]",
    }
    assert spelled("view", X(2, 12, 6), [24, 6]) == {
        "0.2[0:6] o0.1[0:6]",
        "~0.1[0:12] o0.0[0:12] o0.0[12:24]",
    }


def test_sums_do_not_care_and_fills_are_free():
    assert spelled("mean.dim", X(2, 5, 3), [1]) == {"0.0[0:2] o0.0[0:2]", "0.1[0:5]", "0.2[0:3] o0.1[0:3]"}
    assert spelled("ones_like", X(2, 5)) == {"0.0[0:2]", "0.1[0:5]", "o0.0[0:2]", "o0.1[0:5]"}
    assert spelled("expand", X(2, 1), [2, 7]) == {"0.0[0:2] o0.0[0:2]", "o0.1[0:7]"}
    assert spelled("arange", 5) == set()


def test_order_matters_where_it_matters():
    assert spelled("cumsum", X(2, 5), 1) == {"0.0[0:2] o0.0[0:2]"}
    assert spelled("argmax", X(2, 5), 1) == {"0.0[0:2] o0.0[0:2]"}
    assert spelled("conv1d", X(2, 3, 7), X(4, 3, 3), None, [1], [1]) == {"0.0[0:2] o0.0[0:2]"}
    assert spelled("conv1d", X(2, 3, 7), X(4, 3, 1)) == {"0.0[0:2] o0.0[0:2]", "0.2[0:7] o0.2[0:7]"}
    assert spelled("dropout", X(2, 5), 0.5, True) == set()


def test_in_place_rope_is_a_scatter_that_leaves_tokens_alone():
    assert spelled("slice_scatter", X(2, 5, 8), X(2, 5, 4), 2, 0, 4) == {
        "0.0[0:2] 1.0[0:2] o0.0[0:2]",
        "0.1[0:5] 1.1[0:5] o0.1[0:5]",
        "1.2[0:4] o0.2[0:4]",
        "0.2[0:4]",
        "0.2[4:8] o0.2[4:8]",
    }
