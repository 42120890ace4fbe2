"""What runs along each axis of a value: which positions of which sequences. The algebra; rules are in origin_rules.

An axis carries a *label*: segments, one behind the other (text | image), each with the set of *tracks* that its
values depend on, position by position. A track is a product of root axes, outer to inner, so that a view which merges
(frames, height, width) into tokens and one which splits them again cancel exactly. With labels two questions
become comparisons: do queries and keys stand for the same tokens, and does a value not change along an axis at all.

    x [2, 45, 32] -> label of dim 1: ((45, {(root x.1)}),)
    cat(text, image) -> ((7, {(root text.1)}), (45, {(root image.1)}))
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Axis:
    """A root axis. Two values whose axes have equal `Axis` run over the same positions in the same order.

    `key` is what makes it this one and no other. Keys nest (a view of a view), so the hash is taken once.
    """

    __slots__ = ("_hash", "key", "kind", "size")

    def __init__(self, kind: str, key: tuple, size: int) -> None:
        self.kind, self.key, self.size = kind, key, size
        self._hash = hash((kind, key, size))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Axis)
            and self._hash == other._hash
            and (self.kind, self.size, self.key) == (other.kind, other.size, other.key)
        )


# kind "constant": the value does not change along it. "feature": it changes, and its positions have no identity
# (channels of a projection, a table computed from arange). "outer"/"inner": the parts of an axis that a view split.
# "bundle": a label of several segments, or a part of a track, merged with other axes by a view. Others are roots.
Track = tuple[Axis, ...]


class Entry(NamedTuple):
    """Positions start, start + 1, ... of a track."""

    track: Track
    start: int
    projected: bool  # a learned map of features lies between the root and here: activations, not a position table


class Segment(NamedTuple):
    size: int
    entries: frozenset[Entry]


Label = tuple[Segment, ...]

MOST_SEGMENTS = 64  # beyond: the axis becomes a root of its own
MOST_ENTRIES = 256


def root(kind: str, key: tuple, size: int, projected: bool = False) -> Label:
    """The label of an axis whose positions are those of nothing seen before."""
    if size == 1:
        return constant(1)
    return (Segment(size, frozenset([Entry((Axis(kind, key, size),), 0, projected)])),)


def constant(size: int) -> Label:
    """The label of an axis along which the value does not change."""
    return (Segment(size, frozenset([Entry((Axis("constant", (), size),), 0, False)])),)


def feature(size: int) -> Label:
    """The label of an axis along which the value changes, nothing else known."""
    return root("feature", (), size)


def size_of(label: Label) -> int:
    return sum(segment.size for segment in label)


def is_constant(label: Label) -> bool:
    """True only if the value provably is the same at every position."""
    return len(label) == 1 and all(e.track[0].kind == "constant" and len(e.track) == 1 for e in label[0].entries)


def constant_run(label: Label) -> int:
    """The largest r such that positions 0..r-1, r..2r-1, ... provably hold one value each (1: nothing proven)."""
    if len(label) != 1:
        return 1
    runs = [t[-1].size if (t := e.track)[-1].kind == "constant" and e.start == 0 else 1 for e in label[0].entries]
    return math.gcd(*runs)


def feature_run(label: Label) -> int:
    """How many innermost positions are channels of a projection, which a view has merged with what lies outside."""
    if len(label) != 1 or not all(_is_whole(entry, label[0].size) for entry in label[0].entries):
        return 1
    runs = {e.track[-1].size if e.track[-1].kind == "feature" else 1 for e in label[0].entries}
    return runs.pop() if len(runs) == 1 else 1


def projected(label: Label) -> Label:
    """The label behind a learned map of the features."""
    return tuple(Segment(s.size, frozenset(e._replace(projected=True) for e in s.entries)) for s in label)


def has_identity(entry: Entry) -> bool:
    return all(axis.kind not in ("constant", "feature") for axis in entry.track)


# --- cutting and joining ----------------------------------------------------------------------------------------


def cut(label: Label, start: int, size: int) -> Label:
    """Positions start .. start + size - 1."""
    segments, position = [], 0
    for segment in label:
        low, high = max(start, position), min(start + size, position + segment.size)
        if low < high:
            segments.append(_cut_segment(segment, low - position, high - low))
        position += segment.size
    return tuple(segments)


def _cut_segment(segment: Segment, start: int, size: int) -> Segment:
    if size == segment.size:
        return segment
    entries = set()
    for entry in segment.entries:
        if all(axis.kind in ("constant", "feature") for axis in entry.track):
            kind = "constant" if is_constant((Segment(segment.size, frozenset([entry])),)) else "feature"
            entries.add(Entry((Axis(kind, (), size),), 0, entry.projected))
        else:
            entries.add(entry._replace(start=entry.start + start))
    return Segment(size, frozenset(entries))


def concatenate(labels: Iterable[Label]) -> Label:
    """One label behind the other; neighbours that continue each other become one segment again."""
    segments: list[Segment] = []
    for segment in (s for label in labels for s in label if s.size):
        merged = _continues(segments[-1], segment) if segments else None
        if merged is None:
            segments.append(segment)
        else:
            segments[-1] = merged
    return tuple(segments)


def _continues(first: Segment, second: Segment) -> Segment | None:
    size = first.size + second.size
    if any(e.track[0].kind == "constant" for e in (*first.entries, *second.entries)):
        return None  # two values that do not change are not one value
    merged = {_without_size(e, size) or e for e in first.entries}
    following = {_without_size(e, size) or e._replace(start=e.start - first.size) for e in second.entries}
    return Segment(size, frozenset(merged)) if merged == following else None


def _without_size(entry: Entry, size: int) -> Entry | None:
    """A feature axis has no identity, so a longer one is the same thing."""
    if all(axis.kind == "feature" for axis in entry.track):
        return Entry((Axis("feature", (), size),), 0, entry.projected)
    return None


def union(labels: Sequence[Label]) -> Label:
    """The label of f(a, b, ...) taken position by position; all of one size."""
    labels = [label for label in labels if not is_constant(label)] or list(labels[:1])
    if all(label == labels[0] for label in labels):
        return labels[0]
    ends = sorted({end for label in labels for end in _ends(label)})
    segments, start = [], 0
    for end in ends:
        parts = [cut(label, start, end - start)[0].entries for label in labels]
        varying = [e for e in parts if not is_constant((Segment(end - start, e),))] or parts[:1]
        segments.append((Segment(end - start, frozenset().union(*varying)),))
        start = end
    return concatenate(segments)


def pinned(labels: Sequence[Label], left: Iterable[Label]) -> list[Label]:
    """The labels of what remains where an axis is gone, but for one position of it: `left`, of size one each.

    Tokens of frame 0 and of frame 1 are not the same tokens. Channels pin nothing: queries and keys may be packed.
    """
    pins = tuple(label for label in left if _is_sequence(label))
    if not pins:
        return list(labels)
    return [
        root("at", (label, pins), size_of(label), any(e.projected for segment in label for e in segment.entries))
        if _is_sequence(label)
        else label
        for label in labels
    ]


def _is_sequence(label: Label) -> bool:
    """Positions with identity, and not channels that only met a weight's."""
    entries = [entry for segment in label for entry in segment.entries]
    known = [entry for entry in entries if has_identity(entry)]
    channels = any(axis.kind == "feature" for entry in entries for axis in entry.track)
    return any(entry.projected for entry in known) or bool(known and not channels)


def _ends(label: Label) -> list[int]:
    ends, position = [], 0
    for segment in label:
        position += segment.size
        ends.append(position)
    return ends


def too_large(label: Label) -> bool:
    return len(label) > MOST_SEGMENTS or any(len(segment.entries) > MOST_ENTRIES for segment in label)


# --- views ------------------------------------------------------------------------------------------------------


def regroup(labels: Sequence[Label], sizes: Sequence[int], new_sizes: Sequence[int]) -> list[Label]:
    """The labels after a view from `sizes` to `new_sizes`. Axes of size one pin the others and are gone."""
    left = [label for label, size in zip(labels, sizes) if size == 1]
    result: list[Label] = []
    for old, new in _groups(sizes, new_sizes):
        kept = [labels[i] for i in old if sizes[i] != 1]
        split = [new_sizes[i] for i in new if new_sizes[i] != 1]
        parts = iter(_regroup_one(kept, split))
        result += [constant(1) if new_sizes[i] == 1 else next(parts) for i in new]
    return pinned(result, left)


def _groups(sizes: Sequence[int], new_sizes: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of dimensions that have as many elements before as after."""
    groups, i, j = [], 0, 0
    while i < len(sizes) or j < len(new_sizes):
        old, new = [i] if i < len(sizes) else [], [j] if j < len(new_sizes) else []
        before, after = math.prod(sizes[k] for k in old), math.prod(new_sizes[k] for k in new)
        i, j = i + len(old), j + len(new)
        while before != after:
            if (before < after or j == len(new_sizes)) and i < len(sizes):
                before *= sizes[i]
                old.append(i)
                i += 1
            else:
                after *= new_sizes[j]
                new.append(j)
                j += 1
        groups.append((old, new))
    return groups


def _regroup_one(labels: list[Label], sizes: list[int]) -> list[Label]:
    if len(labels) == len(sizes) == 1:
        return labels
    merged = _merge(labels)
    parts: list[set[Entry]] = [set() for _ in sizes]
    for entry in merged:
        tracks = _factor(entry.track, sizes)
        if tracks is None:  # sizes that do not divide: positions are those of the whole arrangement
            key = (frozenset(merged), tuple(sizes))
            flag = any(e.projected for e in merged)
            return [root("view", (*key, i), size, flag) for i, size in enumerate(sizes)]
        for part, track in zip(parts, tracks):
            part.add(Entry(track, 0, entry.projected))
    return [_unbundle(Segment(size, _varying(part))) for size, part in zip(sizes, parts)]


def _merge(labels: list[Label]) -> list[Entry]:
    """The entries of the axis that a view makes of several, outermost first."""
    merged = [Entry((), 0, False)]
    for label in labels:
        size = size_of(label)
        entries: Iterable[Entry] = [
            e if _is_whole(e, size) else _bundle((Segment(size, frozenset([e])),)) for e in label[0].entries
        ]
        if len(label) > 1:
            entries = [_bundle(label)]
        merged = [Entry(_joined(a.track, b.track), 0, a.projected or b.projected) for a in merged for b in entries]
        if len(merged) > MOST_ENTRIES:
            whole = math.prod(axis.size for axis in merged[0].track)
            merged = [Entry((Axis("bundle", (frozenset(merged),), whole),), 0, any(e.projected for e in merged))]
    return merged


def _bundle(label: Label) -> Entry:
    """One entry that stands for what cannot be factored: several segments, a part of a track."""
    flag = any(e.projected for segment in label for e in segment.entries)
    return Entry((Axis("bundle", (label,), size_of(label)),), 0, flag)


def _is_whole(entry: Entry, size: int) -> bool:
    return entry.start == 0 and math.prod(axis.size for axis in entry.track) == size


def _joined(outer: Track, inner: Track) -> Track:
    """The product of two tracks; parts that a view split come together again."""
    track = list(outer)
    for axis in inner:
        while track:
            last = track[-1]
            if last.kind == axis.kind and axis.kind in ("constant", "feature"):
                axis = Axis(axis.kind, (), last.size * axis.size)
            elif last.kind == "outer" and axis.kind == "inner" and last.key == axis.key:
                axis = axis.key[0]
            else:
                break
            track.pop()
        track.append(axis)
    return tuple(track)


def _factor(track: Track, sizes: Sequence[int]) -> list[Track] | None:
    """The track as a product of tracks of these sizes; None where a factor would straddle two of them."""
    left, factors = list(track), []
    for size in sizes:
        factor: Track = ()
        while size > 1:
            axis = left.pop(0)
            if size % axis.size == 0:
                size //= axis.size
            elif axis.size % size == 0:
                axis, rest = _split(axis, size)
                left.insert(0, rest)
                size = 1
            else:
                return None
            factor = _joined(factor, (axis,))
        factors.append(factor)
    return factors


def _split(axis: Axis, outer: int) -> tuple[Axis, Axis]:
    inner = axis.size // outer
    if axis.kind in ("constant", "feature"):
        return Axis(axis.kind, (), outer), Axis(axis.kind, (), inner)
    return Axis("outer", (axis, inner), outer), Axis("inner", (axis, inner), inner)


def _varying(entries: set[Entry]) -> frozenset[Entry]:
    varying = {e for e in entries if not all(axis.kind == "constant" for axis in e.track)}
    return frozenset(varying or entries)


def _unbundle(segment: Segment) -> Label:
    """A bundle that stands alone again is the label it was made of."""
    if len(segment.entries) == 1:
        (entry,) = segment.entries
        label = _bundled(entry)
        if label is not None:
            return projected(label) if entry.projected else label
    entries: set[Entry] = set()
    for entry in segment.entries:
        label = _bundled(entry)
        if label is None or len(label) > 1:
            entries.add(entry)
        else:
            entries |= (projected(label) if entry.projected else label)[0].entries
    return (Segment(segment.size, frozenset(entries)),)


def _bundled(entry: Entry) -> Label | None:
    axis = entry.track[0]
    if len(entry.track) == 1 and axis.kind == "bundle" and not isinstance(axis.key[0], frozenset):
        return axis.key[0]
    return None
