"""When the kept token gathers of a stream (`passes.keep_gathers`) are made: after a refresh, and whenever what they are
made from is another object or was written to."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .passes.keep_gathers import keep_program, kept_gathers
from .state import State


class Keeper:
    """The keep program of one permuted graph. It runs as it is, once in a while: it is not worth a compile."""

    def __init__(self, canonical: fx.GraphModule) -> None:
        self._program, self._reads = None, ()
        self._count = len(kept_gathers(canonical))
        if self._count:
            self._program, self._reads = keep_program(canonical)

    def update(self, state: State, inputs: Sequence[Any]) -> None:
        """Makes `state`'s kept gathers, its last tensors, from `inputs` (of the permuted graph) unless they stand.

        They stand as long as the inputs are the same objects at the same version. What no version tells (a parameter
        written through `.data`) is seen at the next refresh, after which they are always made anew.
        """
        if self._program is None:
            return
        read = [inputs[position] for position in self._reads]
        if state.kept_from is not None and unchanged(state.kept_from, read):
            return
        state.kept_from = None  # until the program has run
        with torch.no_grad():
            self._program(*inputs, *state.tensors[-self._count :])
        state.kept_from = marks(read)


def marks(values: Sequence[Any]) -> list[tuple[Any, Any]]:
    """What tells later whether values are still the same ones."""
    return [_mark(value) for value in values]


def _mark(value: Any) -> tuple[Any, Any]:
    if not isinstance(value, torch.Tensor):
        return None, value
    return weakref.ref(value), None if value.is_inference() else value._version


def unchanged(marks: list[tuple[Any, Any]], values: Sequence[Any]) -> bool:
    """Inference tensors have no version: they always count as changed."""
    for (reference, version), value in zip(marks, values):
        if reference is None:
            if type(value) is not type(version) or value != version:
                return False
        elif reference() is not value or version is None or version != value._version:
            return False
    return True
