"""Finds the inputs that could be the timestep: what reaches a sin/cos pair through pointwise arithmetic."""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten

# Ops that a timestep embedding does before its sin and cos, besides pointwise ones.
_SHAPE_OPS = {
    aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim,
    aten.expand.default, aten.flatten.using_ints, aten.unflatten.int, aten.select.int, aten.slice.Tensor,
    aten._to_copy.default, aten.to.dtype, aten.outer.default, aten.contiguous.default, aten.clone.default,
    aten.permute.default, aten.transpose.int, aten.repeat.default, aten.matmul.default, aten.mm.default,
    aten.cat.default,
}  # fmt: skip
# A timestep per token of a long video is still one; a table of token coordinates is not.
_MOST_NUMBERS = 1 << 18


def find_timesteps(gm: fx.GraphModule, candidates: set[int]) -> list[int]:
    """Positions, among the placeholders, of inputs that may carry the timestep, the likeliest kind alone.

        t -> mul -> unsqueeze -> mul(frequencies) -> sin
                                                  -> cos

    candidates: positions that are neither parameters nor module tensors. Guidance reaches sin and cos too: which of
    the found inputs moves is known at run time only. Scalars and [batch] inputs win over those
    per frame or token, [batch, n] or [batch, 1, n].
    """
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    position = {node: i for i, node in enumerate(placeholders) if i in candidates}
    reached = {aten.sin.default: set(), aten.cos.default: set()}
    for node in gm.graph.nodes:
        if node.target in reached:
            reached[node.target] |= {position[s] for s in _sources(node.args[0]) if s in position}
    found = set.intersection(*reached.values())
    by_rank: dict[int, list[int]] = {}
    for i in sorted(found):
        value = placeholders[i].meta["val"]
        if not isinstance(value, torch.Tensor):
            by_rank.setdefault(0, []).append(i)
        elif value.dim() <= 3 and value.numel() <= _MOST_NUMBERS:
            wide = value.numel() > value.shape[0] if value.dim() > 1 else False
            by_rank.setdefault(value.dim() if wide else 1, []).append(i)
    return by_rank[min(by_rank)] if by_rank else []


def _sources(node: fx.Node) -> set[fx.Node]:
    """The placeholders that `node` is computed from by pointwise and shape operations alone."""
    sources, seen, stack = set(), set(), [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "placeholder":
            sources.add(current)
        elif current.op == "call_function" and _passes_through(current.target):
            stack.extend(current.all_input_nodes)
    return sources


def _passes_through(target) -> bool:
    return target in _SHAPE_OPS or torch.Tag.pointwise in getattr(target, "tags", ())
