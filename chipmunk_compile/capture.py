"""What Dynamo captured of a model, against what the model calls: attention in no graph cannot be accelerated."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx
from torch.overrides import TorchFunctionMode

# Functions that compute one attention each; torch's own modules reach the last three.
ATTENTION = (
    F.scaled_dot_product_attention,
    F.multi_head_attention_forward,
    torch._native_multi_head_attention,
    torch._transformer_encoder_layer_fwd,
)


@dataclass(frozen=True)
class GraphBreak:
    """A place at which Dynamo ended a graph. `hint` is Dynamo's own advice, often a setting."""

    what: str
    hint: str


@dataclass(frozen=True)
class Capture:
    """How much of a forward reached the backend."""

    attention_calls: int  # of the model run as it is
    attention_seen: int  # in captured graphs
    breaks: tuple[GraphBreak, ...]
    wrapped: int = 0  # layers with a forward of their own, where nothing is accelerated

    def lines(self) -> list[str]:
        """Nothing where all was captured."""
        if self.attention_seen >= self.attention_calls and not self.breaks:
            return []
        lines = [f"Dynamo captured {self.attention_seen} of {self.attention_calls} attention calls"]
        if self.wrapped:
            lines.append(f"hooks wrap {self.wrapped} single layers (offloading and casting do that): graphs end there")
            lines.append("  -> offload or cast whole models, or whole blocks")
        for broken in self.breaks:
            lines.append(f"graph break: {broken.what}")
            lines += [f"  -> {broken.hint}"] if broken.hint else []
        return lines


class _Counting(TorchFunctionMode):
    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += func in ATTENTION
        return func(*args, **(kwargs or {}))


def count_attention(call: Callable[[], object]) -> int:
    """How many attentions `call` computes."""
    with _Counting() as counting:
        call()
    return counting.calls


def wrapped_layers(model: torch.nn.Module) -> int:
    """How many layers (modules with weights and without modules) have a forward of their own, from a hook."""
    layers = (
        m for m in model.modules() if next(m.parameters(), None) is not None and not any(True for _ in m.children())
    )
    return sum("forward" in vars(layer) for layer in layers)


def attention_nodes(gm: fx.GraphModule) -> int:
    """How many attentions a graph of Dynamo's computes."""
    return sum(node.op == "call_function" and node.target in ATTENTION for node in gm.graph.nodes)


def graph_breaks() -> Counter[str]:
    """Dynamo's count of graph breaks until now, by its description."""
    from torch._dynamo.utils import counters

    return Counter(counters["graph_break"])


def describe(breaks: Counter[str]) -> tuple[GraphBreak, ...]:
    """Graph breaks as a person wants to read them. Dynamo counts one of them in several frames: once is enough."""
    found = []
    for text in breaks:
        hint = re.search(r"^\s*Hint: (.+)$", text, re.MULTILINE)
        found.append(GraphBreak(text.splitlines()[0], hint.group(1) if hint else ""))
    return tuple(dict.fromkeys(found))
