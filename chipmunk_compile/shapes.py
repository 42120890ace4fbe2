"""Graphs with symbolic sizes (`dynamic=True`, or Dynamo's own switch at a second resolution): sparse at each size.

A symbolic integer that is no size, such as a timestep, is handed on as a tensor. A float that can be none (under
`dynamic=True` the epsilon of every norm is an input) counts as part of the size. Strides along axes of size one are
nothing: blocks compiled one by one differ in those alone (a slice of one sample keeps the stride of the batch).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from .config import Config
from .passes.lift_numbers import bind_numbers, lift_numbers, numbers_read
from .passes.reasons import Reason
from .plan import analyse
from .programs import dense_program
from .ranks import ranks_of
from .runner import callable_for

log = logging.getLogger(__name__)
# Each size compiles a refresh and a delta program. Resolutions are few; text that is never padded has any length.
MOST_SIZES = 4
# (graph, inputs, dense program if there is one) -> callable
Make = Callable[[fx.GraphModule, Sequence[Any], Callable | None], Callable]


def is_symbolic(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return any(isinstance(size, torch.SymInt) for size in (*value.shape, *value.stride()))
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


class BySize:
    """One symbolic graph: a Runner for each of the first MOST_SIZES sizes, Inductor's symbolic program for all else.

    inductor: compiles that program, while Dynamo's own tracing context stands. A graph of which neither size nor number
    varies needs none.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        inductor: Callable[[], Callable],
        config: Config,
        make: Make | None = None,
    ) -> None:
        """make: what runs one size, given its graph, its inputs and the dense program; a Runner when not given."""
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        symbolic = [i for i, value in enumerate(example_inputs) if _varies(value) and _is_read(placeholders[i])]
        integers = [i for i in symbolic if isinstance(example_inputs[i], torch.SymInt)]
        self._dynamo, self._numbers = lift_numbers(gm, integers)
        self._symbolic = [i for i in symbolic if i not in self._numbers]
        self._constants = numbers_read(self._dynamo)
        self._dense = inductor() if symbolic or self._constants else None
        self._config, self._made_by = config, make
        self._by_size: dict[tuple, Callable] = {}
        self._lock = threading.Lock()

    def __call__(self, *args):
        constants = tuple(args[i].item() for i in self._constants)
        size = (*map(_layout, map(args.__getitem__, self._symbolic)), *constants)
        called = self._by_size.get(size)
        lifted = list(args)
        for i in self._numbers:
            lifted[i] = torch.tensor(args[i])
        if called is None:
            with self._lock:
                called = self._by_size.get(size) or self._make(size, constants, lifted)
        return called(*lifted)

    def _run_dense(self, *args):
        plain = list(args)
        for i in self._numbers:
            plain[i] = int(args[i])
        return self._dense(*plain)

    def _make(self, size: tuple, constants: Sequence[float], args: Sequence) -> Callable:
        if len(self._by_size) == MOST_SIZES:
            log.info("%s (%d)", Reason.TOO_MANY_SIZES.value, MOST_SIZES)
            return ranks_of(self._dynamo).dense(self._run_dense)
        # A copy: what is traced for one size must not show in the graph that the next size is traced from.
        gm = bind_numbers(self._dynamo, dict(zip(self._constants, constants)))
        if self._made_by is not None:
            dense = self._run_dense if self._dense is not None else None
            made = self._by_size[size] = self._made_by(gm, args, dense)
            return made
        analysis = analyse(gm, args, self._config)
        if self._dense is not None:
            made = callable_for(gm, analysis, self._config, lambda: self._run_dense, self._run_dense)
        else:
            made = callable_for(gm, analysis, self._config, lambda: dense_program(gm, args, self._config))
        self._by_size[size] = made
        return made


def _varies(value: Any) -> bool:
    """Whether the layout of an input is symbolic."""
    if not isinstance(value, torch.Tensor):
        return is_symbolic(value)
    return any(isinstance(size, torch.SymInt) for size in (*value.shape, *_strides(value)))


def _is_read(placeholder: fx.Node) -> bool:
    """Tensors always: their sizes are constants of the graph."""
    return bool(placeholder.users) or isinstance(placeholder.meta.get("example_value"), torch.Tensor)


def _layout(value: Any) -> Any:
    return (value.shape, _strides(value)) if isinstance(value, torch.Tensor) else value


def _strides(value: torch.Tensor) -> tuple:
    return tuple(0 if type(size) is int and size == 1 else stride for size, stride in zip(value.shape, value.stride()))
