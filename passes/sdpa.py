"""The one attention node of a raised graph, read and written with all its arguments by name."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx
from torch.fx import Node

from .nodes import emit, shape

SDPA = torch.ops.aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class Sdpa:
    """softmax(scale * query @ key^T + mask) @ value; a boolean mask keeps what is True."""

    query: Node
    key: Node
    value: Node
    mask: Node | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None  # None: head_dim ** -0.5
    enable_gqa: bool = False  # fewer key than query heads; query head h reads key head h // (heads / kv_heads)

    @property
    def resolved_scale(self) -> float:
        return shape(self.query)[-1] ** -0.5 if self.scale is None else float(self.scale)


def read_sdpa(node: Node) -> Sdpa:
    names = [argument.name for argument in SDPA._schema.arguments]
    given = dict(zip(names, node.args)) | dict(node.kwargs)
    given["mask"] = given.pop("attn_mask", None)
    return Sdpa(**given)


def emit_sdpa(graph: fx.Graph, attention: Sdpa, like: Node) -> Node:
    """The node at the graph's insertion point, in one spelling: the first six arguments by position."""
    a = attention
    args = (a.query, a.key, a.value, a.mask, a.dropout_p, a.is_causal)
    return emit(graph, SDPA, *args, like=like, scale=a.scale, enable_gqa=a.enable_gqa)
