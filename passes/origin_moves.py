"""Rules for labels (see origins) of operations that move positions: views, permutations, cuts, concatenations."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from . import origins
from .nodes import aten, dtype, shape
from .origins import Label, concatenate, constant, cut, feature, regroup, root, union

Labels = tuple[Label, ...]
Rule = Callable[[Node, dict[Node, Labels]], Labels | None]


def node_root(node: Node, dim: int, flag: bool = False) -> Label:
    """A new root axis: dimension `dim` of `node`."""
    size = shape(node)[dim]
    return root("node", (node, dim), size if isinstance(size, int) else 0, flag)


def broadcast(node: Node, operands: list[Node], known: dict[Node, Labels]) -> Labels:
    """The label of each dimension of an elementwise function; an operand of size one there does not count."""
    labels = []
    for d, size in enumerate(shape(node)):
        back = d - len(shape(node))
        parts = [known[n][back] for n in operands if len(shape(n)) >= -back and shape(n)[back] == size]
        labels.append(union(parts) if parts else constant(size))
    return tuple(labels)


def _view(node: Node, known: dict[Node, Labels]) -> Labels | None:
    source = node.args[0]
    if dtype(source) != dtype(node) or 0 in shape(source):
        return None
    return tuple(regroup(known[source], shape(source), shape(node)))


def _permute(node: Node, known: dict[Node, Labels]) -> Labels:
    return tuple(known[node.args[0]][d] for d in node.args[1])


def _transpose(node: Node, known: dict[Node, Labels]) -> Labels:
    labels = list(known[node.args[0]])
    if labels and len(labels) > 1:
        a, b = node.args[1:3] if len(node.args) > 2 else (-1, -2)
        labels[a], labels[b] = labels[b], labels[a]
    return tuple(labels)


def _expand(node: Node, known: dict[Node, Labels]) -> Labels:
    return broadcast(node, [node.args[0]], known)


def _repeat(node: Node, known: dict[Node, Labels]) -> Labels:
    source, times = node.args[:2]
    added = len(times) - len(shape(source))
    labels = [constant(1)] * added + list(known[source])
    return tuple(
        constant(origins.size_of(label) * r) if origins.is_constant(label) else concatenate([label] * r)
        for label, r in zip(labels, times)
    )


def _repeat_interleave(node: Node, known: dict[Node, Labels]) -> Labels | None:
    source, times, dim = (*node.args, None)[:3]
    if dim is None or not isinstance(times, int):
        return None
    labels, size = list(known[source]), shape(source)[dim]
    merged = regroup([labels[dim], constant(times)], [size, times], [size * times])
    labels[dim] = merged[0]
    return tuple(labels)


def _cat(node: Node, known: dict[Node, Labels]) -> Labels:
    parts, dim = node.args[0], (*node.args, 0)[1] % len(shape(node))
    parts = [p for p in parts if 0 not in shape(p)]  # what partial RoPE passes through, where it turns all channels
    return tuple(
        concatenate([known[p][d] for p in parts]) if d == dim else union([known[p][d] for p in parts])
        for d in range(len(shape(node)))
    )


def _stack(node: Node, known: dict[Node, Labels]) -> Labels:
    parts, dim = node.args[0], (*node.args, 0)[1] % len(shape(node))
    labels = [union([known[p][d] for p in parts]) for d in range(len(shape(node)) - 1)]
    labels.insert(dim, feature(len(parts)) if len(parts) > 1 else constant(1))
    return tuple(labels)


def _interval(node: Node, first: int, size: int) -> tuple[int, int, int]:
    """(start, end, step) of a slice whose arguments stand from `first` on, as Python counts."""
    start, end, step = (*node.args[first:], *(None, None, 1)[len(node.args) - first :])
    start, end, _ = slice(start, end).indices(size)
    return start, end, step


def _slice(node: Node, known: dict[Node, Labels]) -> Labels:
    source, dim = node.args[0], (*node.args, 0)[1]
    start, end, step = _interval(node, 2, shape(source)[dim])
    labels = list(known[source])
    if step == 1:
        labels[dim] = cut(labels[dim], start, end - start)
    else:
        labels[dim] = _rearranged(node, dim, labels[dim], (start, end, step))
    return tuple(labels)


def _rearranged(node: Node, dim: int, label: Label, key: tuple) -> Label:
    """The same positions in another order, or some of them: equal for equal labels treated equally."""
    size = shape(node)[dim]
    if origins.is_constant(label):
        return constant(size)
    flag = any(entry.projected for segment in label for entry in segment.entries)
    return root("rearranged", (node.target, key, label), size, flag)


def _flip(node: Node, known: dict[Node, Labels]) -> Labels:
    labels = list(known[node.args[0]])
    for dim in node.args[1]:
        labels[dim] = _rearranged(node, dim, labels[dim], ())
    return tuple(labels)


def _roll(node: Node, known: dict[Node, Labels]) -> Labels | None:
    if len(node.args) < 3 or not node.args[2]:
        return None
    labels = list(known[node.args[0]])
    for shift, dim in zip(node.args[1], node.args[2]):
        labels[dim] = _rearranged(node, dim, labels[dim], (shift,))
    return tuple(labels)


def _index_select(node: Node, known: dict[Node, Labels]) -> Labels:
    source, dim, index = node.args
    labels = list(known[source])
    labels[dim] = _rearranged(node, dim, labels[dim], (index,))
    return tuple(labels)


def _index(node: Node, known: dict[Node, Labels]) -> Labels | None:
    source, indices = node.args
    dims = [d for d, index in enumerate(indices) if index is not None]
    if len(dims) != 1 or len(shape(indices[dims[0]])) != 1 or len(shape(node)) != len(shape(source)):
        return None
    labels = list(known[source])
    labels[dims[0]] = _rearranged(node, dims[0], labels[dims[0]], (indices[dims[0]],))
    return tuple(labels)


def _pad(node: Node, known: dict[Node, Labels]) -> Labels | None:
    if len(node.args) > 2 and isinstance(node.args[2], str) and node.args[2] != "constant":
        return None
    labels, pads = list(known[node.args[0]]), node.args[1]
    for i in range(len(pads) // 2):
        before, after = pads[2 * i : 2 * i + 2]
        dim = len(labels) - 1 - i
        size = origins.size_of(labels[dim])
        inner = cut(labels[dim], max(-before, 0), size + min(before, 0) + min(after, 0))
        rims = [constant(n) if n > 0 else () for n in (before, after)]
        if before > 0 or after > 0:
            inner = inner if not origins.is_constant(inner) else feature(origins.size_of(inner))
        labels[dim] = concatenate([rims[0], inner, rims[1]])
    return tuple(_with_roots(node, labels))


def _with_roots(node: Node, labels: list[Label]) -> list[Label]:
    return [
        lb if origins.size_of(lb) == s else node_root(node, d) for d, (lb, s) in enumerate(zip(labels, shape(node)))
    ]


def _select(node: Node, known: dict[Node, Labels]) -> Labels:
    source, dim, index = node.args
    return _selected(known[source], dim, index % shape(source)[dim])


def _selected(labels: Labels, dim: int, index: int) -> Labels:
    rest = list(labels)
    gone = rest.pop(dim)
    return tuple(origins.pinned(rest, [cut(gone, index, 1)]))


def _slice_scatter(node: Node, known: dict[Node, Labels]) -> Labels:
    base, source, dim = (*node.args, 0)[:3]
    size = shape(base)
    dim %= len(size)
    start, end, step = _interval(node, 3, size[dim])
    labels = [union([known[base][d], known[source][d]]) if d != dim else known[base][d] for d in range(len(size))]
    if step == 1:
        whole = known[base][dim]
        labels[dim] = concatenate([cut(whole, 0, start), known[source][dim], cut(whole, end, size[dim] - end)])
    else:
        labels[dim] = node_root(node, dim)
    return tuple(labels)


def _select_scatter(node: Node, known: dict[Node, Labels]) -> Labels:
    base, source, dim = node.args[:3]
    dim %= len(shape(base))
    rest = list(known[source])
    rest.insert(dim, known[base][dim])
    labels = [union([a, b]) for a, b in zip(known[base], rest)]
    labels[dim] = union([labels[dim], feature(shape(base)[dim])])
    return tuple(labels)


def getitem(node: Node, known: dict[Node, Labels]) -> Labels | None:
    source, index = node.args
    packet = getattr(source.target, "overloadpacket", None)
    if packet not in (aten.split, aten.split_with_sizes, aten.chunk, aten.unbind):
        return None
    value = source.args[0]
    dim = (*source.args, 0)[1] if packet is aten.unbind else (*source.args, 0)[2]
    if packet is aten.unbind:
        return _selected(known[value], dim, index)
    labels = list(known[value])
    start = sum(v.shape[dim] for v in source.meta["val"][:index])
    labels[dim] = cut(labels[dim], start, shape(node)[dim])
    return tuple(labels)


def _view_as_complex(node: Node, known: dict[Node, Labels]) -> Labels:
    return known[node.args[0]][:-1]


def _view_as_real(node: Node, known: dict[Node, Labels]) -> Labels:
    return (*known[node.args[0]], feature(2))


MOVES: dict[object, Rule] = {
    packet: rule
    for rule, packets in {
        _view: (
            aten.view, aten._unsafe_view, aten.reshape, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze,
        ),
        _permute: (aten.permute,),
        _transpose: (aten.transpose, aten.t, aten.mT),
        _expand: (aten.expand, aten.expand_as),
        _repeat: (aten.repeat,),
        _repeat_interleave: (aten.repeat_interleave,),
        _cat: (aten.cat,),
        _stack: (aten.stack,),
        _slice: (aten.slice,),
        _flip: (aten.flip,),
        _roll: (aten.roll,),
        _index_select: (aten.index_select,),
        _index: (aten.index,),
        _pad: (aten.constant_pad_nd, aten.pad),
        _select: (aten.select,),
        _slice_scatter: (aten.slice_scatter,),
        _select_scatter: (aten.select_scatter,),
        _view_as_complex: (aten.view_as_complex,),
        _view_as_real: (aten.view_as_real,),
    }.items()
    for packet in packets
}  # fmt: skip
