"""What the matchers return: places in a canonical graph where a sparse delta can stand.

A match is data. Matching never rewrites; `passes.lower` consumes these.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node

from .reasons import Reason


@dataclass(frozen=True)
class Projection:
    """One linear map of a graph: `weight` is [out_features, in_features], `bias` [out_features] or None.

    Both are nodes: placeholders, or views (slices) of placeholders where a fused linear was split.
    """

    weight: Node
    bias: Node | None


@dataclass(frozen=True)
class AttentionSite:
    """softmax(scale * query @ key^T + key_mask) @ value, over the token axis."""

    node: Node  # the aten.scaled_dot_product_attention node, [batch, heads, q_len, head_dim]
    name: str  # module path, e.g. "transformer_blocks.3.attn"
    query: Node  # [batch, heads, q_len, head_dim]
    key: Node  # [batch, kv_heads, kv_len, head_dim]
    value: Node  # [batch, kv_heads, kv_len, head_dim]
    key_mask: Node | None  # [batch or 1, 1, 1, kv_len], bool (True = attend) or additive float
    scale: float
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int

    kind = "attention"


@dataclass(frozen=True)
class MlpSite:
    """down(region(up[0](x), up[1](x), ...)) over tokens; the region is pointwise."""

    node: Node  # the last node of the MLP: the down linear, its bias included
    name: str
    input: Node  # x, [..., tokens, in_features]
    up: tuple[Projection, ...]  # each [hidden, in_features]
    down: Projection  # [out_features, hidden]
    region: str  # an expression over h0, h1, ... (kernels/expression.py), one h per `up`
    batch: int  # product of the leading dimensions of x
    tokens: int
    in_features: int
    hidden: int
    out_features: int

    kind = "mlp"


@dataclass(frozen=True)
class Declined:
    """A candidate that stays dense, and the numbers that decided."""

    kind: str  # "attention" | "mlp" | "graph"
    name: str
    reason: Reason
    detail: dict[str, object] = field(default_factory=dict)
