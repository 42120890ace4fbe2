"""Graphs with symbolic sizes (`dynamic=True`, or Dynamo's own switch at a second resolution): sparse at each size.

A symbolic integer that is no size, such as a timestep, is handed on as a tensor.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from .config import Config
from .passes.lift_numbers import lift_numbers
from .passes.reasons import Reason
from .plan import analyse
from .runner import callable_for

log = logging.getLogger(__name__)
# Each size compiles a refresh and a delta program. Resolutions are few; text that is never padded has any length.
MOST_SIZES = 4


def is_symbolic(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return any(isinstance(size, torch.SymInt) for size in (*value.shape, *value.stride()))
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


class BySize:
    """One symbolic graph: a Runner for each of the first MOST_SIZES sizes, Inductor's symbolic program for all else."""

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], dense: Callable, config: Config) -> None:
        symbolic = [i for i, value in enumerate(example_inputs) if is_symbolic(value)]
        integers = [i for i in symbolic if isinstance(example_inputs[i], torch.SymInt)]
        self._dynamo, self._numbers = lift_numbers(gm, integers)
        self._symbolic = [i for i in symbolic if i not in self._numbers]
        self._dense, self._config = dense, config
        self._by_size: dict[tuple, Callable] = {}
        self._lock = threading.Lock()

    def __call__(self, *args):
        size = tuple(
            (arg.shape, arg.stride()) if isinstance(arg, torch.Tensor) else arg
            for arg in map(args.__getitem__, self._symbolic)
        )
        called = self._by_size.get(size)
        lifted = list(args)
        for i in self._numbers:
            lifted[i] = torch.tensor(args[i])
        if called is None:
            with self._lock:
                called = self._by_size.get(size) or self._make(size, lifted)
        return called(*lifted)

    def _run_dense(self, *args):
        plain = list(args)
        for i in self._numbers:
            plain[i] = int(args[i])
        return self._dense(*plain)

    def _make(self, size: tuple, args: Sequence) -> Callable:
        if len(self._by_size) == MOST_SIZES:
            log.info("%s (%d)", Reason.TOO_MANY_SIZES.value, MOST_SIZES)
            return self._run_dense
        # A copy: what is traced for one size must not show in the graph that the next size is traced from.
        gm = fx.GraphModule(self._dynamo, self._dynamo.graph)
        gm.meta.update(self._dynamo.meta)
        analysis = analyse(gm, args, self._config)
        made = callable_for(gm, analysis, self._config, lambda: self._run_dense, self._run_dense)
        self._by_size[size] = made
        return made
