"""Quantised weights: tensor subclasses (torchao's, say) that know by themselves how a linear map multiplies them.

No export takes them. But all that a graph does with such a weight is `linear(x, weight, bias)`, so an ordinary tensor
of the same shape stands in for it while the graph is read, and no pass cuts, copies or gathers from it. The programs
call the linear map as Dynamo's graph does, and get the weight itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .nodes import aten

_ENTER = torch.amp.autocast_mode._enter_autocast


def stand_ins(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """The inputs of Dynamo's graph, with a fake tensor of its shape and dtype for each quantised weight.

    Raises TypeError where a quantised tensor is anything but the weight of a linear map, or autocast would cast it.
    """
    replaced = list(inputs)
    for position, node in enumerate(n for n in gm.graph.nodes if n.op == "placeholder"):
        value = inputs[position]
        if is_traceable_wrapper_subclass(value):
            _check_uses(gm, node, value)
            mode = detect_fake_mode(list(inputs)) or FakeTensorMode()
            with mode:
                replaced[position] = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    return replaced


def mark_quantised(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Notes in `meta["quantised"]` of the canonical graph's placeholders what `inputs` really are."""
    for node, value in zip((n for n in gm.graph.nodes if n.op == "placeholder"), inputs):
        if is_traceable_wrapper_subclass(value):
            node.meta["quantised"] = type(value).__name__


def call_quantised(graph: fx.Graph) -> None:
    """In place: aten.linear -> F.linear where the weight is quantised; the subclass overrides the latter."""
    for node in graph.nodes:
        if node.target is aten.linear.default and "quantised" in node.args[1].meta:
            node.target = F.linear


def _check_uses(gm: fx.GraphModule, weight: fx.Node, value: torch.Tensor) -> None:
    name = type(value).__name__
    for user in weight.users:
        others = [*user.args[:1], *user.args[2:], *user.kwargs.values()]
        if user.target is not F.linear or len(user.args) < 2 or user.args[1] is not weight or weight in others:
            raise TypeError(f"{name} is no weight of a linear map here, but an input of {user.target}")
    if any(node.target is _ENTER for node in gm.graph.nodes) or torch.is_autocast_enabled(value.device.type):
        raise TypeError(f"{name} under autocast")
