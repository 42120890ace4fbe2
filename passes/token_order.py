"""In which order tokens of a grid (frames, height, width) are best chunked, and how long the chunks are.

Tokens of one chunk share their columns, so a chunk should be a small box of neighbours: a patch of an image,
a voxel of a video. Grids divide into boxes as evenly as they can; where they do not divide, boxes are ragged
and their chunks shorter, so that no chunk ever straddles two boxes.
"""

from __future__ import annotations

import functools
from math import ceil

import torch

Grid = tuple[int, int, int]  # frames, height, width: positions in row-major order


def token_order(grid: Grid, chunk: int = 64, kind: str = "patch") -> tuple[torch.Tensor, tuple[int, ...]]:
    """(order, lengths): the new place i holds the token that was at order[i] (int64 [tokens]); `lengths` are
    the chunks in the new order, each at most `chunk` tokens, and sum to the number of tokens.

    kind: "patch" (boxes, the default), "hilbert" (equal chunks along a Hilbert curve) or "raster" (the order
    as it is).
    Raises ValueError for another kind, an empty grid or a chunk below one.
    """
    if len(grid) != 3 or min(grid) < 1 or chunk < 1:
        raise ValueError(f"no token order for the grid {grid} in chunks of {chunk}: all sizes must be at least 1")
    if kind == "patch":
        return _patches(grid, patch_size(grid, chunk))
    tokens = grid[0] * grid[1] * grid[2]
    if kind == "hilbert":
        return _hilbert(grid), chunk_lengths(tokens, chunk)
    if kind == "raster":
        return torch.arange(tokens), chunk_lengths(tokens, chunk)
    raise ValueError(f"unknown kind of token order {kind!r}: use 'patch', 'hilbert' or 'raster'")


def chunk_lengths(tokens: int, chunk: int) -> tuple[int, ...]:
    """Chunks of a sequence that has no grid: all of `chunk` tokens but the last."""
    return (chunk,) * (tokens // chunk) + ((tokens % chunk,) if tokens % chunk else ())


@functools.lru_cache(maxsize=256)
def patch_size(grid: Grid, chunk: int) -> Grid:
    """The box of at most `chunk` tokens that cuts `grid` into few and compact chunks.

    It minimises (number of chunks) x (square root of the distance within one). Chunks are what attention pays
    for, whether full or not, and distance is what column recall pays for: [8, 8] for a large image and [4, 4,
    4] for a video that divides by 4, but [3, 5, 4] for a 21 x 45 x 80 one, where 4 x 4 x 4 would make 14%
    more chunks.
    """
    best, best_cost = grid, float("inf")
    frames, height, width = grid
    for t in range(1, min(frames, chunk) + 1):
        for h in range(1, min(height, chunk // t) + 1):
            for w in range(1, min(width, chunk // (t * h)) + 1):
                count = ceil(frames / t) * ceil(height / h) * ceil(width / w)
                cost = count * max(1, t * t + h * h + w * w - 3) ** 0.25
                if (cost, -w, -h) < (best_cost, -best[2], -best[1]):
                    best, best_cost = (t, h, w), cost
    return best


def _patches(grid: Grid, patch: Grid) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Box after box as an ox ploughs, row-major inside each; sides along an axis differ by one at most.

    So the next box always touches the last, where two are joined to a longer chunk.
    """
    counts = [ceil(size / side) for size, side in zip(grid, patch)]
    frame, row, column = torch.meshgrid(
        *(torch.arange(size) * count // size for size, count in zip(grid, counts)), indexing="ij"
    )
    row = frame * counts[1] + torch.where(frame % 2 == 0, row, counts[1] - 1 - row)
    column = torch.where(row % 2 == 0, column, counts[2] - 1 - column)
    box = (row * counts[2] + column).flatten()
    return box.argsort(stable=True), tuple(box.bincount().tolist())


def _hilbert(grid: Grid) -> torch.Tensor:
    """Tokens along the Hilbert curve of the smallest enclosing cube (Skilling, "Programming the Hilbert
    curve", 2004).

    The curve's place of a position is worked out from its coordinates bit by bit, over all positions at once.
    """
    axes = [k for k in range(3) if grid[k] > 1]
    position = torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")
    x = [position[k].flatten() for k in axes]
    bits = max(1, (max(grid) - 1).bit_length())
    for level in range(bits - 1, 0, -1):  # undo the rotations of each octant, coarse to fine
        low = (1 << level) - 1
        for k in range(len(x)):
            inside = (x[k] >> level & 1).bool()
            swap = torch.where(inside, 0, (x[0] ^ x[k]) & low)
            x[0] = torch.where(inside, x[0] ^ low, x[0] ^ swap)
            if k:
                x[k] = x[k] ^ swap
    for k in range(1, len(x)):  # from Gray code to binary
        x[k] = x[k] ^ x[k - 1]
    if x:
        flip = torch.zeros_like(x[0])
        for level in range(bits - 1, 0, -1):
            flip ^= (x[-1] >> level & 1) * ((1 << level) - 1)
        x = [coordinate ^ flip for coordinate in x]
    place = torch.zeros(grid[0] * grid[1] * grid[2], dtype=torch.int64)
    for level in range(bits - 1, -1, -1):
        for coordinate in x:
            place = place << 1 | coordinate >> level & 1
    return place.argsort()


def share_of(grid: Grid, ranks: int) -> Grid | None:
    """The box that each of `ranks` equal runs of a grid's tokens is; None where they are no boxes, or unlike ones."""
    frames, rows, columns = grid
    if frames % ranks == 0:
        return frames // ranks, rows, columns
    parts, rest = divmod(ranks, frames)  # of each frame
    return (1, rows // parts, columns) if not rest and rows % parts == 0 else None


def grids_from_ids(ids: torch.Tensor) -> tuple[Grid, ...] | None:
    """Reads the grids off position ids: [tokens, axes] or [batch, tokens, axes], the fastest axis last.

    Returns one (frames, height, width) for each image or video in the sequence (an image editor's reference
    lies behind the image), or None when the ids do not enumerate grids: all equal, a line of text, or another
    order. Copies `ids` to the host, which waits for the device.
    """
    if ids.ndim == 3:
        if ids.shape[0] > 1 and not torch.equal(ids[:1].expand_as(ids), ids):
            return None
        ids = ids[0]
    if ids.ndim != 2 or ids.shape[0] < 2:
        return None
    ids = ids.detach().to("cpu", torch.float64)
    varying = (ids != ids[0]).any(0)
    if varying.sum() < 2:
        return None
    slow, fast = ids[:, varying][:, :-1], ids[:, varying][:, -1]
    breaks = (slow[1:] != slow[:-1]).any(1) | (fast[1:] <= fast[:-1])
    starts = [0, *(breaks.nonzero().flatten() + 1).tolist(), len(ids)]
    grids = _grids(ids[:, varying], starts)
    return grids if all(sum(size > 1 for size in grid) >= 2 for grid in grids) else None


def _grids(ids: torch.Tensor, starts: list[int]) -> tuple[Grid, ...]:
    """Joins rows of equal columns into planes, and planes of equal rows into volumes."""
    rows = [(ids[a, :-1].tolist(), ids[a:b, -1].tolist()) for a, b in zip(starts, starts[1:])]
    planes: list[tuple[list[float], list[float], list[float]]] = []  # (slower axes, heights, columns)
    for slow, columns in rows:
        *slower, height = slow
        if planes and planes[-1][0] == slower and planes[-1][2] == columns and planes[-1][1][-1] < height:
            planes[-1][1].append(height)
        else:
            planes.append((slower, [height], columns))
    volumes: list[list] = []  # [planes, last slower axes, (heights, columns)]
    for slower, heights, columns in planes:
        if volumes and volumes[-1][2] == (heights, columns) and _steps(volumes[-1][1], slower):
            volumes[-1][0] += 1
            volumes[-1][1] = slower
        else:
            volumes.append([1, slower, (heights, columns)])
    return tuple((count, len(heights), len(columns)) for count, _, (heights, columns) in volumes)


def _steps(before: list[float], after: list[float]) -> bool:
    """Whether only the last of the slower axes moves on."""
    return bool(after) and before[:-1] == after[:-1] and before[-1] < after[-1]
