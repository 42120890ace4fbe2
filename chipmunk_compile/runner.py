"""The callables that Dynamo runs in place of captured graphs: they find state and step, and run a program."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from . import telemetry
from .clock import Stream, Tick
from .config import Config
from .council import settle
from .forecast import History
from .forecaster import Forecaster
from .models import Root
from .offloading import prefetch
from .passes.graphs import only_computes
from .passes.reasons import Reason
from .pieces import Parts
from .plan import Analysis, make_plan
from .programs import Compiler, Programs, dense_program, is_disabled
from .ranks import ranks_of
from .schedule import Program, pays, program_at
from .state import Owner, State
from .timekeeper import Called, Timekeeper

log = logging.getLogger(__name__)
# Steps run early for nothing, until an owner's are no longer.
MOST_MISJUDGED = 3
# Picture sizes of as many tokens for which programs are compiled.
MOST_ORDERS = 4


@dataclass(frozen=True)
class Early:
    """A step that was run while the host would have waited for its timestep, as the next one of its stream."""

    stream: Stream
    step: int
    program: Program
    state: State | None  # None: the program has none
    outputs: object

    def is_of(self, tick: Tick, state: State) -> bool:
        return self.stream is tick.stream and self.step == tick.step and not tick.fresh and self.state is state


class Runner(Called):
    """The callable that Dynamo runs in place of one captured graph: finds state and step, runs a program.

    compiler: makes a program's graph a callable, Inductor when not given; a test may run graphs as they are.
    dense: that program, where it is compiled already. programs: those of another runner, of a configuration that
    differs in schedule and forecast alone.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        analysis: Analysis,
        config: Config,
        compiler: Compiler | None = None,
        dense: Callable | None = None,
        programs: dict[tuple, Programs] | None = None,
    ) -> None:
        super().__init__(analysis.inputs, config)
        self._dynamo, self._analysis, self._config, self._dense = gm, analysis, config, dense
        self._compiler = compiler
        self._ranks = ranks_of(gm)
        self._computes = only_computes(analysis.canonical)
        parts = Parts(analysis, config, compiler) if analysis.moving else None
        (latents,) = analysis.inputs.latents or (None,)
        latents = analysis.inputs.user[latents] if latents is not None else None
        self._forecaster = Forecaster(config, self._computes, analysis.layers > 0, parts, latents)
        # Layers of a forward that stay dense, where this graph holds too few to tell which of them they are.
        self._dense_until = config.dense_layers if analysis.layers <= config.dense_layers else 0
        self._by_grid: dict[tuple, Programs] = {} if programs is None else programs
        self.programs: Programs | None = None
        self._said_too_short = self._said_over_budget = False
        self._keeps_order = False  # tokens are as they come: other ranks would reorder theirs otherwise

    def __call__(self, *args):
        owner = self._owners.of(args)
        if owner is None:
            return self._run_dense(self._programs_of(None, None, args), args)
        # Threads that share a model take turns: two of them may share a stream, and so its state.
        with owner.root.lock:
            early: list[Early] = []
            where = self._tick(owner, args, lambda: early.extend(self._run_early(owner, args)))
            way = self._forecaster.way(owner.root) if where is not None else None
            if way is not None and way.runs_whole and not is_disabled():
                return self._run_whole(way, owner, *where, args, *early)
            programs = self._programs_of(where, owner, args)
            if where is None:
                return self._run_dense(programs, args)
            return self._run(programs, way, owner, *where, args, *early)

    def _run_early(self, owner: Owner, args: Sequence) -> Iterator[Early]:
        """The program that is due if the generation goes on, launched behind the read that will tell.

        The device then has work while the host reads, and while it gets the step under way. The state counts as
        unfilled until the read agrees; if it does not, a refresh follows, which is right whatever the state holds. The
        dense model has no state, and is right in any case.
        """
        root, expected = owner.root, owner.clock.expected if owner.clock is not None else None
        alone = root.was_one_call_of(owner) and not self._dense_until
        # What writes more than its state must not run twice, nor what the other ranks may run once.
        if expected is None or not alone or not self._computes or self._ranks.several or is_disabled():
            return
        if owner.misjudged > MOST_MISJUDGED:
            return
        stream, step = expected
        as_one = self._forecaster.as_one
        if as_one.runs_whole:
            if self._dense is not None and self._forecaster.is_computed(owner, stream, step):
                yield Early(stream, step, Program.DENSE, None, self._dense(*args))
            return
        if self._config.forecast.residual or self._config.forecast.tolerance is not None:
            return
        programs, state = stream.programs.get(self), stream.states.get((owner.key, 0))
        if programs is None or state is None or not state.filled or state.fits != (programs, owner):
            return
        program = program_at(step, as_one.schedule)
        if program is Program.FORECAST:
            return
        outputs = self._run_program(program, programs, state, args)
        state.filled = False
        yield Early(stream, step, program, state, outputs)

    def _programs_of(self, where: tuple[Tick, int] | None, owner: Owner | None, args: Sequence) -> Programs:
        """The programs for the token order of this call's stream, chosen at its first step.

        Another picture size may be another order of as many tokens. Any order is right; one too many to compile for
        is merely not the best.
        """
        tick = where[0] if where is not None else None
        chosen = tick.stream.programs.get(self) if tick is not None else self.programs
        if chosen is not None and (tick is None or tick.step > 0 or not self._analysis.reads_grid):
            return chosen
        counts = owner is None or owner.root.counted is not None  # then nothing is read from the device
        unread = self.programs is not None and (counts or not self._analysis.reads_grid)
        if not unread and len(self._by_grid) < MOST_ORDERS:
            grids = self._analysis.grids(args)
            if self._keeps_order:
                grids = (None,) * len(grids)
            if grids not in self._by_grid:
                plan = make_plan(self._analysis, grids, self._config)
                self._by_grid[grids] = Programs(self._dynamo, plan, self._config, self._compiler, self._dense)
            self.programs = self._by_grid[grids]
        if tick is not None:
            tick.stream.programs[self] = self.programs
        return self.programs

    def _run(
        self,
        programs: Programs,
        way: Config | None,
        owner: Owner,
        tick: Tick,
        occurrence: int,
        args: Sequence,
        early: Early | None = None,
    ):
        """A step's program, state and history."""
        # A block may move to another graph of the same model (guards fail, frames are captured anew): the state
        # follows the block, and is made anew where the graph lays it out otherwise.
        key, fits = (owner.key, occurrence), (programs, owner)
        states = tick.stream.states
        if is_disabled():
            states.pop(key, None)
            self._forecaster.forget(owner, tick.stream, occurrence)
            return self._run_dense(programs, args)
        if owner.root.forward.layers < self._dense_until or self._is_too_short(tick):
            states.pop(key, None)
            return self._stay_dense(programs, owner, args)
        if tick.is_past:  # what lies in the state may be another thread's, and it will read there what it wrote
            return self._stay_dense(programs, owner, args)
        state = states.get(key)
        if early is not None:
            if state is not None and early.is_of(tick, state):
                state.filled = True
                history = self._forecaster.history(way, owner, tick.stream, occurrence)
                owner.root.end_call(self._analysis.layers)
                if history is None:
                    return early.outputs
                return self._forecaster.keep(way, history, owner.root, tick, early.outputs, args)
            owner.misjudged += 1
            telemetry.count(early.program.value, -1)
            telemetry.count("misjudged")
        if state is None or state.fits != fits:
            states.pop(key, None)
            state = self._allocate(programs, owner, tick, fits)
            if state is None:
                return self._stay_dense(programs, owner, args)
            states[key] = state
        history = self._forecaster.history(way, owner, tick.stream, occurrence)
        if history is not None and history.is_over(tick):
            history.filled = False
        others = self._forecaster.others(history, owner, tick.stream, occurrence)
        due = self._due(way, owner.root, others, history, state, tick)
        learns = due is Program.REFRESH and history is not None and self._learns(history, tick)
        program, beside, alike = self._ranks.agree(due, learns, programs.plan.order)
        settle(others, tick.time, program is Program.FORECAST)
        if not alike:
            self._keep_order(tick)
        if program is Program.DENSE:  # another rank is
            states.pop(key, None)
            self._forecaster.forget(owner, tick.stream, occurrence)
            outputs = programs.run(Program.DENSE, args)
        elif history is None:
            outputs = self._run_program(program, programs, state, args)
        elif program is Program.FORECAST:
            outputs = self._forecaster.forecast(way, history, owner.root, tick, args)
        else:
            computed = self._run_beside(history, program, beside, programs, state, tick, args)
            outputs = self._forecaster.keep(way, history, owner.root, tick, computed, args)
        owner.root.end_call(self._analysis.layers)
        return outputs

    def _run_whole(
        self, way: Config, owner: Owner, tick: Tick, occurrence: int, args: Sequence, early: Early | None = None
    ):
        """A step that is forecast, or the dense model: no deltas, and so no state."""
        tick.stream.states.pop((owner.key, occurrence), None)  # of deltas, from before this was known to be the model
        history = self._forecaster.history(way, owner, tick.stream, occurrence)
        if history.is_over(tick):
            history.filled = False
        others = self._forecaster.others(history, owner, tick.stream, occurrence)
        may = early is None and not tick.fresh and not tick.is_past
        may = may and self._forecaster.due(way, owner.root, others, history, tick, Program.DENSE) is Program.FORECAST
        forecast = self._ranks.agree(Program.FORECAST if may else Program.DENSE).program is Program.FORECAST
        settle(others, tick.time, forecast)
        if forecast:
            outputs = self._forecaster.forecast(way, history, owner.root, tick, args)
        else:
            if self._dense is None:
                self._dense = dense_program(self._dynamo, args, self._config, self._compiler)
            outputs = self._dense(*args) if early is None else early.outputs
            if not tick.is_past:
                outputs = self._forecaster.keep(way, history, owner.root, tick, outputs, args)
        owner.root.end_call(self._analysis.layers)
        return outputs

    def _keep_order(self, tick: Tick) -> None:
        log.info("%s: its order differs by rank", Reason.SPREAD_TOKENS.value)
        self._keeps_order, self.programs = True, None
        self._by_grid.clear()
        tick.stream.programs.pop(self, None)

    def _due(
        self, way: Config | None, root: Root, others: list[History], history: History | None, state: State, tick: Tick
    ) -> Program:
        """What this step runs. others: of the step's other streams, which are forecast with it or not at all."""
        if tick.fresh or not state.filled:
            return Program.REFRESH
        if history is None:
            return program_at(tick.step, self._config.where_computed().schedule)
        return self._forecaster.due(way, root, others, history, tick, Program.DELTA)

    def _corrects(self, history: History, tick: Tick) -> bool:
        return history.options.residual > 0 and history.refreshed not in (None, tick.time)

    def _learns(self, history: History, tick: Tick) -> bool:
        """Whether a delta runs beside a refresh, to see what it misses."""
        return self._corrects(history, tick) and tick.step >= self._config.schedule.warmup

    def _run_dense(self, programs: Programs, args: Sequence):
        self._ranks.agree(Program.DENSE)
        return programs.run(Program.DENSE, args)

    def _stay_dense(self, programs: Programs, owner: Owner, args: Sequence):
        outputs = self._run_dense(programs, args)
        owner.root.end_call(self._analysis.layers)
        return outputs

    def _allocate(self, programs: Programs, owner: Owner, tick: Tick, fits: tuple) -> State | None:
        """State for one more owner in a stream, within the memory budget; None where nothing is left of that."""
        ledger, states = owner.root.ledger, tick.stream.states
        hosted = programs.offload.place(ledger, list(states.values()), not owner.has_weights)
        if hosted is None and tick.step == 0 and ledger.evict(tick.stream):
            hosted = programs.offload.place(ledger, list(states.values()), not owner.has_weights)
        if hosted is None:
            if not self._said_over_budget:
                self._said_over_budget = True
                log.warning("%s (%s bytes): calls stay dense", Reason.OVER_BUDGET.value, self._config.memory_budget)
            return None
        reserve = owner.root.reserve if self._config.replays_cuda_graphs else None
        state = programs.offload.allocate(programs.scope("stream"), fits, hosted, ledger, reserve)
        before = [held for held in states.values() if isinstance(held, State)]
        if before:
            before[-1].follower = weakref.ref(state)
        state.weights = owner.weights(programs.scope("weights"), reserve)
        ledger.add(state.weights, shared=True)
        ledger.streams.add(tick.stream)
        return state

    def _is_too_short(self, tick: Tick) -> bool:
        """Whether the generation has too few steps for any to be less than a dense one, as far as is known."""
        if tick.steps is None or tick.step >= tick.steps or pays(tick.steps, self._config.schedule):
            return False
        if not self._said_too_short:
            self._said_too_short = True
            log.info("%s (%d)", Reason.FEW_STEPS.value, tick.steps)
        return True

    def _run_program(self, program: Program, programs: Programs, state: State, args: Sequence):
        begins, state.filled = not state.filled, False  # one that fails half way leaves nothing to build on
        if program is Program.DELTA and state.follower is not None:
            prefetch(state.follower())
        # A graph without sites is here for its forecasts.
        outputs = programs.run(program, args, state, begins) if programs.state else programs.run(Program.DENSE, args)
        state.filled = True
        return outputs

    def _run_beside(
        self,
        history: History,
        program: Program,
        beside: bool,
        programs: Programs,
        state: State,
        tick: Tick,
        args: Sequence,
    ):
        """A computed step; of a delta, what it is expected to miss is corrected. beside: the delta runs too."""
        if program is Program.DELTA:
            corrects = self._corrects(history, tick)
            outputs = self._run_program(program, programs, state, args)
            return history.correct(tick.time, outputs) if corrects else outputs
        delta = self._run_program(Program.DELTA, programs, state, args) if beside else None
        outputs = self._run_program(program, programs, state, args)
        if delta is not None:
            history.learn(tick.time, outputs, delta)
        history.refreshed = tick.time
        return outputs


def callable_for(
    gm: fx.GraphModule,
    analysis: Analysis,
    config: Config,
    inductor: Callable[[], Callable],
    dense: Callable | None = None,
    programs: dict[tuple, Programs] | None = None,
) -> Callable:
    """What Dynamo runs in place of the graph.

    inductor: compiles Dynamo's graph untouched, for a graph that stays dense. dense: that program for one that does
    not, where it is compiled already. programs: as for Runner.
    """
    for declined in analysis.declined:
        log.debug("%s %s stays dense: %s %s", declined.kind, declined.name, declined.reason.value, declined.detail)
    if analysis.reason is None:
        return Runner(gm, analysis, config, dense=dense, programs=programs)
    log.info("the graph goes to Inductor untouched: %s %s", analysis.reason.value, analysis.detail)
    tells_time = analysis.inputs.timesteps and analysis.inputs.parameters
    untouched = ranks_of(gm).dense(inductor())
    return Timekeeper(analysis.inputs, untouched, config) if tells_time else untouched
