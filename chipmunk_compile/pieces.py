"""What a piece of a model does in a step that is forecast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress

from .config import Config
from .passes.graphs import copy_graph
from .plan import Analysis
from .programs import Compiler, compile_graph


class Parts:
    """The outputs of one graph in two parts: those that come from its sites and may be forecast, and those that do not.

    The latter, such as an embedded timestep on its way to the next graph, are computed at every step: by a program of
    their own where the others are not.
    """

    def __init__(self, analysis: Analysis, config: Config, compiler: Compiler | None = None) -> None:
        """compiler: Inductor when not given."""
        self._analysis, self._config = analysis, config
        self._compiler = compiler or compile_graph
        self._program: Callable | None = None

    def moving(self, outputs: Sequence) -> list:
        return list(compress(outputs, self._analysis.moving))

    def with_moving(self, moving: Sequence, outputs: Sequence) -> list:
        """`outputs`, with others in place of those that move."""
        others = iter(moving)
        return [next(others) if moves else output for moves, output in zip(self._analysis.moving, outputs)]

    def with_still(self, moving: Sequence, args: Sequence) -> list:
        """All outputs of a step: `moving`, and the others for the inputs `args`."""
        if self._analysis.still is None:
            return list(moving)
        if self._program is None:  # a compiler takes over what it gets
            self._program = self._compiler(copy_graph(self._analysis.still)[0], list(args), self._config)
        still, moved = iter(self._program(*args)), iter(moving)
        return [next(moved) if moves else next(still) for moves in self._analysis.moving]
