"""Shared by the tests of attention: toy inputs, and a function run through raise_attention and checked."""

from __future__ import annotations

import torch
from torch import nn

from chipmunk_compile.passes.origin_labels import Origins
from chipmunk_compile.passes.origins import constant_run, is_constant, size_of
from chipmunk_compile.passes.raise_attention import raise_attention
from chipmunk_compile.passes.sdpa import SDPA, read_sdpa
from tests.record import Recorded, record, tensors

BATCH, HEADS, Q_LEN, KV_LEN, DIM = 3, 4, 17, 13, 8
SCALE = DIM**-0.5


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def randn(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def qkv(dtype=torch.float64, batch=BATCH):
    return [randn(batch, HEADS, n, DIM, dtype=dtype) for n in (Q_LEN, KV_LEN, KV_LEN)]


def keep(*shape):
    """A random boolean mask in which no row is empty."""
    mask = torch.rand(shape) > 0.3
    mask[..., 0] = True
    return mask


def raised(function, *args, count=1, tolerance=1e-12):
    """Runs `function` through raise_attention; checks its output and the number of attention nodes; returns them."""
    model = function if isinstance(function, nn.Module) else Call(function)
    with torch.no_grad():
        expected = tensors(model(*args))
    out, runs = record(model, *args, passes=(raise_attention,))
    assert len(runs) == 1
    nodes = [n for n in runs[0].gm.graph.nodes if n.target is SDPA]
    assert len(nodes) == count
    for a, b in zip(out, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    for node in runs[0].gm.graph.nodes:
        value = runs[0].values.get(node)
        if isinstance(value, torch.Tensor):
            assert (value.shape, value.dtype) == (node.meta["val"].shape, node.meta["val"].dtype), node
    if count == 1:
        assert "softmax" not in runs[0].after and "matmul" not in runs[0].after and "bmm" not in runs[0].after
    return [read_sdpa(n) for n in nodes]


def untouched(function, *args):
    """As `raised`, but nothing may change at all."""
    model = function if isinstance(function, nn.Module) else Call(function)
    _, (run,) = record(model, *args, passes=(raise_attention,))
    assert run.after == run.before


def shape(node):
    return tuple(node.meta["val"].shape)


def check_constancy(recorded: Recorded) -> int:
    """What the labels say does not change along an axis really does not, for every value of the run.

    Up to rounding (a convolution rounds equal columns differently). Returns how many labels say so.
    """
    origins, claims = Origins(), 0
    for node, value in recorded.values.items():
        if not isinstance(value, torch.Tensor) or not value.numel():
            continue
        for dim, label in enumerate(origins.of(node)):
            length = size_of(label) if is_constant(label) else constant_run(label)
            if length > 1:
                claims += 1
                groups = torch.nan_to_num(value.movedim(dim, 0)).unflatten(0, (-1, length))
                same = torch.isclose(groups, groups[:, :1], rtol=1e-5, atol=1e-6)
                assert same.all(), (node, dim)
    return claims
