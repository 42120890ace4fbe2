"""Gathers of what holds still: what the delta program no longer computes, and when the kept ones are made anew."""

import pytest
import torch
from torch import fx

import chipmunk_compile
from chipmunk_compile.kept import gathers_keeper
from chipmunk_compile.passes.keep_gathers import keep_program, kept_gathers
from chipmunk_compile.passes.lower import kept_state
from chipmunk_compile.passes.token_cut import fixed_nodes
from chipmunk_compile.schedule import Program
from chipmunk_compile.state import allocate
from tests.positioned_dit import TOKENS, PositionedLoop, position_ids, positioned
from tests.toy_dit import compile_toy, worst

EXACT = {"attention.sparsity": 0.0, "mlp.sparsity": 0.0}
ONE_REFRESH = {"schedule.warmup": 1, "schedule.refresh_every": 100}


def spoil(runner):
    """Writes NaN into the kept gathers of the one stream: a delta that uses them shows it."""
    (owner,) = runner._owners._known.values()
    (stream,) = owner.root.counted.live if owner.root.counted else owner.clock.live
    (state,) = stream.states.values()
    count = len(kept_gathers(runner.programs.plan.canonical))
    assert count
    for tensor in state.tensors[-count:]:
        tensor.fill_(float("nan"))


@pytest.mark.usefixtures("uncompiled")
def test_programs_compute_nothing_that_holds_still():
    compiled, runners = compile_toy(positioned(), steps=6, **EXACT)
    with torch.no_grad():
        compiled(*next(iter(PositionedLoop())), position_ids())
    made = runners[0].programs
    targets = {p: [n.target for n in made.graph(p).graph.nodes] for p in (Program.REFRESH, Program.DELTA)}
    gather, upstream = torch.ops.aten.index_select.default, torch.ops.aten.cumsum.default
    canonical = [node.target for node in made.plan.canonical.graph.nodes]
    assert canonical.count(upstream) == 1 and not any(upstream in found for found in targets.values())
    kept = kept_gathers(made.plan.canonical)
    assert len(kept) == 3 and [k.meta["val"].shape[0] for k in kept] == [TOKENS] * 3
    sampled = sum(t.site.kind == "mlp" for t in made.plan.treatments)  # a refresh gathers the sampled tokens
    assert targets[Program.REFRESH].count(gather) - sampled == targets[Program.DELTA].count(gather)
    assert canonical.count(gather) - targets[Program.DELTA].count(gather) == 3


@pytest.mark.usefixtures("uncompiled")
def test_the_keep_program_reads_no_more_than_it_needs():
    compiled, runners = compile_toy(positioned(), steps=6, **EXACT)
    with torch.no_grad():
        compiled(*next(iter(PositionedLoop())), position_ids())
    canonical = runners[0].programs.plan.canonical
    program, positions = keep_program(canonical)
    inputs = [n.meta["val"] for n in canonical.graph.nodes if n.op == "placeholder"]
    assert sorted(tuple(inputs[p].shape) for p in positions) == [(TOKENS,), (TOKENS, 1), (TOKENS, 2), (TOKENS, 64)]
    assert sum(n.op == "call_function" for n in program.graph.nodes) < 12


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("batch, sparsity", [(3, 0.0), (1, 0.5)])
def test_kept_gathers_change_nothing(batch, sparsity):
    reference = positioned()
    options = {"attention.sparsity": sparsity, "mlp.sparsity": sparsity}
    compiled, _ = compile_toy(reference, steps=6, **options)
    positions, outputs, dense = position_ids(), [], []
    with torch.no_grad():
        for inputs in PositionedLoop(steps=6, batch=batch):
            outputs.append(compiled(*inputs, positions))
            dense.append(reference(*inputs, positions))
    assert chipmunk_compile.counters()["delta"] == 3
    assert worst(outputs, dense) < (1e-5 if sparsity == 0.0 else 0.3)


def run_steps(change, inference=False):
    """(outputs, dense outputs) of six steps, one refresh; before the fifth the kept gathers are spoilt and
    `change(model, ids)` says the ids that follow."""
    reference, positions = positioned(), position_ids()
    compiled, runners = compile_toy(reference, steps=6, **EXACT, **ONE_REFRESH)
    outputs, dense = [], []
    with torch.inference_mode() if inference else torch.no_grad():
        positions = positions.clone()
        for step, inputs in enumerate(PositionedLoop()):
            if step == 4:
                spoil(runners[0])
                positions = change(reference, positions)
            outputs.append(compiled(*inputs, positions))
            dense.append(reference(*inputs, positions))
    return outputs, dense


@pytest.mark.usefixtures("uncompiled")
def test_they_are_made_once():
    outputs, _ = run_steps(lambda model, ids: ids)
    assert all(output.isfinite().all() for output in outputs[:4])
    assert all(output.isnan().any() for output in outputs[4:])


def _moved_in_place(model, ids):
    return ids.add_(0.5)


def _table_written(model, ids):
    model.table.add_(0.5)
    return ids


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    "change", [lambda model, ids: ids + 0.5, _moved_in_place, _table_written], ids=["another", "in place", "parameter"]
)
def test_what_changes_within_a_generation_is_seen(change):
    assert worst(*run_steps(change)) < 1e-5


@pytest.mark.usefixtures("uncompiled")
def test_inference_tensors_have_no_version_and_are_never_trusted():
    assert worst(*run_steps(_moved_in_place, inference=True)) < 1e-5


@pytest.mark.usefixtures("uncompiled")
def test_a_refresh_makes_them_anew():
    reference, positions = positioned(), position_ids()
    compiled, runners = compile_toy(reference, steps=8, **EXACT, **{"schedule.warmup": 1, "schedule.refresh_every": 4})
    outputs, dense = [], []
    with torch.no_grad():
        for step, inputs in enumerate(PositionedLoop(steps=8)):
            if step == 4:
                spoil(runners[0])
                reference.table.data += 0.5  # no version tells
            outputs.append(compiled(*inputs, positions))
            dense.append(reference(*inputs, positions))
    assert worst(outputs, dense) < 1e-5


def keeper():
    """(keeper, state, inputs of the permuted graph) of the model, all by itself."""
    compiled, runners = compile_toy(positioned(), steps=6, **EXACT)
    with torch.no_grad():
        compiled(*next(iter(PositionedLoop())), position_ids())
    canonical = runners[0].programs.plan.canonical
    values = [n.meta["val"] for n in canonical.graph.nodes if n.op == "placeholder"]
    _, positions = keep_program(canonical)
    inputs = [torch.zeros(v.shape, dtype=v.dtype) for v in values]
    return gathers_keeper(canonical), allocate(kept_state(canonical)), inputs, positions


@pytest.mark.usefixtures("uncompiled")
def test_every_input_that_is_read_is_watched():
    keep, state, inputs, positions = keeper()

    def made_anew(values) -> bool:
        for tensor in state.tensors:
            tensor.fill_(float("nan"))
        keep.update(state, values)
        fresh = [tensor.isfinite().all().item() for tensor in state.tensors]
        assert len(set(fresh)) == 1
        return fresh[0]

    assert made_anew(inputs) and not made_anew(inputs)
    for position in range(len(inputs)):
        inputs[position].zero_()  # written, though nothing changed
        assert made_anew(inputs) == (position in positions)
        inputs[position] = inputs[position].clone()
        assert made_anew(inputs) == (position in positions)
        assert not made_anew(inputs)


@pytest.mark.usefixtures("uncompiled")
def test_a_keep_program_that_fails_leaves_nothing_to_trust():
    keep, state, inputs, positions = keeper()
    keep.update(state, inputs)
    assert state.kept_from is not None
    for position in positions:
        if inputs[position].dtype is torch.int64:  # an order
            inputs[position] = torch.full_like(inputs[position], TOKENS)
    with pytest.raises(IndexError):
        keep.update(state, inputs)
    assert state.kept_from is None


def test_an_input_that_the_graph_writes_does_not_hold_still():
    graph = fx.Graph()
    ids, table = graph.placeholder("ids"), graph.placeholder("table")
    angles, cosines = (graph.call_function(torch.ops.aten.cos.default, (x,)) for x in (ids, table))
    graph.call_function(torch.ops.aten.copy_.default, (ids, angles))
    graph.output((cosines,))
    gm = fx.GraphModule({}, graph)
    assert fixed_nodes(gm, [ids, table]) == {table, cosines}


def test_the_same_compiled():
    reference, positions = positioned(), position_ids()
    compiled, runners = compile_toy(reference, steps=5, **EXACT, **ONE_REFRESH)
    outputs, dense = [], []
    with torch.no_grad():
        for step, inputs in enumerate(PositionedLoop(steps=5)):
            if step == 3:
                spoil(runners[0])
            if step == 4:
                positions += 0.5
            outputs.append(compiled(*inputs, positions))
            dense.append(reference(*inputs, positions))
    assert outputs[3].isnan().any() and worst(outputs[:3] + outputs[4:], dense[:3] + dense[4:]) < 1e-5


@pytest.mark.usefixtures("uncompiled")
def test_text_is_no_position():
    """A prompt of [batch, tokens, channels] that never becomes an angle is not kept."""
    compiled, runners = compile_toy(positioned(), steps=6, **EXACT)
    with torch.no_grad():
        compiled(*next(iter(PositionedLoop())), position_ids())
    plan = runners[0].programs.plan
    _, positions = keep_program(plan.canonical)
    placeholders = [n for n in plan.canonical.graph.nodes if n.op == "placeholder"]
    assert not any(placeholders[p].meta["val"].dim() == 3 for p in positions)
