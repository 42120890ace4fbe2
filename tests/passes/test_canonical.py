"""Dynamo graph -> functional ATen: one spelling, placeholders in place, mutation as copy_ at the end."""

import torch

from chipmunk_compile.passes.canonical import canonicalise
from tests.capture import capture

aten = torch.ops.aten


def targets(gm):
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


class Mutating(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(6, 6)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x, y):
        self.steps.add_(1)
        y[:, 0] = self.linear(x)[:, 0]
        return y * self.steps


def test_mutated_inputs_are_written_at_the_end():
    (gm,) = capture(Mutating().eval(), torch.randn(3, 6), torch.randn(3, 6))
    assert targets(gm).count(aten.copy_.default) == 2
    written = [n for n in gm.graph.nodes if n.op == "call_function" and n.target._schema.is_mutable]
    assert {n.target for n in written} == {aten.copy_.default}
    assert all(n.args[0].op == "placeholder" for n in written)
    args = [torch.randn(n.meta["val"].shape) for n in gm.graph.nodes if n.op == "placeholder"]
    before = [a.clone() for a in args]
    (output,) = gm(*args)
    changed = [a for a, b in zip(args, before) if not torch.equal(a, b)]
    assert sorted(a.dim() for a in changed) == [0, 2]
    y, steps = (next(a for a in changed if a.dim() == d) for d in (2, 0))
    torch.testing.assert_close(output, y * steps)


def test_a_pure_graph_writes_nothing_and_keeps_composite_ops_whole():
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)

        def forward(self, x):
            q = self.linear(x).unflatten(-1, (2, 4)).transpose(1, 2)
            o = torch.nn.functional.scaled_dot_product_attention(q, q, q)
            return torch.nn.functional.gelu(torch.nn.functional.layer_norm(o, (4,)))

    model, x = Plain().eval(), torch.randn(2, 5, 8)
    (gm,) = capture(model, x)
    found = targets(gm)
    for whole in (
        aten.linear.default,
        aten.scaled_dot_product_attention.default,
        aten.gelu.default,
        aten.layer_norm.default,
    ):
        assert found.count(whole) == 1
    assert aten.copy_.default not in found
    assert all("val" in node.meta for node in gm.graph.nodes if node.op == "call_function")


def test_tensors_that_the_graph_holds_are_no_inputs():
    table = torch.randn(5, 8)

    class Holding(torch.nn.Module):
        def forward(self, x):
            return x + torch.tensor([1.0, 2.0]) @ torch.ones(2, 8) + table  # addition commutes: any order will do

    x, model = torch.randn(5, 8), Holding()
    (gm,) = capture(model, x)
    args = [x, table][: sum(n.op == "placeholder" for n in gm.graph.nodes)]
    torch.testing.assert_close(gm(*args)[0], model(x))


def test_an_export_that_fails_inside_a_vmap_leaves_nothing_behind():
    """Block masks are made by a vmap over a function of indices, which reaches a graph as pushed and popped levels."""
    from torch.nn.attention.flex_attention import create_block_mask

    class Masked(torch.nn.Module):
        def forward(self, x):
            mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 128, 128, device="cpu", _compile=False)
            return x * mask.kv_num_blocks.sum()

    model, x, depths, failed = Masked(), torch.randn(2, 3), [], []

    def backend(gm, inputs, **_):
        try:
            canonicalise(gm, inputs)
        except RuntimeError as error:
            failed.append(error)
        depths.append(torch._C._functorch.get_dynamic_layer_stack_depth())
        return gm.forward

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))
    assert failed and set(depths) == {0}


def test_a_cast_that_undoes_autocast_is_kept():
    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(6, 6)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                h = self.linear(x)
                with torch.autocast("cpu", enabled=False):
                    h = self.linear(h.float())
            return h.float().exp()

    model, x = Mixed().eval(), torch.randn(3, 6)
    (gm,) = capture(model, x)
    assert targets(gm).count(aten._to_copy.default) == 1
    assert torch.get_autocast_dtype("cpu") == torch.bfloat16 and not torch.is_autocast_enabled("cpu")
    parameters = {p.shape: p for p in (*model.parameters(), x)}
    args = [parameters[n.meta["val"].shape] for n in gm.graph.nodes if n.op == "placeholder"]
    torch.testing.assert_close(gm(*args)[0], model(x), rtol=0, atol=0)
