"""Shared by the tests of the token permutation: canonical graphs, their inputs, double precision."""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map

from chipmunk_compile.passes.canonical import canonicalise
from chipmunk_compile.passes.sites import AttentionSite
from chipmunk_compile.passes.token_axis import ATTENTION, query_and_key
from chipmunk_compile.passes.token_links import Link, Operand, Signature, call_of

_WIDE = {torch.float32: torch.float64, torch.bfloat16: torch.float64, torch.complex64: torch.complex128}


def captured(model: torch.nn.Module, kwargs: dict) -> list[tuple[fx.GraphModule, list]]:
    """The canonical graphs of one call, each with the real inputs it was first called with."""
    out: list[tuple[fx.GraphModule, list]] = []

    def backend(gm, inputs, **_):
        graph = canonicalise(gm, inputs)

        def run(*args):
            if not any(known is graph for known, _ in out):
                out.append((graph, list(args)))
            return gm.forward(*args)

        return run

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(**kwargs)
    torch._dynamo.reset()
    return out


def traced(function, *inputs: torch.Tensor) -> fx.GraphModule:
    """The pre-dispatch ATen graph of a function without mutation; quicker than Dynamo."""
    return make_fx(function, tracing_mode="fake", pre_dispatch=True)(*inputs)


class InDouble(fx.Interpreter):
    """Runs a graph with every float32 in it, constants and casts too, read as float64."""

    def placeholder(self, target, args, kwargs):
        return _widened(super().placeholder(target, args, kwargs))

    def get_attr(self, target, args, kwargs):
        return _widened(super().get_attr(target, args, kwargs))

    def call_function(self, target, args, kwargs):
        if not isinstance(target, torch._ops.OpOverload):
            return super().call_function(target, args, kwargs) if target is operator.getitem else None  # autocast
        args, kwargs = tree_map(_wide_dtype, (args, kwargs))
        return _widened(target(*args, **kwargs))


def _wide_dtype(value):
    return _WIDE.get(value, value) if isinstance(value, torch.dtype) else value


def _widened(value):
    return tree_map(lambda x: x.to(_WIDE.get(x.dtype, x.dtype)) if isinstance(x, torch.Tensor) else x, value)


def in_double(gm: fx.GraphModule, *inputs) -> list[torch.Tensor]:
    """The outputs of a graph in double precision."""
    with torch.no_grad():
        return list(InDouble(gm).run(*inputs))


def difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """The largest difference of two lists of outputs, relative to the largest value of each output."""
    assert len(a) == len(b) and all(x.shape == y.shape for x, y in zip(a, b))
    return max(((x - y).abs().max() / y.abs().max().clamp_min(1e-30)).item() for x, y in zip(a, b))


class CheckingLinks(InDouble):
    """Checks every link of every new signature on the values that flow through the graph."""

    def __init__(self, gm: fx.GraphModule, seen: set):
        super().__init__(gm)
        self.seen, self.checked = seen, 0

    def run_node(self, node: fx.Node):
        result = super().run_node(node)
        call = call_of(node)
        if call is not None and call.signature not in self.seen:
            self.seen.add(call.signature)
            self.checked += assert_links_hold(call.signature, call.links, [self.env[x] for x in call.inputs])
        return result


def assert_links_hold(signature: Signature, links: tuple[Link, ...], inputs: list[torch.Tensor]) -> int:
    """Permutes the input spans of each link and demands permuted outputs; how many it checked."""
    if "empty" in str(signature.target):  # no values to compare
        return 0
    plain = evaluate(signature, inputs)
    for link in links:
        order = torch.randperm(link.spans[0].length)
        while link.spans[0].length > 1 and torch.equal(order, torch.arange(len(order))):
            order = torch.randperm(link.spans[0].length)
        moved = [shuffled(x, k, link, order) for k, x in enumerate(inputs)]
        expected = [shuffled(x, ~k, link, order) for k, x in enumerate(plain)]
        for got, want in zip(evaluate(signature, moved), expected):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, equal_nan=True, msg=f"{signature} {link}")
    return len(links)


def evaluate(signature: Signature, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The outputs of an op on the given tensors, in double precision."""

    def value(argument):
        if isinstance(argument, Operand):
            return inputs[argument.slot]
        return [value(a) for a in argument] if isinstance(argument, tuple) else _wide_dtype(argument)

    args, kwargs = [], {}
    for argument, given in zip(signature.target._schema.arguments, signature.values):
        if argument.kwarg_only:
            kwargs[argument.name] = value(given)
        else:
            args.append(value(given))
    out = signature.target(*args, **kwargs)
    return [x for x in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(x, torch.Tensor)]


def shuffled(x: torch.Tensor, slot: int, link: Link, order: torch.Tensor) -> torch.Tensor:
    """`x`, in its role `slot`, with every span of the link reordered."""
    for span in link.spans:
        if span.slot == slot:
            index = torch.arange(x.shape[span.dim])
            index[span.start : span.start + span.length] = order + span.start
            x = x.index_select(span.dim, index)
    return x


def attention_sites(gm: fx.GraphModule) -> list[AttentionSite]:
    """Every SDPA of a graph with as many queries as keys."""
    out = []
    for node in gm.graph.nodes:
        if node.target is not ATTENTION:
            continue
        query, key = query_and_key(node)
        q, k = query.meta["val"].shape, key.meta["val"].shape
        if q[-2] == k[-2]:
            batch, heads, kv_heads = ((1, 1, 1, *q)[-4], (1, 1, *q)[-3], (1, 1, *k)[-3])
            value = (*node.args, *node.kwargs.values())[2]
            out.append(
                AttentionSite(
                    node, node.name, query, key, value, None, 1.0, batch, heads, kv_heads, q[-2], k[-2], q[-1]
                )
            )
    return out


def gathers_of(gm: fx.GraphModule) -> list[fx.Node]:
    """What `permute_tokens` put into a graph."""
    return [
        node
        for node in gm.graph.nodes
        if node.target is torch.ops.aten.index_select.default and node.args[2].name.startswith("token_order")
    ]


def without(gm: fx.GraphModule, gather: fx.Node) -> fx.GraphModule:
    """A copy of a permuted graph in which one gather is left out."""
    copy = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        mapped[node] = mapped[node.args[0]] if node is gather else copy.node_copy(node, mapped.__getitem__)
    return fx.GraphModule(gm, copy)
