"""nn.TransformerEncoderLayer in eval mode arrives as one fused operation; here it is written out again."""

from __future__ import annotations

import torch
from torch import fx
from torch.fx import Node

from .nodes import aten, dtype, emit, emit_reshape, is_static, shape, substitute
from .sdpa import Sdpa, emit_sdpa

_FUSED = aten._transformer_encoder_layer_fwd.default
_KEY_MASK = 1  # [batch, keys]; the other kinds have queries and keys last


def split_encoder_layers(gm: fx.GraphModule) -> fx.GraphModule:
    """_transformer_encoder_layer_fwd -> layer_norm, linear, scaled_dot_product_attention, gelu or relu; in place."""
    for node in list(gm.graph.nodes):
        if node.target is not _FUSED or len(shape(node)) != 3 or not is_static(node):
            continue
        names = [argument.name for argument in _FUSED._schema.arguments]
        layer = dict.fromkeys(names) | dict(zip(names, node.args)) | dict(node.kwargs)
        with gm.graph.inserting_before(node):
            substitute(node, _layer(gm.graph, node, layer))
    return gm


def _layer(graph: fx.Graph, node: Node, layer: dict) -> Node:
    def call(target, *args, **kwargs) -> Node:
        return emit(graph, target, *args, like=node, **kwargs)

    def norm(x: Node, number: int) -> Node:
        weights = layer[f"norm_weight_{number}"], layer[f"norm_bias_{number}"]
        return call(aten.layer_norm.default, x, [layer["embed_dim"]], *weights, layer["eps"])

    def attend(x: Node) -> Node:
        batch, tokens, dim = shape(x)
        heads = layer["num_heads"]
        qkv = call(aten.linear.default, x, layer["qkv_weight"], layer["qkv_bias"])
        qkv = call(aten.view.default, qkv, [batch, tokens, 3, heads, dim // heads])
        qkv = call(aten.permute.default, qkv, [2, 0, 3, 1, 4])
        query, key, value = (call(aten.select.int, qkv, 0, i) for i in range(3))
        out = emit_sdpa(graph, Sdpa(query, key, value, keep(batch, tokens)), like=node)
        out = emit_reshape(graph, call(aten.permute.default, out, [0, 2, 1, 3]), (batch, tokens, dim))
        return call(aten.linear.default, out, layer["proj_weight"], layer["proj_bias"])

    def keep(batch: int, tokens: int) -> Node | None:
        mask = layer["mask"]  # the fused operation reads any mask as boolean: True leaves a key out
        if mask is None:
            return None
        if dtype(mask) != torch.bool:
            mask = call(aten._to_copy.default, mask, dtype=torch.bool)
        size = (batch, 1, 1, tokens) if layer["mask_type"] == _KEY_MASK else (1,) * (4 - len(shape(mask))) + shape(mask)
        return emit_reshape(graph, call(aten.logical_not.default, mask), size)

    def feed_forward(x: Node) -> Node:
        hidden = call(aten.linear.default, x, layer["ffn_weight_1"], layer["ffn_bias_1"])
        hidden = call(aten.gelu.default if layer["use_gelu"] else aten.relu.default, hidden)
        return call(aten.linear.default, hidden, layer["ffn_weight_2"], layer["ffn_bias_2"])

    x = layer["src"]
    if layer["norm_first"]:
        x = call(aten.add.Tensor, x, attend(norm(x, 1)))
        return call(aten.add.Tensor, x, feed_forward(norm(x, 2)))
    x = norm(call(aten.add.Tensor, x, attend(x)), 1)
    return norm(call(aten.add.Tensor, x, feed_forward(x)), 2)
