"""Shared by the pass tests: a module run through its canonical graphs, with the value of every node kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from chipmunk_compile.passes.canonical import canonicalise


@dataclass
class Recorded:
    """One graph: `before` counts its canonical ops, `gm` is what passes made, `values` the last run."""

    before: Counter
    gm: fx.GraphModule
    values: dict[fx.Node, object]

    @property
    def after(self) -> Counter:
        return count(self.gm)


def count(gm: fx.GraphModule) -> Counter:
    """How often each op is called, by its overload packet's name: {"linear": 2, "cat": 1, ...}."""
    calls = (n.target for n in gm.graph.nodes if n.op == "call_function")
    return Counter(getattr(t, "_overloadpacket", t).__name__ for t in calls)


def record(model, *args, passes: tuple[Callable, ...] = (), **kwargs) -> tuple[list[torch.Tensor], list[Recorded]]:
    """The output tensors of `model`, run by its canonical graphs behind `passes`, and those graphs."""
    runs: list[Recorded] = []

    def backend(gm, inputs, **_):
        canonical = canonicalise(gm, inputs)
        run = Recorded(count(canonical), canonical, {})
        for transform in passes:
            run.gm = transform(run.gm)
        runs.append(run)

        def call(*real):
            interpreter = fx.Interpreter(run.gm, garbage_collect_values=False)
            output = interpreter.run(*real)
            run.values = interpreter.env
            return output

        return call

    torch._dynamo.reset()
    with torch.no_grad():
        output = torch.compile(model, backend=backend)(*args, **kwargs)
    torch._dynamo.reset()
    return tensors(output), runs


def tensors(output) -> list[torch.Tensor]:
    """What a model returned, flat; diffusers' output classes included."""
    output = output.to_tuple() if hasattr(output, "to_tuple") else output
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
