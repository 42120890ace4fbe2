"""explain(): what the backend would do with a model, found by running it as it is."""

from __future__ import annotations

import os
import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from .budget import footprint
from .capture import Capture, attention_nodes, count_attention, describe, graph_breaks, wrapped_layers
from .config import Config
from .passes.flops import graph_flops
from .passes.graphs import only_computes
from .passes.lower import Treatment, kept_state, lift_state, site_caches
from .passes.permute_tokens import Gather, PermutationPlan
from .passes.sites import Declined
from .passes.token_order import patch_size
from .plan import Analysis, Plan, analyse, make_plan
from .printing import write_kernels
from .ranks import ranks_of
from .report import GatherReport, GraphReport, PermutationReport, Report, SiteReport


def explain(
    model: torch.nn.Module,
    *args,
    options: Mapping[str, Any] | None = None,
    kernels_dir: str | os.PathLike | None = None,
    **kwargs,
) -> Report:
    """Runs `model(*args, **kwargs)` twice (as Dynamo captures it, and as it is), without gradients and without
    compiling it, and reports what `torch.compile(model, backend="chipmunk", options=options)` would do.

    model: any module, compiled or not. kernels_dir: a folder into which the sources of its kernels are written.
    Raises OptionError for bad options, and whatever the model raises.
    """
    config = Config.from_options(options)
    model = getattr(model, "_orig_mod", model)
    found: list[tuple[Analysis, Plan | None]] = []
    grids: list[tuple] = []
    seen: list[int] = []

    def collect(gm: fx.GraphModule, inputs: Sequence[Any]):
        seen.append(attention_nodes(gm))
        analysis = analyse(gm, inputs, config)
        plan = None
        if analysis.reason is None:
            grids.append(analysis.grids(inputs))
            plan = make_plan(analysis, grids[-1], config)
        found.append((analysis, plan))
        return gm.forward

    # A code object of its own: what Dynamo caches for it must not count against the user's compiled model.
    call = types.FunctionType(_call.__code__.replace(co_name=f"explain_{id(found)}"), globals())
    before = graph_breaks()
    with torch.no_grad():
        torch.compile(call, backend=collect, dynamic=False)(model.forward, args, kwargs)
        breaks = describe(graph_breaks() - before)
        calls = count_attention(lambda: model.forward(*args, **kwargs))
    capture = Capture(calls, sum(seen), breaks, 0 if any(plan for _, plan in found) else wrapped_layers(model))
    sites = [site for analysis, plan in found for site in _sites(analysis, plan)]
    lifted = [tensor for _, p in found if p for tensor in (*lift_state(p.treatments), *kept_state(p.canonical))]
    state = sum(tensor.bytes for tensor in lifted)
    graphs = tuple(graph_report(analysis, plan) for analysis, plan in found)
    if kernels_dir is not None:
        write_kernels([plan for _, plan in found if plan], kernels_dir)
    permutation = _permutation(found, grids, config)
    host = sum(site.host_bytes for site in sites)
    rings = [footprint(p.treatments, p.movable, p.canonical).ring for _, p in found if p and p.hosted]
    return Report(type(model).__name__, config, tuple(sites), graphs, state, permutation, capture, host, sum(rings))


def _call(function, args, kwargs):
    return function(*args, **kwargs)


def _permutation(found, grids: list[tuple], config: Config) -> PermutationReport:
    """Of the first graph that has sites: what comes behind a graph break is rare, and alike."""
    plans = [analysis.permutation for analysis, plan in found if plan is not None]
    if not plans:
        return PermutationReport()
    (plan, *_), (first, *_) = plans, grids
    if not isinstance(plan, PermutationPlan):
        return PermutationReport(reason=plan.reason, detail=plan.detail)
    known = tuple(grid for run in first if run for grid in run)
    gathers = tuple(_gather(gather, plan) for gather in plan.gathers)
    patch = patch_size(known[0], config.attention.chunk) if known else ()
    walls = tuple(dict.fromkeys(wall.name for wall in plan.walls))
    return PermutationReport(config.order, known, patch, gathers, plan.bytes, walls)


def _gather(gather: Gather, plan: PermutationPlan) -> GatherReport:
    shape = tuple(gather.value.meta["val"].shape)
    return GatherReport(gather.name, shape, plan.direction(gather), gather.bytes, gather.fixed)


def _sites(analysis: Analysis, plan: Plan | None) -> list[SiteReport]:
    treatments = plan.treatments if plan is not None else ()
    state = [0] * len(treatments)
    for tensor in lift_state(treatments):
        if tensor.scope != "table":
            state[int(tensor.name.rpartition("_")[2])] += tensor.bytes
    hosted = plan.hosted if plan is not None else ()
    moved = [sum(t.bytes for t in site_caches(n, s)) if n in hosted else 0 for n, s in enumerate(treatments)]
    taken = [_accelerated(t, held, host) for t, held, host in zip(treatments, state, moved)]
    return taken + [_declined(d) for d in (*analysis.declined, *(plan.declined if plan is not None else ()))]


def _accelerated(treatment: Treatment, state_bytes: int, host_bytes: int) -> SiteReport:
    site = treatment.site
    names = ("batch", "heads", "q_len", "kv_len", "head_dim") if site.kind == "attention" else (
        "batch", "tokens", "in_features", "hidden", "out_features")  # fmt: skip
    shapes = {name: getattr(site, name) for name in names}
    detail = {"columns": treatment.kept, "of": treatment.columns}
    work = treatment.dense_flops, treatment.delta_flops
    return SiteReport(site.kind, site.name, True, None, detail, shapes, *work, state_bytes, host_bytes)


def _declined(declined: Declined) -> SiteReport:
    return SiteReport(declined.kind, declined.name, False, declined.reason, declined.detail, {})


def graph_report(analysis: Analysis, plan: Plan | None) -> GraphReport:
    nodes = len(analysis.canonical.graph.nodes) if analysis.canonical else 0
    dense = graph_flops(analysis.canonical) if analysis.canonical else 0
    saved = sum(t.dense_flops - t.delta_flops for t in plan.treatments) if plan is not None else 0
    more = sum(t.refresh_flops - t.dense_flops for t in plan.treatments) if plan is not None else 0
    return GraphReport(
        nodes=nodes,
        clock=bool(analysis.inputs.timesteps),
        reason=analysis.reason,
        detail=analysis.detail,
        dense_flops=dense,
        delta_flops=dense - saved,
        refresh_flops=dense + more,
        ranks=ranks_of(analysis.canonical).count if analysis.canonical else 1,
        computes=analysis.reason is None and only_computes(analysis.canonical),
        has_layers=analysis.layers > 0,
        is_piece=bool(analysis.moving),
    )
