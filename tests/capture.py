"""Shared by the tests: the canonical graphs of a module, as the backend sees them."""

from __future__ import annotations

import torch

from chipmunk_compile.passes.canonical import canonicalise


def capture(model: torch.nn.Module, *args, **kwargs) -> list[torch.fx.GraphModule]:
    """Runs `model` once without gradients; returns one canonical graph for each graph that Dynamo made."""
    graphs = []

    def backend(gm, inputs, **_):
        graphs.append(canonicalise(gm, inputs))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(*args, **kwargs)
    torch._dynamo.reset()
    return graphs
