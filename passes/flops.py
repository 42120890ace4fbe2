"""The matrix work of a graph."""

from __future__ import annotations

import math

import torch
from torch import fx

aten = torch.ops.aten


def graph_flops(gm: fx.GraphModule) -> int:
    """Matrix work of one call of a canonical graph, two operations per multiply-add."""
    total = 0
    for node in gm.graph.nodes:
        if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        shape = node.meta["val"].shape
        if node.target is aten.linear.default:
            total += 2 * math.prod(shape) * node.args[1].meta["val"].shape[1]
        elif node.target in (aten.matmul.default, aten.mm.default, aten.bmm.default):
            total += 2 * math.prod(shape) * node.args[0].meta["val"].shape[-1]
        elif node.target in (aten.addmm.default, aten.baddbmm.default):
            total += 2 * math.prod(shape) * node.args[1].meta["val"].shape[-1]
        elif node.target is aten.scaled_dot_product_attention.default:
            query, key = (node.args[i].meta["val"].shape for i in (0, 1))
            total += 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + shape[-1])
        elif node.target in (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default):
            total += 2 * math.prod(shape) * math.prod(node.args[1].meta["val"].shape[1:])
    return total
