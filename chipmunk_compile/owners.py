"""Whose call of a graph this is: the owner of its parameters, and the model that those belong to."""

from __future__ import annotations

import logging
import sys
import threading
import weakref
from collections.abc import Sequence
from operator import itemgetter
from typing import TYPE_CHECKING

import torch

from . import telemetry
from .clock import InferredClock
from .config import Config
from .models import Root
from .passes.reasons import Reason
from .state import Owner

if TYPE_CHECKING:
    from .generations import generation

log = logging.getLogger(__name__)
# Calls in a row with parameters never seen before, until they count as never the same.
STRANGERS = 3

_roots: weakref.WeakKeyDictionary[torch.nn.Module, Root] = weakref.WeakKeyDictionary()
_lock = threading.RLock()
# The `generation` blocks that are open. The epoch moves with each: every call then asks anew where it belongs.
blocks: list[generation] = []
_epoch = 0


def open_block(block: generation) -> None:
    global _epoch
    with _lock:
        blocks.append(block)
        _epoch += 1


def close_block(block: generation) -> None:
    global _epoch
    with _lock:
        blocks.remove(block)
        _epoch += 1


def root_of(module: torch.nn.Module | None, whole: bool) -> Root:
    """The one Root of a module; a function compiled by itself is a model of its own."""
    with _lock:
        root = _roots.get(module) if module is not None else None
        if root is None:
            root = Root(module, whole)
            if module is not None:
                _roots[module] = root
        return root


def is_compiled(module: torch.nn.Module) -> bool:
    from torch._dynamo.eval_frame import OptimizedModule

    return isinstance(module, OptimizedModule) or module._compiled_call_impl is not None


class Owners:
    """The owners of one graph's calls."""

    def __init__(self, positions: Sequence[int], latents: frozenset[int], has_timestep: bool, config: Config) -> None:
        # One call of C for the thousand parameters of a whole model; of a single position it would make no tuple.
        self._parameters = itemgetter(*positions) if len(positions) > 1 else lambda args: [args[i] for i in positions]
        self._latents, self._config = latents, config
        self._has_timestep = has_timestep
        self._known: dict[tuple[int, ...], Owner] = {}
        self._epoch = _epoch
        self._strangers = 0  # calls in a row whose parameters were new, while those of a call before were gone

    def of(self, args: Sequence) -> Owner | None:
        """None where parameters are other objects at every call (offload layer by layer): nothing could be kept."""
        if self._epoch != _epoch:
            for owner in self._known.values():
                owner.release()
            self._known.clear()
            self._epoch = _epoch
        parameters = self._parameters(args)
        key = tuple(map(id, parameters))
        owner = self._known.get(key)
        if owner is not None and owner.alive:
            self._strangers = 0
            return owner
        alive = {k: o for k, o in self._known.items() if o.alive}
        self._strangers = self._strangers + 1 if len(alive) < len(self._known) else 0
        self._known = alive
        if self._strangers == STRANGERS:
            log.warning("%s: this graph stays dense", Reason.NO_LASTING_OWNER.value)
        owner = self._known[key] = self._make(parameters)
        return owner if self._strangers < STRANGERS else None

    def _make(self, parameters: Sequence[torch.Tensor]) -> Owner:
        """The owner of the forward that is running, and the model it belongs to.

        Made once per owner, so the walk up the call stack costs nothing later.
        """
        compiled, outermost = _running_modules(parameters)
        with _lock:
            block = next((block for block in reversed(blocks) if block.covers(parameters)), None)
            root = root_of(compiled, whole=True)
            root.has_timestep |= self._has_timestep
            if not root.has_timestep and outermost is not compiled:
                # Nothing in the compiled module tells the time: it is a block of the model around it.
                root = root_of(outermost, whole=False)
            if block is not None and block.module is not None:
                root = root_of(block.module, whole=is_compiled(block.module))
                if compiled is block.module:
                    block.unhook(root)  # it was given as it is, and is called through torch.compile's wrapper
            root.count(self._config)
            owner = Owner(parameters, root, InferredClock(self._latents) if self._has_timestep else None)
            if block is not None:
                block.take(root, owner)
        telemetry.holders.add(owner)
        return owner


def _running_modules(parameters: Sequence[torch.Tensor]) -> tuple[torch.nn.Module | None, torch.nn.Module | None]:
    """The outermost compiled module, and the outermost one at all, that hold the parameters and are being called."""
    wanted = {id(p) for p in parameters}
    compiled = outermost = None
    checked: dict[int, bool] = {}
    frame = sys._getframe(1)
    while frame is not None:
        if "self" in frame.f_code.co_varnames[: max(frame.f_code.co_argcount, 1)]:
            module = frame.f_locals.get("self")
            if isinstance(module, torch.nn.Module) and id(module) not in checked:
                holds = checked[id(module)] = wanted <= {id(p) for p in module.parameters()}
                if holds:
                    outermost = module
                    compiled = module if is_compiled(module) else compiled
        frame = frame.f_back
    return getattr(compiled, "_orig_mod", compiled), getattr(outermost, "_orig_mod", outermost)
