"""Orders of a grid: permutations, in chunks that are small boxes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chipmunk_compile.passes.token_order import chunk_lengths, grids_from_ids, patch_size, token_order

SIZES = st.integers(1, 13)


def positions(grid):
    """[tokens, 3], row-major."""
    return torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), -1).flatten(0, 2)


@settings(max_examples=200, deadline=None)
@given(st.tuples(SIZES, SIZES, SIZES), st.integers(1, 70), st.sampled_from(["patch", "hilbert", "raster"]))
def test_every_order_is_a_permutation_in_chunks(grid, chunk, kind):
    order, lengths = token_order(grid, chunk, kind)
    tokens = grid[0] * grid[1] * grid[2]
    assert torch.equal(order.sort().values, torch.arange(tokens)) and order.dtype == torch.int64
    assert sum(lengths) == tokens and min(lengths) > 0 and max(lengths) <= chunk


@settings(max_examples=100, deadline=None)
@given(st.tuples(SIZES, SIZES, SIZES), st.integers(1, 70))
def test_a_chunk_of_patches_is_a_full_box(grid, chunk):
    order, lengths = token_order(grid, chunk)
    for part in positions(grid)[order].split(lengths):
        assert len(part) == (part.max(0).values - part.min(0).values + 1).prod()


def test_patches_of_images_and_voxels_of_videos():
    assert patch_size((1, 64, 64), 64) == (1, 8, 8)
    assert patch_size((1, 48, 80), 64) == (1, 8, 8)
    assert patch_size((1, 64, 64), 128) == (1, 8, 16)
    assert patch_size((16, 32, 32), 64) == (4, 4, 4)
    assert patch_size((21, 45, 80), 64) == (3, 5, 4)
    assert token_order((1, 64, 64), 64)[1] == (64,) * 64
    assert token_order((1, 16, 16), 64)[0][:10].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 16, 17]


def test_boxes_that_do_not_divide_differ_by_one_along_each_axis():
    _, lengths = token_order((1, 45, 80), 64)  # 45 = 8 + 8 + 8 + 7 + 7 + 7
    assert set(lengths) == {64, 56} and len(lengths) == 60


@settings(max_examples=100, deadline=None)
@given(st.tuples(SIZES, SIZES, SIZES), st.integers(1, 70))
def test_the_next_box_touches_the_last(grid, chunk):
    order, lengths = token_order(grid, chunk)
    boxes = positions(grid)[order].split(lengths)
    for box, after in zip(boxes, boxes[1:]):
        apart = torch.maximum(after.amin(0) - box.amax(0), box.amin(0) - after.amax(0)).clamp_min(0)
        assert apart.sum() == 1  # along one axis, by one step


@pytest.mark.parametrize("grid", [(1, 8, 8), (4, 4, 4), (8, 8, 8), (1, 16, 16)])
def test_the_hilbert_curve_steps_to_a_neighbour(grid):
    order, _ = token_order(grid, 8, "hilbert")
    steps = positions(grid)[order].diff(dim=0).abs().sum(1)
    assert steps.max() == 1 and steps.min() == 1


def test_chunks_of_a_line():
    assert chunk_lengths(130, 64) == (64, 64, 2) and chunk_lengths(128, 64) == (64, 64) and chunk_lengths(5, 64) == (5,)


@pytest.mark.parametrize(
    "bad", [((0, 1, 1), 64, "patch"), ((1, 2, 2), 0, "patch"), ((1, 2, 2), 4, "spiral"), ((2, 2), 4, "patch")]
)
def test_impossible_orders_are_refused(bad):
    with pytest.raises(ValueError):
        token_order(*bad)


# --- ids ----------------------------------------------------------------------------------------------------


def ids_of(grid, axes=3, first=0):
    ids = torch.zeros(grid[0] * grid[1] * grid[2], axes)
    ids[:, :3] = positions(grid)
    ids[:, 0] += first
    return ids


@pytest.mark.parametrize("grid", [(1, 6, 10), (1, 64, 64), (5, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_grids_are_read_off_ids(grid, dtype):
    assert grids_from_ids(ids_of(grid).to(dtype)) == (grid,)
    assert grids_from_ids(ids_of(grid, axes=4).to(dtype).expand(3, -1, -1)) == (grid,)


def test_a_reference_image_lies_behind_the_image():
    both = torch.cat([ids_of((1, 6, 10)), ids_of((1, 4, 8), first=1)])
    assert grids_from_ids(both) == ((1, 6, 10), (1, 4, 8))
    same = torch.cat([ids_of((1, 6, 10)), ids_of((1, 6, 10), first=10)])
    assert grids_from_ids(same) == ((2, 6, 10),)  # two pictures of one size are two frames


def test_scaled_and_centred_ids_are_grids_too():
    assert grids_from_ids(ids_of((1, 6, 10)) * 0.5 - 3) == ((1, 6, 10),)


@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(512, 3),
        torch.arange(512.0)[:, None].expand(-1, 3),
        torch.stack([torch.zeros(9), torch.zeros(9), torch.arange(9.0)], 1),
        torch.randn(60, 3),
        ids_of((1, 6, 10))[torch.randperm(60, generator=torch.Generator().manual_seed(0))],
        torch.stack([ids_of((1, 6, 10)), ids_of((1, 10, 6))]),
        torch.zeros(60),
    ],
    ids=["text", "diagonal", "line", "noise", "shuffled", "different in the batch", "no axes"],
)
def test_what_is_no_grid(ids):
    assert grids_from_ids(ids) is None
