"""One compiled model for many settings: what is common to them is captured, compiled and analysed once.

`torch.compile(model, backend=Switchboard(...))` gives one callable, whose `setting` says what it runs as: None is the
dense program, anything else what `backend="chipmunk"` would run with those options. Settings that differ in schedule
and forecast alone share their programs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from .backend import inductor_program
from .config import Config, ForecastOptions, ScheduleOptions
from .explaining import graph_report
from .passes.lower import kept_state, lift_state
from .passes.reasons import Reason
from .plan import Analysis, analyse, make_plan
from .programs import dense_program
from .report import GraphReport
from .runner import callable_for
from .shapes import BySize, is_symbolic


@dataclass(frozen=True)
class Work:
    """One forward's matrix work with the sites of a setting, as shares of a dense one's, and the state of a stream."""

    refresh: float
    delta: float
    state_bytes: int
    sites: int


class Switchboard:
    """The backend, and the switch. `settings`: all that it may be set to."""

    def __init__(self, base: Config, settings: Iterable[Config]) -> None:
        self.base = base
        self.settings = tuple(dict.fromkeys(settings))
        self.setting: Config | None = None
        self.graphs: list[_Graph] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable:
        if any(map(is_symbolic, example_inputs)):
            dense = lambda: inductor_program(gm, example_inputs, self.base)
            return BySize(gm, example_inputs, dense, self.base, self._graph)
        return self._graph(gm, example_inputs)

    def work(self, config: Config) -> Work:
        """Of the graphs that were captured until now; 1 where there is none."""
        found = [graph.reports[_family(config)] for graph in self.graphs]
        dense = sum(report.dense_flops for report, _, _ in found) or 1
        return Work(
            sum(report.refresh_flops for report, _, _ in found) / dense,
            sum(report.delta_flops for report, _, _ in found) / dense,
            sum(state for _, state, _ in found),
            sum(sites for _, _, sites in found),
        )

    def _graph(self, gm: fx.GraphModule, inputs: Sequence[Any], dense: Callable | None = None) -> _Graph:
        made = _Graph(self, gm, inputs, dense)
        self.graphs.append(made)
        return made


class _Graph:
    """One captured graph."""

    def __init__(self, board: Switchboard, gm: fx.GraphModule, inputs: Sequence[Any], dense: Callable | None) -> None:
        self._board, self._gm, self._compiled = board, gm, dense
        self._analyses: dict[Config, Analysis] = {}
        self._programs: dict[Config, dict] = {}
        self._called: dict[Config, Callable] = {}
        self.reports: dict[Config, tuple[GraphReport, int, int]] = {}  # with bytes of state, and sites
        for family in dict.fromkeys(map(_family, board.settings)):
            analysis = self._analyses[family] = analyse(gm, inputs, family)
            plan = make_plan(analysis, analysis.grids(inputs), family) if analysis.reason is None else None
            state = [*lift_state(plan.treatments), *kept_state(plan.canonical)] if plan is not None else []
            sites = len(plan.treatments) if plan is not None else 0
            self.reports[family] = graph_report(analysis, plan), sum(tensor.bytes for tensor in state), sites
            self._programs[family] = {}

    def __call__(self, *args):
        setting = self._board.setting
        if setting is None:
            return self._dense(*args)
        if setting not in self._called:
            family = _family(setting)
            analysis = self._analyses[family]
            if analysis.reason is None and not analysis.sites and not setting.forecasts:
                analysis = replace(analysis, reason=Reason.NO_SITES)
            self._called[setting] = callable_for(
                self._gm, analysis, setting, lambda: self._dense, self._dense, self._programs[family]
            )
        return self._called[setting](*args)

    def _dense(self, *args):
        if self._compiled is None:
            self._compiled = dense_program(self._gm, args, self._board.base)
        return self._compiled(*args)


def _family(config: Config) -> Config:
    """Settings of one family have the same analysis and programs: they differ in when what runs."""
    # As for forecasts: a graph without sites is of use to them alone.
    return replace(config, preset="", schedule=ScheduleOptions(compute_every=2), forecast=ForecastOptions())
