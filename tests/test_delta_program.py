"""Whole delta programs against the formulas, computed independently in float64.

The emulator below runs the toy model's own forward in float64 with attention and MLP replaced by what the method says:
at a refresh everything is computed and cached; at a delta, for each chunk, `o = o_cache + softmax over the chosen
columns`, and `out_cache += (act(x W1_S) - act_cache_S) W2_S`. It shares no code with the ops; of the program it takes
only which columns and which sample tokens were chosen at the refresh.
"""

import copy

import pytest
import torch

from chipmunk_compile.schedule import Program
from tests.toy_dit import ACTIVATIONS, GATED, SMALL, Loop, compile_toy, toy

CHUNK, SAMPLES = SMALL["attention.chunk"], 4
KEPT_COLUMNS, KEPT_NEURONS = 17, 51  # of 68 and of 128
OPTIONS = {
    "attention.sparsity": 0.75,
    "mlp.sparsity": 0.6,
    "attention.samples": SAMPLES,
    "mlp.samples": SAMPLES,
    "schedule.warmup": 1,
    "steps": 60,
}


class Emulator:
    """One block's attention and MLP as the method defines them, in float64."""

    def __init__(self, block, rounding):
        self.block, self.rounding = block, rounding
        self.delta, self.columns, self.samples = False, None, None
        block.attend, block.mlp = self.attend, self.mlp

    def chunks(self, tokens):
        return [slice(start, min(start + CHUNK, tokens)) for start in range(0, tokens, CHUNK)]

    def attend(self, q, k, v):
        scale = q.shape[-1] ** -0.5
        if not self.delta:
            self.o_dense = torch.softmax(scale * q @ k.mT, -1) @ v
            self.o_cache = self.o_dense - self.sparse(q, k, v, scale)
            return self.o_dense
        return self.rounding(self.o_cache) + self.sparse(q, k, v, scale)

    def sparse(self, q, k, v, scale):
        o = torch.zeros_like(q)
        for b in range(q.shape[0]):
            for h in range(q.shape[1]):
                for c, rows in enumerate(self.chunks(q.shape[2])):
                    chosen = self.columns[b, h, c].long()
                    weights = torch.softmax(scale * q[b, h, rows] @ k[b, h, chosen].T, -1)
                    o[b, h, rows] = weights @ v[b, h, chosen]
        return o

    def mlp(self, x):
        up, down = self.block.up, self.block.down
        h = torch.nn.functional.linear(x, up.weight, up.bias)
        act = self.rounding(
            ACTIVATIONS[self.block.activation](*h.chunk(2 if self.block.activation in GATED else 1, -1))
        )
        if not self.delta:
            self.act, self.out = act.clone(), act @ down.weight.T + down.bias
            return self.out
        norms = down.weight.norm(dim=0)
        for b in range(x.shape[0]):
            for c, rows in enumerate(self.chunks(x.shape[1])):
                tokens = self.samples[c].long()
                change = (act[b, tokens] - self.act[b, tokens]).abs().sum(0) * norms
                chosen = change.topk(KEPT_NEURONS).indices
                update = act[b, rows][:, chosen] - self.act[b, rows][:, chosen]
                self.out[b, rows] += update @ down.weight[:, chosen].T
                self.act[b, rows, chosen] = act[b, rows, chosen]
        return self.out.clone()


def state_of(runner):
    """The one stream's state, by name, and the plan's tables."""
    (owner,) = runner._owners._known.values()
    (stream,) = owner.root.counted.live
    (state,) = stream.states.values()
    named = dict(zip([t.name for t in runner.programs.scope("stream")], state.tensors))
    return named | {t.name: t.value for t in runner.programs.scope("table")}


def compare(activation, batch, dtype, steps):
    """Largest relative error of each delta step of a one-block model, against the emulator."""
    model = toy(layers=1, activation=activation).to(dtype)
    truth = copy.deepcopy(model).double()
    emulator = Emulator(truth.blocks[0], lambda t: t.to(dtype).double())
    compiled, runners = compile_toy(model, **OPTIONS, **{"schedule.refresh_every": steps + 1})
    errors = []
    with torch.no_grad():
        for step, inputs in enumerate(Loop(steps=steps, batch=batch)):
            inputs = [t.to(dtype) for t in inputs]
            output = compiled(*inputs)
            state = state_of(runners[0])
            if step == 0:
                emulator.columns = state["columns_0"]
                (samples,) = [v for name, v in state.items() if name.startswith("sample_tokens")]
                emulator.samples = samples
                assert emulator.columns.shape == (batch, 2, 3, KEPT_COLUMNS)
            emulator.delta = step > 0
            expected = truth(*(t.double() for t in inputs))
            errors.append(((output.double() - expected).norm() / expected.norm()).item())
    assert runners[0].programs._compiled.keys() == {(Program.REFRESH, False), (Program.DELTA, False)}
    return errors


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_delta_program_is_the_formula(activation, batch):
    assert max(compare(activation, batch, torch.float32, steps=5)) < 1e-5


def test_fifty_steps_do_not_drift():
    errors = compare("gelu_tanh", 1, torch.float32, steps=50)
    assert max(errors) < 1e-5
    assert max(errors[-10:]) < 4 * max(errors[1:11])


def test_bfloat16_stays_at_its_own_rounding():
    errors = compare("gelu_tanh", 1, torch.bfloat16, steps=50)
    assert max(errors) < 2e-2
    assert max(errors[-10:]) < 3 * max(errors[1:11])
