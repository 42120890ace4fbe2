"""When what holds still is made, and made anew: the kept token gathers of a stream (`passes.keep_gathers`), and what
deltas want of an owner's weights in another form (`passes.lower.weights_program`)."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .passes.keep_gathers import keep_program, kept_gathers
from .state import State


def gathers_keeper(canonical: fx.GraphModule) -> Keeper:
    """Of a permuted graph's kept gathers, the last tensors of a stream's state. They are
    always made anew where a generation begins."""
    count = len(kept_gathers(canonical))
    return Keeper(*(keep_program(canonical) if count else (None, ())), count)


class Keeper:
    """A small program that writes the last `count` tensors of a state. It runs as it is, once in a while: it is not
    worth a compile."""

    def __init__(self, program: fx.GraphModule | None, reads: Sequence[int], count: int) -> None:
        """reads: positions of the inputs that it is made from. program: None where there is nothing to make."""
        self._program, self._reads, self._count = program, reads, count

    def update(self, state: State, inputs: Sequence[Any]) -> None:
        """Makes the tensors from `inputs` unless they stand: those are the same objects at the same version. What no
        version tells (a parameter written through `.data`) is seen where a caller has set `kept_from` to None."""
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
