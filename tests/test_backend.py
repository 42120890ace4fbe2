"""The whole path on a small model: programs, state, schedule, and what happens when things go wrong."""

import logging

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import chipmunk_compile
from chipmunk_compile import OptionError, backend
from chipmunk_compile.runner import Runner
from chipmunk_compile.schedule import Program
from tests.toy_dit import SMALL, Loop, compile_toy, toy, worst

EXACT = {"attention.sparsity": 0.0, "mlp.sparsity": 0.0}
SPARSE = {"attention.sparsity": 0.5, "mlp.sparsity": 0.5}


def calls(*names):
    counts = chipmunk_compile.counters()
    return tuple(counts[name] for name in names)


def test_the_delta_program_runs_every_column_at_sparsity_zero():
    model = toy()
    compiled, runners = compile_toy(model, **EXACT)
    loop = Loop(batch=3)
    assert worst(loop.run(compiled), loop.run(model)) < 1e-5
    assert calls("dense", "refresh", "delta", "generations") == (0, 3, 3, 1)
    graph = runners[0].programs.graph(Program.DELTA).graph
    targets = [node.target for node in graph.nodes]
    assert targets.count(torch.ops.chipmunk.attention_delta.default) == 2
    assert targets.count(torch.ops.chipmunk.mlp_delta.default) == 2
    assert torch.ops.aten.scaled_dot_product_attention.default not in targets


def test_sparse_steps_are_near_and_not_equal():
    model = toy()
    compiled, _ = compile_toy(model, **SPARSE)
    loop = Loop()
    error = worst(loop.run(compiled), loop.run(model))
    assert 1e-5 < error < 0.2


@pytest.mark.parametrize("sparsity", [0.3, 0.9, 1.0])
def test_a_step_whose_inputs_did_not_change_reproduces_dense(sparsity):
    model = toy()
    compiled, _ = compile_toy(model, steps=6, **{"attention.sparsity": sparsity, "mlp.sparsity": sparsity})
    inputs = next(iter(Loop()))
    with torch.no_grad():
        outputs = [compiled(*inputs) for _ in range(4)]
    assert calls("refresh", "delta") == (2, 2)
    assert worst(outputs, 4 * [model(*inputs)]) < 1e-5


def test_the_work_that_runs_falls_as_explain_predicts():
    """Matrix FLOPs of one call, dense and delta, by the shapes that each op really got."""
    model, inputs = toy(), next(iter(Loop()))
    options = {**SMALL, "attention.sparsity": 0.75, "mlp.sparsity": 0.5}
    compiled, runners = compile_toy(model, **options)
    with torch.no_grad():
        compiled(*inputs)
        with FlopCounterMode(display=False) as dense, sdpa_kernel(SDPBackend.MATH):  # the fused kernel is not counted
            model(*inputs)
    programs = runners[0].programs
    lifted = [tensor.empty() for tensor in programs.state]
    for tensor in lifted:
        if tensor.dtype == torch.int32 and tensor.dim() > 2:
            tensor.zero_()  # columns and counts
    graph = programs.graph(Program.DELTA)
    arguments = [n.meta["val"] for n in programs.plan.canonical.graph.nodes if n.op == "placeholder"]
    with torch.no_grad(), FlopCounterMode(display=False) as delta:
        graph(*(torch.zeros(a.shape, dtype=a.dtype) for a in arguments), *lifted)
    report = chipmunk_compile.explain(model, *inputs, options=options)
    assert sum(g.dense_flops for g in report.graphs) == dense.get_total_flops()
    assert sum(g.delta_flops for g in report.graphs) == delta.get_total_flops()
    assert 0.5 < report.delta_share < 0.7


def test_weights_changed_in_place_between_generations_are_seen():
    model = toy()
    compiled, _ = compile_toy(model, **EXACT)
    loop = Loop()
    loop.run(compiled)
    for block in model.blocks:  # a LoRA fused as PEFT does it: no version counter and no address moves
        block.down.weight.data += 0.1 * torch.randn(32, 4) @ torch.randn(4, 128)
        block.up.weight.data.copy_(torch.randn_like(block.up.weight) / 6)
    assert worst(loop.run(compiled), loop.run(model)) < 1e-5
    assert calls("delta") == (6,)


def test_a_forward_that_raises_drops_its_state():
    model = toy()
    compiled, runners = compile_toy(model, **EXACT)
    steps = list(Loop(steps=8))
    with torch.no_grad():
        for inputs in steps[:3]:
            compiled(*inputs)
        programs, run = runners[0].programs, runners[0].programs.run

        def interrupted(program, args, state=None, begins=True):
            for tensor in state.tensors:
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))  # half written
            raise MemoryError("half way")

        programs.run = interrupted
        with pytest.raises(MemoryError):
            compiled(*steps[3])
        programs.run = run
        before = calls("refresh")[0]
        output = compiled(*steps[4])
        assert calls("refresh")[0] == before + 1
        assert worst([output], [model(*steps[4])]) < 1e-5


def test_reset_drops_state_and_the_next_step_refreshes():
    model = toy()
    compiled, _ = compile_toy(model, **EXACT)
    steps = list(Loop(steps=8))
    with torch.no_grad():
        for inputs in steps[:4]:
            compiled(*inputs)
        assert chipmunk_compile.counters()["state_bytes"] > 0
        chipmunk_compile.reset()
        assert set(chipmunk_compile.counters().values()) == {0}
        output = compiled(*steps[4])
    assert calls("refresh", "delta", "compiles") == (1, 0, 0)
    assert worst([output], [model(*steps[4])]) < 1e-5


def test_disabled_is_dense_and_what_follows_is_sound():
    model = toy()
    compiled, _ = compile_toy(model, **EXACT)
    steps = list(Loop(steps=8))
    with torch.no_grad():
        for inputs in steps[:3]:
            compiled(*inputs)
        with chipmunk_compile.disabled():
            assert torch.allclose(compiled(*steps[3]), model(*steps[3]), atol=1e-5)
        assert calls("dense") == (1,)
        outputs = [compiled(*inputs) for inputs in steps[4:]]
    assert worst(outputs, [model(*inputs) for inputs in steps[4:]]) < 1e-5


def test_two_models_share_neither_clock_nor_state():
    models = [toy(seed, broken=True) for seed in (1, 2)]  # both with a graph break
    compiled = [compile_toy(model, **EXACT)[0] for model in models]
    loops = [Loop(seed=1), Loop(seed=2, start=0.7)]
    outputs, references = [], []
    with torch.no_grad():
        for pair in zip(*loops):
            for model, fast, inputs in zip(models, compiled, pair):
                outputs.append(fast(*inputs))
                references.append(model(*inputs))
    assert worst(outputs, references) < 1e-5
    assert calls("dense", "refresh", "delta", "generations") == (0, 12, 12, 2)


def test_a_graph_called_before_the_clock_is_left_dense():
    class EarlyBreak(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.model = toy(1).blocks[0], toy(2)

        def forward(self, x, t, prompt):
            h = self.before(x @ torch.ones(6, 32), torch.ones(len(x), 32))
            torch._dynamo.graph_break()
            return self.model(x + h[..., :6], t, prompt)

    model = EarlyBreak().eval().requires_grad_(False)
    compiled, _ = compile_toy(model, **EXACT)
    loop = Loop()
    assert worst(loop.run(compiled), loop.run(model)) < 1e-5
    assert calls("dense", "refresh", "delta") == (6, 3, 3)


def test_steps_given_outright_read_nothing(monkeypatch):
    monkeypatch.setattr("chipmunk_compile.evidence.read_evidence", lambda *_: pytest.fail("read from the device"))
    model = toy()
    compiled, _ = compile_toy(model, steps=6, streams=2, **EXACT)
    outputs, references = [], []
    with torch.no_grad():
        for pair in zip(Loop(seed=1), Loop(seed=2)):
            for inputs in pair:
                outputs.append(compiled(*inputs))
                references.append(model(*inputs))
    assert worst(outputs, references) < 1e-5
    assert calls("refresh", "delta", "streams", "generations", "state_bytes") == (6, 6, 2, 1, 0)


def test_generation_says_where_one_starts_and_frees_it():
    model = toy()
    compiled, _ = compile_toy(model, **EXACT)
    steps = list(Loop(steps=8))
    with torch.no_grad():
        for _ in range(2):
            with chipmunk_compile.generation(compiled, steps=4):
                outputs = [compiled(*inputs) for inputs in steps[:4]]
            assert chipmunk_compile.counters()["state_bytes"] == 0
        with chipmunk_compile.generation():
            outputs += [compiled(*inputs) for inputs in steps[:4]]
    assert worst(outputs, 2 * [model(*inputs) for inputs in steps[:4]]) < 1e-5
    assert calls("generations") == (3,)
    with pytest.raises(ValueError, match="steps"):
        chipmunk_compile.generation(model, steps=0)


def test_inductors_cpp_wrapper():
    model, loop = toy(), Loop()
    compiled, _ = compile_toy(model, **EXACT, inductor={"cpp_wrapper": True})
    assert worst(loop.run(compiled), loop.run(model)) < 1e-5
    assert calls("refresh", "delta") == (3, 3)


def test_gradients_are_left_to_inductor_with_one_warning(caplog, monkeypatch):
    monkeypatch.setattr(backend, "_warned_of_training", False)
    model = toy().requires_grad_(True)
    compiled, _ = compile_toy(model)
    with caplog.at_level(logging.WARNING, "chipmunk_compile"):
        for _ in range(2):
            compiled(*next(iter(Loop()))).sum().backward()
            torch._dynamo.reset()
    assert model.blocks[0].up.weight.grad.abs().sum() > 0
    assert len(caplog.records) == 1 and "no_grad" in caplog.text
    assert calls("refresh", "delta") == (0, 0)


def test_without_parameters_there_is_no_owner():
    def pure(x, t, prompt):
        h = torch.nn.functional.scaled_dot_product_attention(*3 * [x[:, None]])
        return h[:, 0] * t.cos() + t.sin()

    compiled, runners = compile_toy(pure)
    loop = Loop()
    assert worst(loop.run(compiled), loop.run(pure)) < 1e-5
    assert calls("refresh", "delta") == (0, 0)
    assert not isinstance(runners[0], Runner)


def test_unsupported_dtypes_stay_dense():
    model = toy().double()
    compiled, _ = compile_toy(model)
    inputs = [tensor.double() for tensor in next(iter(Loop()))]
    with torch.no_grad():
        assert torch.equal(compiled(*inputs), compiled(*inputs))
    assert calls("refresh", "delta") == (0, 0)
    report = chipmunk_compile.explain(model, *inputs, options={"min_tokens": 8})
    assert {site.reason for site in report.sites} >= {chipmunk_compile.Reason.UNSUPPORTED_DTYPE}


def test_bad_options_fail_when_the_model_is_called_and_say_why():
    compiled, _ = compile_toy(toy(), **{"attention.sparsety": 0.5})
    with pytest.raises(Exception, match="attention.sparsity") as caught, torch.no_grad():
        compiled(*next(iter(Loop())))
    assert isinstance(caught.value.inner_exception, OptionError)


def test_a_grid_that_does_not_fit_names_the_tokens_there_are():
    """TOKENS is 63 and TEXT 5: 8 x 8 patches cannot be meant. A grid that fits is taken, and changes no output."""
    model, loop = toy(), Loop()
    compiled, _ = compile_toy(model, grid=(1, 8, 8))
    with pytest.raises(Exception, match=r"grid=\(1, 8, 8\) makes 64 tokens; .* over 68 tokens") as caught:
        loop.run(compiled)
    assert isinstance(caught.value.inner_exception, OptionError)
    assert calls("dense", "refresh", "delta", "compiles") == (0, 0, 0, 0), "nothing is half compiled"
    torch._dynamo.reset()
    compiled, _ = compile_toy(model, grid=(1, 7, 9), **EXACT)
    assert worst(loop.run(compiled), loop.run(model)) < 1e-5


class Counting(torch.nn.Module):
    """Writes a buffer and an input in place, and returns a view of an input."""

    def __init__(self):
        super().__init__()
        self.model = toy()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, t, prompt, log):
        self.calls.add_(1)
        log[0] += x.mean()
        return self.model(x, t, prompt), prompt.transpose(1, 2), log


def test_mutated_buffers_and_inputs_and_aliases_keep_working():
    model = Counting()
    compiled, _ = compile_toy(model, **EXACT)
    fast_log, log = torch.zeros(3), torch.zeros(3)
    with torch.no_grad():
        for number, inputs in enumerate(Loop(), start=1):
            model.calls.fill_(number - 1)
            output, view, returned = compiled(*inputs, fast_log)
            assert model.calls == number
            reference, _, _ = model(*inputs, log)
            assert worst([output], [reference]) < 1e-5
            assert view.data_ptr() == inputs[2].data_ptr() and returned is fast_log
    assert torch.allclose(fast_log, log, atol=1e-6) and log[0] != 0
    assert calls("refresh", "delta") == (3, 3)


def test_writing_to_an_input_that_overlaps_another_is_left_dense():
    model = Counting()
    compiled, _ = compile_toy(model, **EXACT)
    base, fast_base = torch.zeros(2, 63, 6), torch.zeros(2, 63, 6)
    with torch.no_grad():
        _, time, prompt = next(iter(Loop()))
        reference = model(base[:1], time, prompt, base[0, 0])[0]
        output = compiled(fast_base[:1], time, prompt, fast_base[0, 0])[0]
    assert worst([output], [reference]) < 1e-5
    assert calls("refresh", "delta") == (0, 0)
