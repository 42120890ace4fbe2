"""The rule table of the token permutation: arithmetic. Ops that move or select are in `token_rules_shape`.

One short rule per ATen op; what a rule yields is defined in `token_links`. Every pointwise op has its rule by
torch's own `pointwise` tag. An op without a rule is a wall: tokens are in their own order there.
"""

from __future__ import annotations

import string
from collections.abc import Iterator

from . import token_rules_shape  # noqa: F401  (registers its rules)
from .collectives import packet_defaults
from .token_links import RANK_RULES, Link, Signature, Unreadable, alike, free, lettered, pointwise, rule, trailing

# --- pointwise ----------------------------------------------------------------------------------------------

# Pointwise in meaning, though torch does not tag them so.
rule(
    *(
        "_to_copy",
        "to.device",
        "to.dtype",
        "to.dtype_layout",
        "alias",
        "contiguous",
        "detach",
        "lift_fresh_copy",
    ),
    *(
        "__and__.Scalar",
        "__and__.Tensor",
        "__or__.Scalar",
        "__or__.Tensor",
        "absolute",
        "negative",
        "hardswish",
    ),
    *(
        "complex",
        "polar",
        "conj",
        "real",
        "imag",
        "resolve_conj",
        "resolve_neg",
        "log_sigmoid",
        "special_expit",
    ),
    *(
        "divide.Scalar",
        "divide.Tensor",
        "floor_divide",
        "floor_divide.Scalar",
        "multiply.Scalar",
        "multiply.Tensor",
    ),
    *("float_power.Scalar", "float_power.Tensor_Scalar", "float_power.Tensor_Tensor", "rsub.Tensor"),
    *("subtract.Scalar", "subtract.Tensor", "masked_fill.Tensor", "where.Scalar", "where.ScalarOther"),
    "where.ScalarSelf",
)(pointwise)


@rule("dropout", "alpha_dropout")
def dropout(call: Signature) -> Iterator[Link]:
    """The identity in eval mode; in training a draw per element, which no permutation commutes with."""
    if not call["train"] or call["p"] == 0:
        yield from trailing(call.inputs, call.out)


@rule("type_as")
def type_as(call: Signature) -> Iterator[Link]:
    """The other operand gives its dtype alone."""
    yield from trailing([call["self"]], call.out)
    yield from free(call["other"])


@rule("copy")
def copy(call: Signature) -> Iterator[Link]:
    """`src` broadcast to the shape of `self`, whose values are overwritten."""
    yield from trailing([call["src"]], call.out)
    yield from free(call["self"])


@rule("zeros", "ones", "full", "empty.memory_format", "zeros_like", "ones_like", "full_like", "empty_like")
@rule("new_zeros", "new_ones", "new_full", "new_empty", "fill.Scalar", "fill.Tensor")
def fill(call: Signature) -> Iterator[Link]:
    """The same value everywhere; an input gives no more than its shape."""
    for operand in (*call.inputs, call.out):
        yield from free(operand)


@rule("arange", "arange.start", "arange.start_step", "linspace", "eye", "eye.m")
def counting(call: Signature) -> Iterator[Link]:
    """Positions themselves: rigid."""
    return iter(())


# --- other ranks ---


def exchange(call: Signature) -> Iterator[Link]:
    """Parts of the first dim change places between ranks; the others move along."""
    x = call.inputs[0]
    for dim in range(1, x.ndim):
        yield from alike((x, dim), (call.out, dim))


RANK_RULES.update(dict.fromkeys(packet_defaults("all_to_all_single"), exchange))

# --- products -----------------------------------------------------------------------------------------------

# Features of a linear are rigid: they could move together with the weight's, but nobody asks them to.
PATTERNS = {
    "linear": ("...I, OI, O -> ...O", "input weight bias"),
    "mm": ("mk, kn -> mn", "self mat2"),
    "bmm": ("bmk, bkn -> bmn", "self mat2"),
    "mv": ("mk, k -> m", "self vec"),
    "dot": ("k, k ->", "self tensor"),
    "outer": ("m, n -> mn", "self vec2"),
    "ger": ("m, n -> mn", "self vec2"),
    "addmm": ("(mn), mk, kn -> mn", "self mat1 mat2"),
    "baddbmm": ("(bmn), bmk, bkn -> bmn", "self batch1 batch2"),
    "softmax.int": ("... -> ...", "self"),
    "_softmax": ("... -> ...", "self"),
    "_safe_softmax": ("... -> ...", "self"),
    "log_softmax.int": ("... -> ...", "self"),
    "embedding": ("VC, ... -> ...C", "weight indices"),
    "view_as_complex": ("...C -> ...", "self"),
    "view_as_real": ("... -> ...C", "self"),
    "tril": ("...MN -> ...MN", "self"),
    "triu": ("...MN -> ...MN", "self"),
}


def _follow(pattern: str, names: list[str]):
    def follow(call: Signature) -> Iterator[Link]:
        return lettered(pattern, [call[name] for name in names], call.outs)

    return follow


for _overload, (_pattern, _names) in PATTERNS.items():
    rule(_overload)(_follow(_pattern, _names.split()))


@rule("matmul")
def matmul(call: Signature) -> Iterator[Link]:
    """[..., m, k] @ [..., k, n]; a vector on either side has no m, or no n."""
    left, right = call["self"], call["other"]
    m, n = "m" * (left.ndim > 1), "n" * (right.ndim > 1)
    dots = "..." if left.ndim > 2 or right.ndim > 2 else ""
    sides = [(dots if x.ndim > 2 else "") + letters for x, letters in ((left, m + "k"), (right, "k" + n))]
    yield from lettered(f"{sides[0]}, {sides[1]} -> {dots}{m}{n}", [left, right], call.outs)


@rule("einsum")
def einsum(call: Signature) -> Iterator[Link]:
    """The equation says it all, repeated and summed labels too."""
    inputs, arrow, output = call["equation"].replace(" ", "").partition("->")
    labels = inputs.replace(",", "").replace(".", "")
    if not arrow:  # the implicit output: every label that occurs once, in alphabetical order
        output = "..." * ("..." in inputs) + "".join(sorted(c for c in set(labels) if labels.count(c) == 1))
    if len(set(labels)) > len(string.ascii_lowercase):
        raise Unreadable("more labels than letters")
    lower = str.maketrans(dict(zip(sorted(set(labels)), string.ascii_lowercase)))
    yield from lettered(f"{inputs}->{output}".translate(lower), call["tensors"], call.outs)


@rule("scaled_dot_product_attention")
def attention(call: Signature) -> Iterator[Link]:
    """Queries move with the mask's rows, keys with values and the mask's columns. Causal: both are rigid."""
    if call["dropout_p"]:
        return
    mask = call["attn_mask"]
    if mask is not None and mask.ndim < 2:
        raise Unreadable("a mask without rows")
    pattern = "...qD, ...kD, ...kE, ...qk -> ...qE"
    if call["is_causal"]:
        pattern = pattern.replace("q", "Q").replace("k", "K")
    yield from lettered(pattern, [call["query"], call["key"], call["value"], mask], call.outs)


@rule("conv1d", "conv2d", "conv3d", "conv1d.padding", "conv2d.padding", "conv3d.padding", "convolution")
def convolution(call: Signature) -> Iterator[Link]:
    """The batch, and every spatial dim along which the kernel sees one position and skips none."""
    x, weight, out = call["input"], call["weight"], call.out
    batched = x.ndim == weight.ndim
    if batched:
        yield from alike((x, 0), (out, 0))
    for k in range(weight.ndim - 2):
        dim = k + 1 + batched
        pointwise = weight.shape[k + 2] == 1 and x.shape[dim] == out.shape[dim] and _at(call["stride"], k) == 1
        if pointwise and (isinstance(call["padding"], str) or _at(call["padding"], k) == 0):
            yield from alike((x, dim), (out, dim))


def _at(values: list[int], k: int) -> int:
    return values[k] if len(values) > 1 else values[0]


# --- reductions and norms -----------------------------------------------------------------------------------


@rule("sum", "mean", "amax", "amin", "std", "var", "prod", "logsumexp", "linalg_vector_norm", "any", "all")
@rule("sum.dim_IntList", "mean.dim", "prod.dim_int", "std.dim", "var.dim", "std.correction", "var.correction")
@rule("var_mean.correction", "norm.ScalarOpt_dim", "any.dim", "any.dims", "all.dim", "all.dims", "max", "min")
def reduction(call: Signature) -> Iterator[Link]:
    """The order of what is reduced does not matter; what is kept moves along."""
    yield from _reduce(call, order_matters=False)


@rule("max.dim", "min.dim", "argmax", "argmin", "median.dim")
def arg_reduction(call: Signature) -> Iterator[Link]:
    """The result names places along the reduced dim."""
    yield from _reduce(call, order_matters=True)


def _reduce(call: Signature, order_matters: bool) -> Iterator[Link]:
    x = call["self"]
    dims = call.get("dim")
    dims = [] if dims is None else [dims] if isinstance(dims, int) else dims
    reduced = {d % x.ndim for d in dims} or set(range(x.ndim))
    kept = [d for d in range(x.ndim) if d not in reduced]
    for dim in range(x.ndim):
        if dim in kept:
            place = dim if call.out.ndim == x.ndim else kept.index(dim)
            yield from alike((x, dim), *((out, place) for out in call.outs))
        elif not order_matters:
            yield from alike((x, dim))


@rule("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm")
def layer_norm(call: Signature) -> Iterator[Link]:
    """Leading dims; the normalised ones have weights."""
    x = call["input"]
    for dim in range(x.ndim - len(call["normalized_shape"])):
        yield from alike((x, dim), *((out, dim) for out in call.outs))


@rule("group_norm", "instance_norm")
def group_norm(call: Signature) -> Iterator[Link]:
    """[batch, channels, *positions]: statistics do not see the order of positions."""
    if not call.get("use_input_stats", True):
        return
    x = call["input"]
    for dim in (0, *range(2, x.ndim)):
        yield from alike((x, dim), (call.out, dim))


@rule(
    "cumsum",
    "cumprod",
    "logcumsumexp",
    "cummax",
    "cummin",
    "flip",
    "roll",
    "glu",
    "sort",
    "sort.stable",
    "topk",
)
def along(call: Signature) -> Iterator[Link]:
    """The order matters along the named dims; the others move along."""
    x = call["self"]
    dims = call.get("dim", call.get("dims"))
    dims = [dims] if isinstance(dims, int) else dims
    rigid = {d % x.ndim for d in dims} or set(range(x.ndim))
    for dim in set(range(x.ndim)) - rigid:
        yield from alike((x, dim), *((out, dim) for out in call.outs))


# How many trailing dims each of these works on; it does the same to every leading index.
PLANES = {
    **{f"max_pool{k}d": k for k in (1, 2, 3)},
    **{f"avg_pool{k}d": k for k in (1, 2, 3)},
    **{f"adaptive_avg_pool{k}d": k for k in (1, 2, 3)},
    **{f"upsample_nearest{k}d{form}": k for k in (1, 2, 3) for form in ("", ".vec")},
    **{f"upsample_{kind}2d{form}": 2 for kind in ("bilinear", "bicubic") for form in ("", ".vec")},
    "pixel_shuffle": 3,
    "pixel_unshuffle": 3,
}


def _leading(count: int):
    def leading(call: Signature) -> Iterator[Link]:
        x = call.inputs[0]
        for dim in range(x.ndim - count):
            yield from alike((x, dim), (call.out, dim))

    return leading


for _overload, _count in PLANES.items():
    rule(_overload)(_leading(_count))
