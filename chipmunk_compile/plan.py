"""What the passes found in one captured graph, and the plan for running it: how sparse, in which token order."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import fx

from . import budget, telemetry
from .config import Config, OptionError
from .kernels.ops import column_step, why_slow
from .passes import PASSES
from .passes.attention_sites import find_attention
from .passes.canonical import canonicalise
from .passes.collectives import collectives, exchanged, groups, is_exchange, is_sharded, knows_groups
from .passes.collector import collector_paused
from .passes.graphs import keep_outputs, only_computes, outputs_from
from .passes.lift_numbers import lift_numbers
from .passes.lower import Treatment, dense_copy
from .passes.mlp_sites import find_mlps
from .passes.permute_tokens import (
    PermutationPlan,
    index_inputs,
    permute_tokens,
    plan_permutation,
    run_order,
    site_chunks,
)
from .passes.permuted_sites import permuted_sites
from .passes.quantised import mark_quantised, stand_ins
from .passes.reasons import Reason
from .passes.sites import AttentionSite, Declined, MlpSite
from .passes.timestep import find_timesteps
from .passes.token_axis import TokenAxes, analyse_tokens
from .passes.token_order import Grid, chunk_lengths, grids_from_ids, share_of
from .ranks import can_agree

log = logging.getLogger(__name__)
# What is said of tokens whose grid is not found, or not that of the option.
_NO_GRIDS = (Reason.NO_GRID, Reason.AMBIGUOUS_GRID, Reason.GRID_MISMATCH)


@dataclass(frozen=True)
class Inputs:
    """What the inputs of a graph are, by position."""

    parameters: tuple[int, ...]  # name the owner
    user: tuple[int, ...]  # tensors that the caller passed, timestep left out: identity names the stream
    timesteps: tuple[int, ...] = ()  # one or more candidates; those that never move do no harm
    latents: frozenset[int] = frozenset()  # positions among `user` that have an output's shape


@dataclass(frozen=True)
class Analysis:
    """What the passes found in one captured graph. `reason`: why the whole graph stays dense, where it does."""

    inputs: Inputs
    canonical: fx.GraphModule | None = None  # tokens permuted, where they are
    sites: tuple[AttentionSite | MlpSite, ...] = ()
    declined: tuple[Declined, ...] = ()
    permutation: PermutationPlan | Declined | None = None
    axes: TokenAxes | None = field(default=None, repr=False)
    layers: int = 0  # self-attentions over tokens, those that are switched off too; MLPs where there are none
    moving: tuple[bool, ...] = ()  # outputs that come from those, by position; none where a step may not go without
    still: fx.GraphModule | None = None  # computes the others, if there are any, from the inputs of the graph
    reason: Reason | None = None
    detail: str = ""

    @property
    def reads_grid(self) -> bool:
        """Whether the token order depends on what an input holds."""
        runs = self.permutation.runs if isinstance(self.permutation, PermutationPlan) else ()
        return any(run.ids is not None and not run.grids for run in runs)

    def grids(self, args: Sequence[Any]) -> tuple[tuple[Grid, ...] | None, ...]:
        """The grids of each permuted run for the inputs `args`; None where they do not say. May wait for the device."""
        if not isinstance(self.permutation, PermutationPlan):
            return ()
        placeholders = [n for n in self.canonical.graph.nodes if n.op == "placeholder"]
        found = []
        for run in self.permutation.runs:
            grids = run.grids or None
            if grids is None and run.ids is not None:
                ids = args[placeholders.index(run.ids)]
                if not isinstance(ids, torch._subclasses.FakeTensor):
                    grids = grids_from_ids(ids[..., run.ids_start : run.ids_start + run.length, :])
            found.append(grids)
        return tuple(found)


@dataclass(frozen=True)
class Plan:
    """How one graph runs, for one token order."""

    canonical: fx.GraphModule
    treatments: tuple[Treatment, ...]
    orders: tuple[torch.Tensor, ...]  # the permuted graph's last inputs, int64
    order: int = 0  # names the order of tokens; 0 where they are as they come
    movable: tuple[int, ...] = ()  # numbers of treatments whose caches may lie in host memory, in graph order
    hosted: frozenset[int] = frozenset()  # those that do, where streams come as foreseen
    declined: tuple[Declined, ...] = ()  # sites that the memory budget leaves dense


@collector_paused()
def analyse(gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config) -> Analysis:
    """All passes up to the sites and the token order, without compiling anything.

    Raises OptionError for a grid that no attention of the graph has.
    """
    inputs = _classify(gm, example_inputs)
    if sharded := sum(map(is_sharded, example_inputs)):
        return Analysis(inputs, reason=Reason.SHARDED_WEIGHTS, detail=f"({sharded} inputs)")
    if not knows_groups(gm) or (groups(gm) and not can_agree()):
        return Analysis(inputs, reason=Reason.RANKS_APART)
    try:
        canonical = canonicalise(lift_numbers(gm)[0], stand_ins(gm, example_inputs))
    except Exception as error:  # whatever the export cannot take, Inductor may
        detail = f"({type(error).__name__}: {str(error).splitlines()[0][:200]})"
        return Analysis(inputs, reason=Reason.NO_CANONICAL_FORM, detail=detail)
    mark_quantised(canonical, example_inputs)
    _trace("canonical", canonical)
    if _mutates_shared_storage(canonical, example_inputs):
        return Analysis(inputs, canonical, reason=Reason.ALIASED_MUTATION)
    for rewrite in PASSES:
        canonical = rewrite(canonical)
        _trace(rewrite.__name__, canonical)
    attention, no_attention = find_attention(canonical, min_tokens=config.min_tokens)
    mlps, no_mlps = find_mlps(canonical, min_tokens=config.min_tokens)
    inputs = _with_timesteps(inputs, canonical, example_inputs)
    layers = len(attention or mlps)
    moving = outputs_from(canonical, [site.node for site in attention or mlps])
    moving = moving if any(moving) and only_computes(canonical, moving) else ()
    still = None
    if moving and not all(moving):
        still = keep_outputs(dense_copy(canonical)[0], [not moves for moves in moving])
    # A block compiled by itself does not know how many came before it: its callable counts (runner.py).
    first = config.dense_layers if inputs.timesteps or layers > config.dense_layers else 0
    sites, leading = _without_leading(canonical, attention, mlps, first)
    sites, switched_off = _switch(sites, config)
    declined = (*no_attention, *no_mlps, *leading, *switched_off)
    is_model = bool(inputs.timesteps and inputs.latents)  # what embeds the time for other graphs is none
    if not sites and not ((is_model or moving) and config.forecasts):  # forecasts need no site
        return Analysis(inputs, canonical, declined=declined, reason=Reason.NO_SITES)
    if not inputs.parameters:
        return Analysis(inputs, canonical, declined=declined, reason=Reason.NO_OWNER)
    axes = analyse_tokens(canonical)
    permutation = _permute(canonical, sites, axes, inputs, config)
    sites = permuted_sites(sites)
    return Analysis(inputs, canonical, tuple(sites), declined, permutation, axes, layers, moving, still)


def make_plan(analysis: Analysis, grids: Sequence[tuple[Grid, ...] | None], config: Config) -> Plan:
    """The plan for the token order that `grids` (of `Analysis.grids`) ask for."""
    permutation = analysis.permutation if isinstance(analysis.permutation, PermutationPlan) else None
    tile = config.attention.chunk if config.attention.sparsity is not None else config.mlp.chunk
    orders, lengths, indices = [], [], []
    if permutation is not None:
        for run, its_grids in zip(permutation.runs, grids):
            order, its_lengths = run_order(run, its_grids, tile, config.order)
            orders.append(order)
            lengths.append(its_lengths)
        indices = index_inputs(permutation, orders)
    treatments = []
    for site in analysis.sites:
        options = config.attention if site.kind == "attention" else config.mlp
        device = site.node.meta["val"].device
        if _takes_equal_chunks(site.kind, device):
            chunks = chunk_lengths(site.tokens, options.chunk)
        else:
            fitted = [_fit(run_lengths, options.chunk) for run_lengths in lengths]
            chunks = site_chunks(analysis.axes, site, options.chunk, permutation, fitted)
        columns = site.kv_len if site.kind == "attention" else site.hidden
        treatments.append(Treatment(site, _kept(columns, options.sparsity, device), options.samples, chunks))
    name = _name_of(orders, permutation, analysis.canonical)
    fit = budget.fit(treatments, analysis.canonical, config)
    return Plan(analysis.canonical, fit.treatments, tuple(indices), name, fit.movable, fit.hosted, fit.declined)


def _name_of(orders: Sequence[torch.Tensor], permutation: PermutationPlan | None, canonical: fx.GraphModule) -> int:
    """Equal for equal orders, begun and ended at the same places of equal graphs; 48 bits."""
    if all(torch.equal(order, torch.arange(len(order))) for order in orders):
        return 0
    place = {node: i for i, node in enumerate(canonical.graph.nodes)}
    gathers = [(place.get(g.value), g.steps, [*map(place.get, g.users)]) for g in permutation.gathers]
    digest = hashlib.sha256(repr(gathers).encode())
    for order in orders:
        digest.update(order.numpy().tobytes())
    return int.from_bytes(digest.digest()[:6], "big") or 1


def _permute(canonical, sites, axes: TokenAxes, inputs: Inputs, config: Config) -> PermutationPlan | Declined:
    if config.order == "raster":
        return Declined("permutation", "", Reason.DISABLED_BY_OPTION, {"option": "order"})
    placeholders = [n for n in canonical.graph.nodes if n.op == "placeholder"]
    fixed = [node for i, node in enumerate(placeholders) if i not in (*inputs.user, *inputs.timesteps)]
    ranks = max((exchanged(node) for node in collectives(canonical) if is_exchange(node)), default=1)
    grid = share_of(config.grid, ranks) if config.grid is not None else None
    if grid is None and config.grid is not None:
        return Declined("permutation", "", Reason.SPREAD_TOKENS, {"grid": config.grid, "ranks": ranks})
    plan = plan_permutation(canonical, sites, axes=axes, grid=grid, fixed=fixed)
    if isinstance(plan, Declined):
        if plan.reason in _NO_GRIDS and next(collectives(canonical), None) is not None:
            return Declined("permutation", "", Reason.SPREAD_TOKENS, {"ranks": ranks})
        if plan.reason is Reason.GRID_MISMATCH:
            tokens = ", ".join(map(str, plan.detail["tokens"]))
            raise OptionError(
                f"grid={config.grid} makes {prod(config.grid)} tokens; the model's attention runs over {tokens} tokens "
                "(image and text together): give the frames, rows and columns of the image tokens, or no grid"
            )
        return plan
    permute_tokens(canonical, plan)
    _trace("permute_tokens", canonical)
    return plan


def _without_leading(canonical: fx.GraphModule, attention, mlps, layers: int) -> tuple[list, list[Declined]]:
    """Sites behind the first `layers` layers, and those of them. An MLP belongs to the attention before it."""
    sites = [*attention, *mlps]
    if not layers:
        return sites, []
    position = {node: i for i, node in enumerate(canonical.graph.nodes)}
    begins = sorted(position[site.node] for site in attention or mlps)
    first = begins[layers] if layers < len(begins) else len(position)
    why = {"option": "dense_layers", "layers": layers}
    declined = [Declined(s.kind, s.name, Reason.DISABLED_BY_OPTION, why) for s in sites if position[s.node] < first]
    return [site for site in sites if position[site.node] >= first], declined


def _switch(sites, config: Config) -> tuple[list[AttentionSite | MlpSite], list[Declined]]:
    """Sites whose kind the options leave on and the device has kernels for, and the others."""
    on, off = [], []
    for site in sites:
        options = config.attention if site.kind == "attention" else config.mlp
        if options.sparsity is None:
            off.append(Declined(site.kind, site.name, Reason.DISABLED_BY_OPTION, {"option": f"{site.kind}.sparsity"}))
        elif why := why_slow(site.node.meta["val"].dtype, site.node.meta["val"].device):
            off.append(Declined(site.kind, site.name, Reason.NO_KERNELS, {"why": why}))
        else:
            on.append(site)
    return on, off


def _takes_equal_chunks(kind: str, device: torch.device) -> bool:
    """Whether the chunks of a site run across patches, and from text to image.

    Those of an MLP on a GPU do: its kernels move 16 bytes at a time where chunks begin at multiples of 8 tokens, as
    behind 226 tokens of text, or in boxes of 7x3x6, they never would.
    """
    return kind == "mlp" and device.type == "cuda"


def _kept(columns: int, sparsity: float, device: torch.device) -> int:
    """Columns that a delta computes: none at sparsity 1 alone, and no fewer than the kernels compute anyway."""
    step = column_step(device)
    return 0 if sparsity == 1.0 else min(columns, -(-max(1, round((1.0 - sparsity) * columns)) // step) * step)


def _fit(lengths: Sequence[int], chunk: int) -> tuple[int, ...]:
    """Patches as chunks of at most `chunk` tokens: larger ones cut, neighbours joined as long as they fit."""
    fitted: list[int] = []
    for length in (part for whole in lengths for part in chunk_lengths(whole, chunk)):
        if fitted and fitted[-1] + length <= chunk:
            fitted[-1] += length
        else:
            fitted.append(length)
    assert not lengths or [*accumulate(fitted)][-1] == sum(lengths)
    return tuple(fitted)


def _classify(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Inputs:
    """Which inputs are parameters, and which the caller passed; what a module holds besides is neither."""
    parameters, user = [], []
    for i, node in enumerate(n for n in gm.graph.nodes if n.op == "placeholder"):
        value = example_inputs[i]
        if isinstance(value, torch.nn.Parameter):
            parameters.append(i)
        elif isinstance(value, torch.Tensor) and not is_held_by_module(node):
            user.append(i)
    return Inputs(tuple(parameters), tuple(user))


def _with_timesteps(inputs: Inputs, canonical: fx.GraphModule, example_inputs: Sequence[Any]) -> Inputs:
    timesteps = find_timesteps(canonical, set(inputs.user))
    user = [i for i in inputs.user if i not in timesteps]
    latents = [p for p, i in enumerate(user) if _has_shape_of_an_output(canonical, example_inputs[i])]
    # A graph that ends at a graph break returns more, the text too: then nothing is known.
    alone = len(latents) == len(next(iter(reversed(canonical.graph.nodes))).all_input_nodes) == 1
    return Inputs(inputs.parameters, tuple(user), tuple(timesteps), frozenset(latents if alone else ()))


def is_held_by_module(node: fx.Node) -> bool:
    if node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type"):
        return True
    guard_source = getattr(getattr(node, "_dynamo_source", None), "guard_source", None)
    if callable(guard_source):  # a method before torch 2.12
        guard_source = guard_source()
    return guard_source is not None and guard_source.is_unspecialized_nn_module()


def _has_shape_of_an_output(canonical: fx.GraphModule, value: torch.Tensor) -> bool:
    """Whether an input could be the latents: an output's shape, up to the channels (many models take more in)."""
    if not value.is_floating_point() or value.dim() < 3:
        return False

    def alike(shape: torch.Size) -> bool:
        differing = [d for d, (a, b) in enumerate(zip(shape, value.shape)) if a != b]
        return len(shape) == value.dim() and len(differing) <= 1 and (value.dim() > 3 or differing in ([], [2]))

    output = next(iter(reversed(canonical.graph.nodes)))
    return any(
        alike(o.meta["val"].shape) for o in output.all_input_nodes if isinstance(o.meta.get("val"), torch.Tensor)
    )


def _mutates_shared_storage(canonical: fx.GraphModule, example_inputs: Sequence[Any]) -> bool:
    """A functional graph knows no aliasing: a write to one of two overlapping inputs would be lost to the other."""
    placeholders = [n for n in canonical.graph.nodes if n.op == "placeholder"]
    written = {n.args[0] for n in canonical.graph.nodes if n.target is torch.ops.aten.copy_.default}
    if not written:
        return False
    storages = [v.untyped_storage()._cdata if isinstance(v, torch.Tensor) else None for v in example_inputs]
    return any(node in written and storages.count(storage) > 1 for node, storage in zip(placeholders, storages))


def _trace(name: str, gm: fx.GraphModule) -> None:
    telemetry.trace_artifact(name, lambda: gm.print_readable(print_output=False))
