"""The sources of the kernels that a model's programs run, for people to read."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from .kernels import cuda, native_build
from .kernels.launch import rehearsal
from .passes.lower import StateTensor, lower
from .plan import Plan


def write_kernels(plans: Sequence[Plan], folder: str | Path) -> tuple[Path, ...]:
    """Writes into `folder`, which is made if it is not there, one file for each kernel; returns them.

    On a GPU these are the printed Triton kernels, on a CPU the C++ ones of float32. What runs in plain torch, for want
    of Triton, say, has no file. Nothing is compiled or run.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written: dict[Path, None] = {}
    for plan in plans:
        values = [t.site.node.meta["val"] for t in plan.treatments]
        if all(v.device.type == "cuda" for v in values):
            for source in triton_sources(plan):
                written[Path(shutil.copy(source, folder))] = None
        elif all(v.device.type == "cpu" and v.dtype == torch.float32 for v in values):
            for name, text in _native_sources(plan).items():
                (folder / name).write_text(text)
                written[folder / name] = None
    return tuple(written)


def _native_sources(plan: Plan) -> dict[str, str]:
    """File names and texts: one for attention, one for each activation of an MLP."""
    regions = dict.fromkeys(getattr(t.site, "region", None) for t in plan.treatments)
    return {f"{_name(region)}.cpp": native_build.source(region) for region in regions}


def _name(region: str | None) -> str:
    return "attention" if region is None else "mlp_" + re.sub(r"\W+", "_", region).strip("_")[:80]


def triton_sources(plan: Plan) -> tuple[Path, ...]:
    """Where the kernels of a plan's refresh and delta programs were printed, in the order of their launches."""
    found: dict[Path, None] = {}
    for program in ("refresh", "delta"):
        graph = lower(plan.canonical, plan.treatments, program)
        # The graph's own fake tensors may be of several modes.
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            inputs = [_like(n) for n in graph.graph.nodes if n.op == "placeholder"]
            rehearsing = _Rehearsal(graph)
            rehearsing.run(*inputs)
        found.update(dict.fromkeys(rehearsing.sources))
    return tuple(found)


class _Rehearsal(fx.Interpreter):
    """Runs a program on fake tensors, and the sparse ops up to their launches."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.sources: list[Path] = []

    def call_function(self, target, args, kwargs):
        if getattr(target, "namespace", None) == "chipmunk":
            with rehearsal() as sources:
                getattr(cuda, target.name().partition("::")[2])(*args)
            self.sources += sources
        return super().call_function(target, args, kwargs)


def _like(node: fx.Node):
    """A fake tensor like the one that a placeholder stands for; whatever else it stands for, as it is."""
    value: StateTensor | torch.Tensor = node.meta.get("lifted", node.meta.get("val"))
    if not isinstance(value, (StateTensor, torch.Tensor)):
        return value
    stride = value.stride if isinstance(value, StateTensor) else value.stride()
    return torch.empty_strided(value.shape, stride, dtype=value.dtype, device=value.device)
