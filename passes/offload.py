"""Nodes that bring state from host memory before its use, and take it back: `kernels/transfer.py` says what they do.

    delta     attention_delta(q, ..)      ->  fetch .. arrive, the same
              mlp_delta(x, ..)            ->  fetch .. arrive, the same, store
    refresh   attention_refresh(q, ..)    ->  arrive, the same, store
              copy_ into an MLP's caches  ->  arrive, keep, store

A site's caches in host memory pass through a slot on the device, one of DEPTH that the sites take by turns. The fetch
stands right behind the last use of the slot by the site before, so its copy runs beside all that is computed until the
arrive, right before the caches are read. Which sites really lie in host memory is not said here: a program takes a
*home* for each, and one that is the cache itself means that nothing has to be moved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from ..kernels import transfer  # noqa: F401  (defines the ops)
from .canonical import clean
from .lower import StateTensor, Treatment, site_caches

aten = torch.ops.aten
chipmunk = torch.ops.chipmunk

# Slots. With two the copy of a site runs beside one layer and a half; more gain nothing while a layer takes longer to
# compute than to copy, and each holds one site's caches: 1.5 GB for HunyuanVideo at 720p.
DEPTH = 2
CPU = torch.device("cpu")


def movable_sites(gm: fx.GraphModule, treatments: Sequence[Treatment], kinds: Sequence[str]) -> tuple[int, ...]:
    """Numbers of the treatments whose caches may lie in host memory, in the order of the graph. Where no column is
    computed the cache is the output, which Inductor fuses into what reads it: nobody knows when."""
    position = {node: place for place, node in enumerate(gm.graph.nodes)}
    numbers = [n for n, t in enumerate(treatments) if t.kept and t.site.kind in kinds]
    return tuple(sorted(numbers, key=lambda n: position[treatments[n].site.node]))


def offload_state(treatments: Sequence[Treatment], movable: Sequence[int]) -> list[StateTensor]:
    """What programs with these nodes take behind their other state: a home for each cache, and `order`."""
    homes = [
        StateTensor(f"home_{t.name}", "home", t.shape, t.stride, t.dtype, CPU)
        for number in movable
        for t in site_caches(number, treatments[number])
    ]
    if not homes:
        return []
    device = treatments[movable[0]].site.node.meta["val"].device
    return [*homes, StateTensor("order", "table", (1,), (1,), torch.int32, device, torch.zeros(1, dtype=torch.int32))]


def offload(
    gm: fx.GraphModule, treatments: Sequence[Treatment], movable: Sequence[int], program: str
) -> fx.GraphModule:
    """Changes `gm`, a lowered program, in place; `movable` as movable_sites gives it."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    state = {node.meta["lifted"].name: node for node in placeholders if "lifted" in node.meta}
    last = placeholders[-1]
    for tensor in offload_state(treatments, movable):
        with gm.graph.inserting_after(last):
            last = state[tensor.name] = gm.graph.placeholder(tensor.name)
        last.meta["lifted"] = tensor
    sites = [_Moved(gm, state, site_caches(number, treatments[number])) for number in movable]
    for turn, site in enumerate(sites):
        if program == "refresh":
            site.keep()
        elif turn < DEPTH:
            site.fetch(last, None)
            last = last.next
        else:
            before = sites[turn - DEPTH]
            site.fetch(before.last, before.uses[-1])
        written = program == "refresh" or any(_writes(use, site.caches) for use in site.uses)
        site.arrive(written)
        if written:
            site.store()
    return clean(gm)


class _Moved:
    """The caches of one site in one program, and the nodes around their uses."""

    def __init__(self, gm: fx.GraphModule, state: dict[str, fx.Node], specs: Sequence[StateTensor]) -> None:
        self._graph, self._order = gm.graph, state["order"]
        self.caches = [state[spec.name] for spec in specs]
        self._home = [state[f"home_{spec.name}"] for spec in specs]
        touched = {user for cache in self.caches for user in cache.users}
        self.uses = [node for node in gm.graph.nodes if node in touched]
        self.last = self.uses[-1]  # of the nodes that belong to the site

    def keep(self) -> None:
        """Inductor moves a `copy_` into an input to the end of the program: by then the slot is another site's."""
        for use in self.uses:
            if use.target is aten.copy_.default:
                assert not use.users
                use.target = chipmunk.keep.default

    def fetch(self, behind: fx.Node, after: fx.Node | None) -> None:
        with self._graph.inserting_after(behind):
            self._graph.call_function(chipmunk.fetch.default, (self.caches, self._home, self._order, after))

    def arrive(self, written: bool) -> None:
        use = self.uses[0]
        made = [node for node in use.all_input_nodes if node.op != "placeholder"]
        after = made[0] if made else None  # what the op waits for in any case
        with self._graph.inserting_before(use):
            self._graph.call_function(chipmunk.arrive.default, (self.caches, self._order, after, written))

    def store(self) -> None:
        with self._graph.inserting_after(self.last):
            self.last = self._graph.call_function(chipmunk.store.default, (self.caches, self._home, self._order))


def _writes(node: fx.Node, caches: Sequence[fx.Node]) -> bool:
    """Whether an op's schema says that it writes one of `caches`."""
    arguments = zip(node.target._schema.arguments, node.args)
    return any(argument.alias_info is not None and value in caches for argument, value in arguments)
