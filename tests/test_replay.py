"""Programs recorded as CUDA graphs, with a stand-in for the recorder that runs on a CPU: it keeps to the addresses that
a recording was made with, as a graph does."""

from __future__ import annotations

import gc

import pytest
import torch

import chipmunk_compile
from chipmunk_compile import programs, replay
from chipmunk_compile.config import Config
from chipmunk_compile.passes.lower import StateTensor
from chipmunk_compile.programs import compile_graph, keeps_its_address
from chipmunk_compile.replay import MOST, WASTED, Replayed, refusal
from chipmunk_compile.state import Reserve, allocate
from tests.test_repeats import SPARSE, Layers, graph_of
from tests.toy_dit import Loop, compile_toy, toy, worst

EXACT = {"attention.sparsity": 0.0, "mlp.sparsity": 0.0}


class Tape:
    """What a Lane does. Its recordings run the program again and overwrite the outputs of the first run, at one place
    for all of them: memory is shared."""

    def __init__(self, fails: Exception | None = None) -> None:
        self.recorded = self.launched = self.turns = 0
        self.fails, self.busy = fails, False
        self._pool: dict[tuple, torch.Tensor] = {}

    def record(self, program, inputs):
        if self.fails is not None:
            raise self.fails
        self.recorded += 1
        before = [value.clone() for value in inputs]
        made = list(program(*inputs))
        for value, was in zip(inputs, before):  # nothing runs while it is recorded
            value.copy_(was)
        addresses = [value.data_ptr() for value in inputs]
        places = [
            value if any(value is given for given in inputs) else self._place(number, value)
            for number, value in enumerate(made)
        ]

        def launch():
            assert self.turns == 1, "while it has its turn"
            self.launched += 1
            assert [value.data_ptr() for value in inputs] == addresses
            for place, value in zip(places, program(*inputs)):
                if isinstance(value, torch.Tensor) and place.data_ptr() != value.data_ptr():
                    with torch.inference_mode(place.is_inference()):
                        place.copy_(value)

        return launch, places

    def _place(self, number: int, value):
        if not isinstance(value, torch.Tensor) or value._is_view():
            return value
        return self._pool.setdefault((number, value.shape), torch.empty_like(value))

    def records(self) -> bool:
        return self.busy

    def take_turn(self) -> None:
        self.turns += 1

    def end_turn(self) -> None:
        self.turns -= 1


@pytest.fixture
def tape(monkeypatch):
    """Programs of a CPU are recorded."""
    made = Tape()
    monkeypatch.setattr(replay.Lane, "of", staticmethod(lambda device: made))
    monkeypatch.setattr(programs, "refusal", lambda graph, static, args: None)
    return made


def add(weight, x):
    return [weight + x, 3]


def weighted(tape, program=add, static=(True, False)):
    return Replayed(program, static, tape)


# --- one program --------------------------------------------------------------------------------------------


def test_the_first_call_runs_the_second_records_and_all_others_replay():
    tape = Tape()
    program, weight = weighted(tape), torch.ones(3)
    outputs = [program(weight, torch.full((3,), float(step))) for step in range(5)]
    assert [(made.tolist(), number) for made, number in outputs] == [([1.0 + step] * 3, 3) for step in range(5)]
    assert (tape.recorded, tape.launched) == (1, 4)


def test_weights_are_read_where_they_lie():
    tape = Tape()
    program, weight, x = weighted(tape), torch.ones(3), torch.zeros(3)
    program(weight, x), program(weight, x)
    weight += 1
    assert program(weight, x)[0].tolist() == [2.0] * 3 and tape.recorded == 1
    assert program(weight.clone(), x)[0].tolist() == [2.0] * 3 and tape.recorded == 2, "moved"
    assert program(weight, x)[0].tolist() == [2.0] * 3 and tape.recorded == 2, "and back"


def test_state_is_written_where_it_lies():
    def count(state, x):
        state += 1
        return [x * state]

    tape = Tape()
    program, first, second = weighted(tape, count), torch.zeros(1), torch.zeros(1)
    x = torch.ones(2)
    program(first, x)
    for _ in range(4):
        program(first, x), program(second, x)
    assert tape.recorded == 2
    assert (first.item(), second.item()) == (5, 4) and program(first, x)[0].tolist() == [6, 6]


def test_arguments_are_copied_whatever_mode_they_were_made_in():
    tape = Tape()
    program, weight = weighted(tape), torch.ones(2, 3)
    with torch.inference_mode():
        made = torch.ones(3, 2).t()
        program(weight, made), program(weight, made)
    with torch.no_grad():
        assert program(weight, torch.full((2, 3), 4.0))[0].tolist() == [[5.0] * 3] * 2
    assert tape.recorded == 1


def test_what_is_returned_of_the_arguments_is_the_argument():
    tape = Tape()
    program = weighted(tape, lambda weight, x: [x, weight, weight + x])
    weight = torch.ones(2)
    for step in range(4):
        x = torch.full((2,), float(step))
        made = program(weight, x)
        assert made[0] is x and made[1] is weight and made[2].tolist() == [1.0 + step] * 2
    assert tape.launched == 3


@pytest.mark.parametrize("program", [lambda weight, x: [x[:1]], lambda weight, x: [weight.view(1, 2)]])
def test_views_of_arguments_are_not_recorded(program):
    tape = Tape()
    made = weighted(tape, program)
    for step in range(4):
        x = torch.full((2,), float(step))
        assert made(x, x)[0].tolist() == program(x, x)[0].tolist()
    assert tape.launched == 0


def test_arguments_that_overlap_themselves_are_not_recorded():
    tape = Tape()
    program, weight = weighted(tape), torch.ones(2, 3)
    for step in range(4):
        x = torch.full((1, 1), float(step)).expand(2, 3)
        assert program(weight, x)[0].tolist() == [[1.0 + step] * 3] * 2
    assert tape.launched == 0


def test_what_the_device_refuses_to_record_runs_as_it_is():
    tape = Tape(fails=RuntimeError("operation not permitted when stream is capturing"))
    program, weight = weighted(tape), torch.ones(3)
    for step in range(4):
        assert program(weight, torch.full((3,), float(step)))[0].tolist() == [1.0 + step] * 3
    tape.fails = None
    program(weight, weight)
    assert tape.recorded == 0, "asked once"


def test_within_a_caller_s_own_recording_programs_run():
    tape = Tape()
    program, x = weighted(tape), torch.ones(3)
    program(x, x)
    tape.busy = True
    assert program(x, x)[0].tolist() == [2.0] * 3 and tape.recorded == 0


def test_few_recordings_are_kept_and_addresses_that_never_come_back_end_it():
    tape = Tape()
    program, x = weighted(tape), torch.ones(3)
    weights = [torch.full((3,), float(number)) for number in range(3 * MOST)]
    for _ in range(2):
        for weight in weights[:MOST]:
            program(weight, x)
    assert tape.recorded == MOST
    for weight in weights:
        assert program(weight, x)[0].tolist() == (weight + 1).tolist()
    assert tape.recorded <= 2 * MOST + WASTED + 1
    before = tape.recorded
    assert program(torch.zeros(3), x)[0].tolist() == [1.0] * 3 and tape.recorded == before


def test_reset_drops_recordings():
    tape = Tape()
    program, x = weighted(tape), torch.ones(3)
    program(x, x), program(x, x)
    chipmunk_compile.reset()
    program(x, x)
    assert tape.recorded == 2


# --- what can be recorded -----------------------------------------------------------------------------------


def refused(function, *args, static=None) -> str | None:
    gm = torch.fx.symbolic_trace(function)
    return refusal(gm, static or [False] * len(args), args)


def test_what_lies_on_the_host_is_not_recorded():
    assert refused(lambda x: x + 1, torch.ones(2)) == "inputs on cpu"
    meta = torch.ones(2, device="meta")
    assert refused(lambda x, y: x + y, meta, torch.ones(())) == "inputs on cpu and meta"
    assert refused(lambda x, n: x + n, meta, 3) == "an input is of type int"


def test_writing_to_an_input_is_seen_also_through_a_view():
    class Writes(torch.nn.Module):
        def forward(self, x, y):
            y.view(-1).add_(1)
            return x + y

    gm, inputs = graph_of(Writes(), torch.ones(2), torch.zeros(2))
    names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    cuda = [torch.empty(2, device="cuda") if torch.cuda.is_available() else _Cuda() for _ in inputs]
    static = [False, False]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "_PLAIN", (torch.Tensor, _Cuda))
        assert "writes to an input" in refusal(gm, static, cuda)
        static[1 if "y" in names[1] else 0] = True
        assert refusal(gm, static, cuda) is None, "state may be written to"


class _Cuda:
    device = torch.device("cuda", 0)


# --- whole models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [EXACT, SPARSE, {"preset": "balanced"}, {"preset": "exact", "schedule.compute_every": 2}]
)
@pytest.mark.parametrize("layers", [2, 6])
def test_generations_are_what_they_are_without(tape, layers, options):
    loops = [Loop(steps=9, seed=seed) for seed in range(3)]
    model = toy(layers=layers)
    compiled, _ = compile_toy(model, **options)
    expected = [loop.run(compiled) for loop in loops]
    ran = {name: chipmunk_compile.counters()[name] for name in ("dense", "refresh", "delta", "forecast")}
    torch._dynamo.reset()
    chipmunk_compile.reset()
    compiled, _ = compile_toy(model, mode="reduce-overhead", **options)
    for loop, wanted in zip(loops, expected):
        assert worst(loop.run(compiled), wanted) < 1e-5
    if layers == 2:
        assert tape.launched > 0 and tape.recorded > 0
    assert sum(chipmunk_compile.counters()[name] for name in ran) == sum(ran.values())


def test_two_streams_by_turns(tape):
    """Guidance by two calls: each has its state, and so its recording."""
    model, loop = toy(), Loop(steps=8)

    def run(compiled):
        outputs = []
        with torch.no_grad():
            for x, t, prompt in loop:
                outputs += [compiled(x, t, prompt), compiled(x, t, -prompt)]
        return outputs

    expected = run(compile_toy(model, **SPARSE)[0])
    torch._dynamo.reset()
    chipmunk_compile.reset()
    assert worst(run(compile_toy(model, mode="reduce-overhead", **SPARSE)[0]), expected) < 1e-5
    assert tape.launched > 6


def test_recordings_outlive_generations_whose_prompts_are_dropped(tape):
    """A pipeline's prompt embeddings die with its call, and with them the stream: its memory waits for the next."""
    compiled, _ = compile_toy(toy(), mode="reduce-overhead", **SPARSE)
    for seed in range(4):
        loop = Loop(steps=7, seed=seed)
        loop.run(compiled)
        del loop
        gc.collect()
        if seed == 1:
            before, held = tape.recorded, chipmunk_compile.counters()["state_bytes"]
    assert tape.recorded == before == 2 and chipmunk_compile.counters()["state_bytes"] == held > 0
    chipmunk_compile.reset()
    assert chipmunk_compile.counters()["state_bytes"] == 0


def test_a_layer_compiled_once_is_recorded_with_all_others(tape):
    gm, inputs = graph_of(Layers((32,) * 6), torch.randn(3, 16))
    static = [keeps_its_address(node) for node in gm.graph.nodes if node.op == "placeholder"]
    assert static.count(False) == 1, "weights are known"
    made = compile_graph(gm, inputs, Config.from_options({}, mode="reduce-overhead"))
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(made(*inputs)[0], gm(*inputs)[0])
    assert isinstance(made, Replayed) and (tape.recorded, tape.launched) == (1, 2)


# --- memory that waits ----------------------------------------------------------------------------------------


def spec(name: str, size: int, scope: str = "stream") -> StateTensor:
    return StateTensor(name, scope, (size,), (1,), torch.float32, torch.device("cpu"))


def test_memory_serves_the_next_state_like_it_and_no_other():
    reserve, small, large = Reserve(), [spec("a", 8), spec("b", 4)], [spec("a", 16)]
    states = [allocate(small, reserve=reserve) for _ in range(2)]
    weights = allocate([spec("w", 2, "weights")], reserve=reserve)
    addresses = [[t.data_ptr() for t in state.tensors] for state in states]
    held = [tensor for state in (*states, weights) for tensor in state.tensors]  # nothing else may lie there
    assert reserve.state_bytes == 0, "in use"
    states.clear()
    del weights
    assert reserve.state_bytes == 2 * 48 + 8
    again = [allocate(small, reserve=reserve) for _ in range(2)]
    assert sorted([t.data_ptr() for t in state.tensors] for state in again) == sorted(addresses)
    again.clear()
    two_kinds = [allocate(kind, reserve=reserve) for kind in (small, small)] + [allocate(large, reserve=reserve)]
    two_kinds.clear()
    assert reserve.state_bytes == 2 * 48 + 64 + 8, "blocks of two kinds"
    other = allocate([spec("a", 32)], reserve=reserve)
    assert reserve.state_bytes == 8, "another layout frees what waits in its scope"
    reserve.release()
    del other
    assert reserve.state_bytes == 0, "and after a release nothing of before waits"
    assert held
