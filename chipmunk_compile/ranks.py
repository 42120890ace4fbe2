"""The ranks that run one graph together (context parallelism): they run the same program at every call.

Refresh and delta hold the same collectives, a forecast holds none, and a step run twice holds them twice: a rank that
chose for itself could leave the others waiting, or exchange tensors with another layer of theirs. Evidence does not
promise the same choice: latents may differ by rank, and when a prompt embedding is collected is up to the interpreter.
So before each call of a graph with collectives its ranks say what they would run, and the one that computes most is run
by all. Everything else stays a rank's own: its state (for its heads, or its tokens), and how its kernels are tuned.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import fx

from . import telemetry
from .passes.collectives import groups
from .schedule import Program

log = logging.getLogger(__name__)
# Each computes all that those before it compute, and is right where they are.
_BY_WORK = (Program.FORECAST, Program.DELTA, Program.REFRESH, Program.DENSE)
# Host-side twins of the process groups that graphs use: a number exchanged there waits for no device.
_twins: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class Agreement(NamedTuple):
    """alike: whether the tokens of all ranks are in the same order, as far as it matters to the program."""

    program: Program
    beside: bool
    alike: bool = True


class Ranks:
    """Who must agree on what a graph runs. Without collectives nobody: `agree` returns what it is given."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        """names: of the process groups that the graph's collectives run over."""
        self._groups = _largest([_resolve(name) for name in names]) if can_agree() else ()

    @property
    def several(self) -> bool:
        return bool(self._groups)

    @property
    def count(self) -> int:
        """The ranks of the largest group, this one among them; 1 where there is none."""
        return max((group.size() for group in self._groups), default=1)

    def agree(self, program: Program, beside: bool = False, order: int = 0) -> Agreement:
        """What all ranks run. All of them call this, once a call, in the same order as the collectives of the graph.

        beside: whether the delta is to run beside a refresh (forecast.residual): only if all ranks want that.
        order: names the order of this rank's tokens. The tokens of all ranks meet in attention, so all are dense where
        their orders differ.
        Where groups are several (ring and Ulysses, say), the maximum over one and then the other is that over all, as
        long as they are the axes of a mesh.
        """
        if not self._groups:
            return Agreement(program, beside)
        wanted = torch.tensor([_BY_WORK.index(program), int(not beside), order, -order])
        for group in self._groups:
            torch.distributed.all_reduce(wanted, torch.distributed.ReduceOp.MAX, group=_twin(group))
        work, apart, most, least = wanted.tolist()
        agreed = _BY_WORK[work]
        alike = most == -least or agreed is Program.DENSE
        if not alike:
            agreed = Program.DENSE
        if agreed is not program:
            telemetry.count("overruled")
            log.debug("another rank needs %s: so this one runs it, instead of %s", agreed.value, program.value)
        return Agreement(agreed, not apart and agreed is Program.REFRESH, alike)

    def dense(self, compiled: Callable) -> Callable:
        """`compiled`, for a graph that always is dense: other ranks may have found more in theirs."""
        if not self._groups:
            return compiled

        def dense(*args):
            self.agree(Program.DENSE)
            return compiled(*args)

        return dense


def can_agree() -> bool:
    """Whether there is a way to ask the other ranks; where not, graphs with collectives stay dense on all of them."""
    return torch.distributed.is_available() and torch.distributed.is_gloo_available()


def ranks_of(gm: fx.GraphModule) -> Ranks:
    """Who runs a captured graph with this process."""
    return Ranks(groups(gm))


def _resolve(name: str):
    return torch.distributed.distributed_c10d._resolve_process_group(name)


def _largest(found: Sequence) -> tuple:
    """Groups of more than one rank that are no part of another."""
    members = [frozenset(torch.distributed.get_process_group_ranks(group)) for group in found]
    return tuple(
        group
        for i, (group, mine) in enumerate(zip(found, members))
        if len(mine) > 1 and not any(mine < other for other in members) and mine not in members[:i]
    )


def _twin(group):
    twin = _twins.get(group)
    if twin is None:
        members = torch.distributed.get_process_group_ranks(group)
        try:
            twin = torch.distributed.new_group(members, backend="gloo", use_local_synchronization=True)
        except RuntimeError as error:
            raise RuntimeError(
                f"chipmunk: ranks {members} agree on each step's program over gloo, which could not be started: name "
                "the network interface that links them (GLOO_SOCKET_IFNAME), or use another backend for this model"
            ) from error
        _twins[group] = twin
    return twin
