"""The rule table of the token permutation: ops that move, cut, join and select."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .token_links import (
    MAX_COPIES,
    Link,
    Operand,
    Signature,
    Span,
    Unreadable,
    alike,
    free,
    rule,
    together,
    trailing,
    whole,
)

# --- the same numbers in another shape ----------------------------------------------------------------------


def shape_groups(a: Sequence[int], b: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """The finest pairs (dims of `a`, dims of `b`) of equal product, left to right, for two shapes of one
    row-major order. Dims of size one are left out. [2, 60, 12] and [2, 6, 10, 3, 4]: ([0], [0]), ([1], [1,
    2]), ([2], [3, 4]).
    """
    left = [d for d, size in enumerate(a) if size != 1]
    right = [d for d, size in enumerate(b) if size != 1]
    while left and right:
        mine, theirs = [left.pop(0)], [right.pop(0)]
        size, other = a[mine[0]], b[theirs[0]]
        while size != other:
            if size < other:
                mine.append(left.pop(0))
                size *= a[mine[-1]]
            else:
                theirs.append(right.pop(0))
                other *= b[theirs[-1]]
        yield mine, theirs


@rule("view", "reshape", "_unsafe_view", "view_as", "reshape_as", "flatten.using_ints", "unflatten.int", "ravel")
@rule("squeeze", "squeeze.dim", "squeeze.dims", "unsqueeze")
def row_major(call: Signature) -> Iterator[Link]:
    """Dims that both shapes have at one place; weakly, an innermost dim and its copies in a longer one."""
    x, out = call["self"], call.out
    for other in call.inputs[1:]:
        yield from free(other)
    if None in x.shape or None in out.shape or 0 in x.shape:
        return
    for mine, theirs in shape_groups(x.shape, out.shape):
        short, long = sorted(((x, mine[-1]), (out, theirs[-1])), key=lambda end: end[0].shape[end[1]])
        if len(mine) == len(theirs) == 1:
            yield from alike((x, mine[0]), (out, theirs[0]))
            continue
        (inner, dim), (outer, where) = short, long
        length = inner.shape[dim]
        copies, rest = divmod(outer.shape[where], length)
        if not rest and 1 < copies <= MAX_COPIES:
            spans = (Span(outer.slot, where, k * length, length) for k in range(copies))
            yield from together(whole(inner, dim), *spans, weak=True)


@rule("expand", "expand_as", "broadcast_to")
def expand(call: Signature) -> Iterator[Link]:
    """New and stretched dims are constant along themselves."""
    yield from trailing([call["self"]], call.out)
    for other in call.inputs[1:]:
        yield from free(other)


@rule("repeat", "tile")
def repeat(call: Signature) -> Iterator[Link]:
    """Every copy moves with the original."""
    x, out = call["self"], call.out
    for dim in range(out.ndim):
        source = dim - out.ndim + x.ndim
        length = x.shape[source] if source >= 0 else 1
        if length == 1:
            yield from alike((out, dim))
        elif length and out.shape[dim] and out.shape[dim] <= length * MAX_COPIES:
            copies = (Span(out.slot, dim, k * length, length) for k in range(out.shape[dim] // length))
            yield from together(whole(x, source), *copies)


@rule("repeat_interleave.self_int")
def repeat_interleave(call: Signature) -> Iterator[Link]:
    """Positions become runs along `dim`, each constant along itself; the other dims move along.

    Few long runs are a modulation spread over tokens. Many short ones are a RoPE table's pairs of channels: they
    hold no tokens, and to cut every head into pairs made the analysis of FLUX three times as long.
    """
    x, out, run = call["self"], call.out, call["repeats"]
    if call["dim"] is None:
        return
    dim = x.at(call["dim"])
    yield from _others([x, out], dim)
    if run == 1:
        yield from alike((x, dim), (out, dim))
    elif x.shape[dim] is not None and x.shape[dim] <= min(run, MAX_COPIES):
        for k in range(x.shape[dim]):
            yield from together(Span(out.slot, dim, k * run, run))


# --- dims in another order ----------------------------------------------------------------------------------


def _moved(call: Signature, order: Sequence[int]) -> Iterator[Link]:
    for place, dim in enumerate(order):
        yield from alike((call["self"], call["self"].at(dim)), (call.out, place))


@rule("permute")
def permute(call: Signature) -> Iterator[Link]:
    return _moved(call, call["dims"])


@rule("transpose.int", "swapaxes", "swapdims", "t", "mT", "numpy_T")
def transpose(call: Signature) -> Iterator[Link]:
    """Two dims exchanged; `t` and `mT` the last two, `numpy_T` all in reverse."""
    x = call["self"]
    order = list(range(x.ndim))
    if call.target is torch.ops.aten.numpy_T.default:
        return _moved(call, order[::-1])
    if x.ndim < 2:
        return _moved(call, order)
    first, second = [v for v in call.values if isinstance(v, int)] or (-2, -1)
    order[first], order[second] = order[second], order[first]
    return _moved(call, order)


@rule("movedim.int", "movedim.intlist", "moveaxis.int", "moveaxis.intlist")
def movedim(call: Signature) -> Iterator[Link]:
    x = call["self"]
    source, place = ([v] if isinstance(v, int) else v for v in (call["source"], call["destination"]))
    source, place = [x.at(d) for d in source], [x.at(d) for d in place]
    rest = iter([d for d in range(x.ndim) if d not in source])
    return _moved(call, [source[place.index(d)] if d in place else next(rest) for d in range(x.ndim)])


# --- joining and cutting ------------------------------------------------------------------------------------


def _others(operands: Sequence[Operand], dim: int) -> Iterator[Link]:
    """All dims but one move along, in every operand alike."""
    for d in range(operands[0].ndim):
        if d != dim:
            yield from alike(*((x, d) for x in operands))


def _pieces(long: Operand, parts: Sequence[Operand], dim: int) -> Iterator[Link]:
    """`parts` lie end to end along `dim` of `long`."""
    yield from _others([long, *parts], dim)
    start = 0
    for part in parts:
        length = part.shape[dim]
        if length is None:
            raise Unreadable("a symbolic size")
        yield from together(Span(long.slot, dim, start, length), whole(part, dim))
        start += length


@rule("cat", "concat", "concatenate")
def cat(call: Signature) -> Iterator[Link]:
    """End to end. (An empty [0] tensor joins anything.)"""
    return _pieces(call.out, [x for x in call["tensors"] if x.shape != (0,)], call.out.at(call["dim"]))


@rule(
    "split.Tensor",
    "split.sizes",
    "split_with_sizes",
    "chunk",
    "tensor_split.sections",
    "tensor_split.indices",
)
@rule("unsafe_split.Tensor", "unsafe_split_with_sizes", "unsafe_chunk")
def split(call: Signature) -> Iterator[Link]:
    return _pieces(call["self"], call.outs, call["self"].at(call["dim"]))


@rule("stack")
def stack(call: Signature) -> Iterator[Link]:
    dim = call.out.at(call["dim"])
    for d in range(call.out.ndim):
        if d != dim:
            yield from alike(*((x, d - (d > dim)) for x in call["tensors"]), (call.out, d))


@rule("unbind.int")
def unbind(call: Signature) -> Iterator[Link]:
    x = call["self"]
    dim = x.at(call["dim"])
    for d in range(x.ndim):
        if d != dim:
            yield from alike((x, d), *((out, d - (d > dim)) for out in call.outs))


@rule("slice.Tensor")
def slice_(call: Signature) -> Iterator[Link]:
    """What is kept moves along, what is left out moves as it likes; with a step only the other dims do."""
    x, out = call["self"], call.out
    dim = x.at(call["dim"])
    yield from _others([x, out], dim)
    if call["step"] == 1 and None not in (x.shape[dim], out.shape[dim]):
        start, _, _ = slice(call["start"], None).indices(x.shape[dim])
        yield from _part(x, out, dim, start)


@rule("narrow")
def narrow(call: Signature) -> Iterator[Link]:
    x, out = call["self"], call.out
    dim = x.at(call["dim"])
    yield from _others([x, out], dim)
    yield from _part(x, out, dim, call["start"] % x.shape[dim])


def _part(x: Operand, out: Operand, dim: int, start: int) -> Iterator[Link]:
    """`out` is x[start : start + its length] along `dim`."""
    length = out.shape[dim]
    yield from together(Span(x.slot, dim, start, length), whole(out, dim))
    yield from _unread(x, dim, start, length)


def _unread(x: Operand, dim: int, start: int, length: int) -> Iterator[Link]:
    """Everything of a dim outside start .. start + length."""
    yield from together(Span(x.slot, dim, 0, start))
    yield from together(Span(x.slot, dim, start + length, x.shape[dim] - start - length))


@rule("select.int")
def select(call: Signature) -> Iterator[Link]:
    x = call["self"]
    dim = x.at(call["dim"])
    for d in range(x.ndim):
        if d != dim:
            yield from alike((x, d), (call.out, d - (d > dim)))
    yield from _unread(x, dim, call["index"] % x.shape[dim], 1)


@rule("slice_scatter")
def slice_scatter(call: Signature) -> Iterator[Link]:
    """`src` over a part of `self`: it moves apart from what is around; the overwritten is not read."""
    x, src, out = call["self"], call["src"], call.out
    dim = x.at(call["dim"])
    yield from _others([x, src, out], dim)
    if call["step"] == 1 and None not in x.shape:
        start, _, _ = slice(call["start"], None).indices(x.shape[dim])
        yield from together(whole(src, dim), Span(out.slot, dim, start, src.shape[dim]))
        yield from _around(x, out, dim, start, src.shape[dim])


@rule("select_scatter")
def select_scatter(call: Signature) -> Iterator[Link]:
    x, src, out = call["self"], call["src"], call.out
    dim = x.at(call["dim"])
    for d in range(x.ndim):
        if d != dim:
            yield from alike((x, d), (src, d - (d > dim)), (out, d))
    if None not in x.shape:
        yield from _around(x, out, dim, call["index"] % x.shape[dim], 1)


def _around(x: Operand, out: Operand, dim: int, start: int, length: int) -> Iterator[Link]:
    """What lies before and after an overwritten part stays as it was; the part itself is not read."""
    end = start + length
    yield from together(Span(x.slot, dim, start, length))
    for begin, size in ((0, start), (end, x.shape[dim] - end)):
        yield from together(Span(x.slot, dim, begin, size), Span(out.slot, dim, begin, size))


@rule("pad", "constant_pad_nd")
def pad(call: Signature) -> Iterator[Link]:
    """Filling is the same all along, cropping is not read. Other modes copy neighbours: rigid."""
    x, out = call["self"], call.out
    widths = call["pad"]
    constant = call.get("mode", "constant") == "constant"
    for dim in range(x.ndim):
        k = 2 * (x.ndim - 1 - dim)
        before, after = widths[k : k + 2] if k < len(widths) else (0, 0)
        if before == after == 0:
            yield from alike((x, dim), (out, dim))
        elif constant:
            start, length = max(0, -before), x.shape[dim] + min(0, before) + min(0, after)
            place = max(0, before)
            yield from together(Span(x.slot, dim, start, length), Span(out.slot, dim, place, length))
            yield from _unread(x, dim, start, length)
            yield from _unread(out, dim, place, length)


@rule("pad_sequence")
def pad_sequence(call: Signature) -> Iterator[Link]:
    """Lengths l0 <= l1 <= ...: up to l0 all move together, from there to l1 all but the first, ..."""
    out, sequences = call.out, call["sequences"]
    if call.get("padding_side", "right") != "right":
        return
    time = 1 if call["batch_first"] else 0
    start = 0
    for end in sorted({x.shape[0] for x in sequences}):
        spans = [Span(x.slot, 0, start, end - start) for x in sequences if x.shape[0] >= end]
        yield from together(*spans, Span(out.slot, time, start, end - start))
        start = end
    for d in range(1, sequences[0].ndim):
        yield from alike(*((x, d) for x in sequences), (out, d + 1))


# --- selecting by tensors -----------------------------------------------------------------------------------


@rule("index.Tensor")
def index(call: Signature) -> Iterator[Link]:
    """x[:, i, j]: the index tensors move with the dims that they make, the other dims along."""
    x, out = call["self"], call.out
    indexed = [d for d, i in enumerate(call["indices"]) if i is not None]
    tensors = [call["indices"][d] for d in indexed]
    if any(i.dtype not in (torch.int64, torch.int32) for i in tensors):
        raise Unreadable("the size of a selection by a mask is known at run time only")
    adjacent = indexed == list(range(indexed[0], indexed[-1] + 1))
    first = indexed[0] if adjacent else 0
    made = max(i.ndim for i in tensors)
    for k in range(made):
        ends = [(i, k - made + i.ndim) for i in tensors if k - made + i.ndim >= 0]
        yield from alike(*ends, (out, first + k))
    rest = [d for d in range(x.ndim) if d not in indexed]
    for place, d in enumerate(rest):
        yield from alike((x, d), (out, place if place < first else place + made))


@rule("index_select")
def index_select(call: Signature) -> Iterator[Link]:
    x, out = call["self"], call.out
    dim = x.at(call["dim"])
    yield from _others([x, out], dim)
    if call["index"].ndim == 1:
        yield from alike((call["index"], 0), (out, dim))


@rule("gather")
def gather(call: Signature) -> Iterator[Link]:
    x, places, out = call["self"], call["index"], call.out
    dim = x.at(call["dim"])
    for d in range(x.ndim):
        if d == dim:
            yield from alike((places, d), (out, d))
        elif x.shape[d] == places.shape[d]:
            yield from alike((x, d), (places, d), (out, d))


@rule("meshgrid", "meshgrid.indexing")
def meshgrid(call: Signature) -> Iterator[Link]:
    """Tensor k varies along dim k of every output ("xy" exchanges the first two)."""
    for k, x in enumerate(call["tensors"]):
        dim = 1 - k if call.get("indexing") == "xy" and k < 2 and len(call["tensors"]) > 1 else k
        if x.ndim == 1:
            yield from alike((x, 0), *((out, dim) for out in call.outs))
