"""Reorders tokens once on the way into a graph and once on the way out, so that a chunk of them is a patch.

    q = linear(x); ...; y = linear(o)   ->   q = linear(x[:, order]); ...; y = linear(o)[:, inverse]

`plan_permutation` finds the runs of tokens that have a grid (`token_grid`), where they lie in every value
(`token_axis`), which ops carry a permutation of them (`token_proof`), and the cheapest place for the gathers
(`token_cut`). `permute_tokens` puts them there. The order itself is an input of the permuted graph, int64
tensors behind its other inputs (`index_inputs`): one graph serves every order, and refresh and delta alike.
What comes out is what came out before, to rounding: softmax and sums add the same numbers in another order.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from .canonical import clean
from .collector import collector_paused
from .naming import module_path
from .permuted_sites import ungathered
from .reasons import Reason
from .sites import AttentionSite, Declined, MlpSite
from .token_axis import Piece, Rope, TokenAxes, Value, analyse_tokens
from .token_cut import fixed_nodes, gather_bytes, minimum_cut, owner, site_bytes, users
from .token_grid import TokenRun, holds, position_inputs, runs_of_option, token_runs
from .token_links import is_tensor
from .token_order import Grid, chunk_lengths, token_order
from .token_proof import Places, occurrences, walls

aten = torch.ops.aten

# A permutation may cost the sites that it serves this share of their time; it is nearly always far below.
DEFAULT_SHARE = 0.05


@dataclass(frozen=True)
class Layout:
    """One index tensor: an axis of `length` positions, reordered by each (start, run, undo) of `moves`."""

    length: int
    moves: tuple[tuple[int, int, bool], ...]
    device: torch.device


@dataclass(frozen=True)
class Gather:
    """`value` in another order, for `users`: along each (dim, layout) of `steps` in turn."""

    value: fx.Node
    users: tuple[fx.Node, ...]
    steps: tuple[tuple[int, int], ...]
    bytes: int  # read and written, each time the graph runs
    fixed: bool  # the same over a whole generation: made once and kept

    @property
    def name(self) -> str:
        return described(self.value)


@dataclass(frozen=True)
class Wall:
    """An op beside the permuted region that needs tokens in their own order."""

    node: fx.Node
    why: str

    @property
    def name(self) -> str:
        return described(self.node)


def described(node: fx.Node) -> str:
    """A value by the op that makes it and the module whose forward that is in: "linear.default of proj_out"."""
    made = owner(node)
    op = "input" if made.op == "placeholder" else str(made.target).removeprefix("aten.")
    return " of ".join(filter(None, (op, module_path(made))))


@dataclass(frozen=True)
class PermutationPlan:
    """What `permute_tokens` does to one graph; holds nodes of that graph."""

    runs: tuple[TokenRun, ...]
    layouts: tuple[Layout, ...]
    gathers: tuple[Gather, ...]
    served: tuple[frozenset[fx.Node], ...]  # for each run, the attention and MLP sites that see it permuted
    walls: tuple[Wall, ...]  # what the region ends at, inputs and outputs left out

    @property
    def sites(self) -> frozenset[fx.Node]:
        """All sites that see permuted tokens."""
        return frozenset().union(*self.served)

    def direction(self, gather: Gather) -> str:
        """Either "in" or "out" of the region."""
        _, layout = gather.steps[0]
        return "out" if self.layouts[layout].moves[0][2] else "in"

    @property
    def bytes(self) -> int:
        """Moved by the gathers each time the graph runs, reads and writes; what is fixed is left out."""
        return sum(gather.bytes for gather in self.gathers if not gather.fixed)


@collector_paused()
def plan_permutation(
    gm: fx.GraphModule,
    sites: Sequence[AttentionSite | MlpSite],
    *,
    axes: TokenAxes | None = None,
    grid: Grid | Sequence[Grid] | None = None,
    fixed: Collection[fx.Node] = (),
    share: float = DEFAULT_SHARE,
) -> PermutationPlan | Declined:
    """Where to permute tokens in a canonical graph, or why nowhere.

    sites: of `gm`; they are what the permutation serves. axes: `analyse_tokens(gm)`, if it is known already.
    grid: (frames, height, width) by the user, or several, one after the other; overrides what the graph says.
    fixed: placeholders that stay the same over a generation (parameters, buffers). Position ids are taken to, too.
    share: how much of the sites' own time the gathers may cost (`math.inf`: any).

    Declines with NO_SITES, NO_GRID, AMBIGUOUS_GRID, GRID_MISMATCH or WALLED_IN.
    """
    attention = [site.node for site in sites if isinstance(site, AttentionSite)]
    if not attention:
        return _declined(Reason.NO_SITES)
    axes = axes or analyse_tokens(gm)
    if grid is not None:
        grids = tuple(grid) if isinstance(grid[0], Sequence) else (tuple(grid),)
        runs = runs_of_option(axes, attention, grids)
        if not runs:
            tokens = sorted({site.q_len for site in sites if isinstance(site, AttentionSite)})
            return _declined(Reason.GRID_MISMATCH, grid=grids, tokens=tokens)
    else:
        found = token_runs(gm, axes, attention)
        runs = [run for run in found if not run.contradicting]
        if not runs and found:
            return _declined(Reason.AMBIGUOUS_GRID, grids=found[0].contradicting)
        if not runs:
            return _declined(Reason.NO_GRID)

    still = fixed_nodes(gm, {*fixed, *position_inputs(gm)})
    regions = [_region(gm, axes, run, sites, still, share) for run in runs]
    kept = [k for k, region in enumerate(regions) if not region.sites.isdisjoint(attention)]
    if not kept:
        free = [_region(gm, axes, run, sites, still, math.inf) for run in runs]
        plan = _assemble(gm, runs, free, still)
        ends = tuple(wall.name for wall in plan.walls[:4])
        return _declined(Reason.WALLED_IN, walls=ends, bytes=plan.bytes)
    return _assemble(gm, [runs[k] for k in kept], [regions[k] for k in kept], still)


def _declined(reason: Reason, **detail) -> Declined:
    return Declined("permutation", "", reason, detail)


# --- one run ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Region:
    """Where one run is permuted."""

    held: Mapping[Value, Places]
    inside: frozenset[fx.Node]
    walls: Mapping[fx.Node, str]
    sites: frozenset[fx.Node]  # inside, and of these tokens


def _region(gm, axes: TokenAxes, run: TokenRun, sites, still: Collection[fx.Node], share: float) -> _Region:
    held = occurrences(axes, run.pattern)
    closed = walls(gm, axes, held, run.length)
    free = [site for site in sites if site.node not in closed]
    wanted = {s.node: site_bytes(s, share) for s in free if holds(_tokens_of(axes, s), run.pattern)}
    whole = [_ops_of(site) for site in sites if isinstance(site, MlpSite)]
    inside = minimum_cut(gm, held, closed, wanted, whole, still)
    return _Region(held, inside, closed, inside.intersection(wanted))


def _ops_of(site: MlpSite) -> list[fx.Node]:
    """The ops from the input of an MLP to its last node: no gather may come between them."""
    out: dict[fx.Node, None] = {}
    stack = [site.node]
    while stack:
        node = stack.pop()
        if node is not site.input and node.op == "call_function" and node not in out:
            out[node] = None
            stack += node.all_input_nodes
    return [owner(node) for node in out]


# --- all runs together --------------------------------------------------------------------------------------


def _assemble(gm, runs: Sequence[TokenRun], regions: list[_Region], still) -> PermutationPlan:
    layouts: dict[Layout, int] = {}
    gathers = []
    for value in gm.graph.nodes:
        if not is_tensor(value):
            continue
        crossing: dict[tuple[tuple[int, bool], ...], list[fx.Node]] = {}
        for user in users(value):
            moves = tuple(_moves(value, user, regions))
            if moves:
                crossing.setdefault(moves, []).append(user)
        for moves, readers in crossing.items():
            steps = tuple(_steps(value, moves, regions, layouts))
            price = gather_bytes(value.meta["val"], [dim for dim, _ in steps])
            gathers.append(Gather(value, tuple(readers), steps, price, value in still))
    served = tuple(region.sites for region in regions)
    return PermutationPlan(tuple(runs), tuple(layouts), tuple(gathers), served, tuple(_walls(regions)))


def _moves(value: fx.Node, user: fx.Node, regions: list[_Region]) -> Iterator[tuple[int, bool]]:
    """(run, undo) for each run that is in another order where `value` is made than where `user` reads it."""
    for k, region in enumerate(regions):
        if (value, 0) in region.held:
            made, read = owner(value) in region.inside, user in region.inside
            if made != read:
                yield k, made


def _steps(value: fx.Node, moves, regions, layouts: dict[Layout, int]) -> Iterator[tuple[int, int]]:
    by_dim: dict[int, list[tuple[int, int, bool]]] = {}
    for k, undo in moves:
        for dim, start in regions[k].held[value, 0]:
            by_dim.setdefault(dim, []).append((start, k, undo))
    for dim in sorted(by_dim):
        tensor = value.meta["val"]
        layout = Layout(tensor.shape[dim], tuple(sorted(by_dim[dim])), tensor.device)
        yield dim, layouts.setdefault(layout, len(layouts))


def _walls(regions: Iterable[_Region]) -> Iterator[Wall]:
    """The walls that read from a region or are read by it."""
    for region in regions:
        for node, why in region.walls.items():
            beside = [owner(x) for x in node.all_input_nodes if (x, 0) in region.held]
            beside += [user for out in (node, *node.users) for user in users(out) if (out, 0) in region.held]
            if region.inside.intersection(beside):
                yield Wall(node, why)


# --- rewriting ----------------------------------------------------------------------------------------------


def permute_tokens(gm: fx.GraphModule, plan: PermutationPlan) -> fx.GraphModule:
    """Puts the gathers of `plan` into `gm` (in place) and returns it; `permuted_sites` says what its sites read then.

    Before: f(*inputs). After: f(*inputs, *index_inputs(plan, orders)), equal up to rounding for any orders.
    Each gather is an `aten.index_select`; the result of a fixed one has `meta["kept"] = True` (`keep_gathers`).
    """
    last = _inputs_first(gm.graph)
    indices = []
    for k, layout in enumerate(plan.layouts):
        with gm.graph.inserting_after(last):
            last = gm.graph.placeholder(f"token_order_{k}")
        like = next(g.value for g in plan.gathers for _, index in g.steps if index == k).meta["val"]
        last.meta["val"] = like.new_zeros(layout.length, dtype=torch.int64)
        indices.append(last)
    for gather in plan.gathers:
        out = gather.value
        place = last if out.op == "placeholder" else out
        for dim, k in gather.steps:
            with gm.graph.inserting_after(place):
                place = gm.graph.call_function(aten.index_select.default, (out, dim, indices[k]))
            place.meta["val"] = aten.index_select.default(out.meta["val"], dim, indices[k].meta["val"])
            for key in ("nn_module_stack", "stack_trace"):
                if key in gather.value.meta:
                    place.meta[key] = gather.value.meta[key]
            out = place
        out.meta["kept"] = gather.fixed
        for user in gather.users:
            user.replace_input_with(gather.value, out)
    return clean(gm)


def _inputs_first(graph: fx.Graph) -> fx.Node:
    """Moves placeholders ahead of all else, in their order, and returns the last of them."""
    first = next(node for node in graph.nodes if node.op != "placeholder")
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node in placeholders[list(graph.nodes).index(first) :]:
        first.prepend(node)
    return placeholders[-1]


def run_order(
    run: TokenRun, grids: Sequence[Grid] | None, chunk: int = 64, kind: str = "patch"
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """(order, chunk lengths) of one run, as `token_order` gives them, grid after grid.

    grids: `run.grids`, or what `grids_from_ids` read off `run.ids`. Where there are none, or for another
    number of tokens, the order stays as it is.
    """
    parts = [token_order(grid, chunk, kind) for grid in grids or ()]
    if sum(len(order) for order, _ in parts) != run.length:
        return torch.arange(run.length), chunk_lengths(run.length, chunk)
    orders, start = [], 0
    for order, _ in parts:
        orders.append(order + start)
        start += len(order)
    return torch.cat(orders), tuple(length for _, lengths in parts for length in lengths)


def index_inputs(plan: PermutationPlan, orders: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The last inputs of the permuted graph, int64, each on its device; `orders`: one a run (`run_order`)."""
    out = []
    for layout in plan.layouts:
        index = torch.arange(layout.length)
        for start, run, undo in layout.moves:
            order = orders[run].argsort() if undo else orders[run]
            index[start : start + len(order)] = order + start
        out.append(index.to(layout.device))
    return out


def site_chunks(
    axes: TokenAxes,
    site: AttentionSite | MlpSite,
    chunk: int,
    plan: PermutationPlan | None = None,
    run_lengths: Sequence[tuple[int, ...]] = (),
) -> tuple[int, ...]:
    """The chunk lengths along the tokens of a site (`q_len` of an attention, `tokens` of an MLP), of which
    they are the sum. Chunks restart at each segment; within a permuted run they are those of its order.

    run_lengths: of `run_order`, for each run of `plan`. Segments that are not permuted and shorter than a
    chunk join their neighbours.
    """
    runs = zip(plan.runs, plan.served, run_lengths) if plan is not None else ()
    permuted = [(run.pattern, lengths) for run, served, lengths in runs if site.node in served]
    out: list[int] = []
    plain: list[int] = []
    rope = _tokens_of(axes, site)
    while rope:
        pattern, lengths = next((p for p in permuted if rope[: len(p[0])] == p[0]), (None, ()))
        if pattern is None:
            plain.append(rope[0].length)
            rope = rope[1:]
        else:
            out += (*_plain_chunks(plain, chunk), *lengths)
            plain = []
            rope = rope[len(pattern) :]
    return (*out, *_plain_chunks(plain, chunk))


def _tokens_of(axes: TokenAxes, site: AttentionSite | MlpSite) -> Rope:
    """The axis of a site's tokens. If an MLP sees it flattened with the batch, samples are alike."""
    if isinstance(site, AttentionSite):
        return axes.rope(ungathered(site.query), -2)
    leading = axes.ropes[ungathered(site.input), 0][:-1]
    rope: Rope = next((rope for rope in reversed(leading) if rope), ())
    length = 0
    for k, piece in enumerate(rope, start=1):
        length += piece.length
        if length == site.tokens:
            return rope[:k]
    return (Piece(-1, site.tokens),)


def _plain_chunks(lengths: list[int], chunk: int) -> list[int]:
    joined: list[int] = []
    for length in lengths:
        if joined and min(joined[-1], length) < chunk:
            joined[-1] += length
        else:
            joined.append(length)
    return [size for length in joined for size in chunk_lengths(length, chunk)]
