"""Fetch, arrive, store: how many, where, and that no order of copies that they allow changes a result."""

import functools
import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from chipmunk_compile.config import Config
from chipmunk_compile.kernels import transfer
from chipmunk_compile.passes import PASSES
from chipmunk_compile.passes.attention_sites import find_attention
from chipmunk_compile.passes.lower import Treatment, kept_state, lift_state, lower, site_caches
from chipmunk_compile.passes.mlp_sites import find_mlps
from chipmunk_compile.passes.offload import DEPTH, movable_sites, offload, offload_state
from chipmunk_compile.passes.repeats import find_repeats
from chipmunk_compile.programs import compile_graph
from tests.capture import capture
from tests.toy_dit import Loop, toy
from tests.weights import write_weights

chipmunk = torch.ops.chipmunk
LAYERS, CHUNKS = 5, (32, 32, 4)
KINDS = {"attention": ("attention",), "all": ("attention", "mlp")}


class Late(transfer.Plain):
    """Copies that begin as late as they may: when something waits for them, those before them first."""

    def __init__(self):
        super().__init__()
        self.waiting = []

    def fetch(self, caches, home):
        self.waiting.append((caches[0].data_ptr(), lambda: transfer._copy(caches, home)))

    def store(self, caches, home):
        self.waiting.append((caches[0].data_ptr(), lambda: transfer._copy(home, caches)))

    def arrive(self, caches):
        mine = [i for i, (address, _) in enumerate(self.waiting) if address == caches[0].data_ptr()]
        done = mine[-1] + 1 if mine else 0
        for _, copy in self.waiting[:done]:
            copy()
        del self.waiting[:done]


@pytest.fixture(params=["at once", "late"])
def copies(request, monkeypatch):
    if request.param == "late":
        monkeypatch.setattr(transfer, "_plain", Late())


@functools.cache
def prepare(kept=(17, 51)):
    """No pass under test changes what it is given."""
    (gm,) = capture(toy(layers=LAYERS), *next(iter(Loop())))
    for rewrite in PASSES:
        gm = rewrite(gm)
    sites = find_attention(gm, min_tokens=8)[0] + find_mlps(gm, min_tokens=8)[0]
    return gm, [Treatment(site, kept[site.kind == "mlp"], 4, CHUNKS) for site in sites]


def program(gm, treatments, movable, name):
    return offload(lower(gm, treatments, name), treatments, movable, name)


def targets(gm, *wanted):
    return [node.target for node in gm.graph.nodes if node.target in wanted]


@pytest.mark.parametrize(
    "kinds, name, fetches, arrives, stores, keeps, copies",
    [
        ("attention", "refresh", 0, 5, 5, 0, 15),  # an MLP's caches stay where they are, three each
        ("attention", "delta", 5, 5, 0, 0, 0),
        ("all", "refresh", 0, 10, 10, 15, 0),
        ("all", "delta", 10, 10, 5, 0, 0),  # a delta writes an MLP's caches
    ],
)
def test_op_counts(kinds, name, fetches, arrives, stores, keeps, copies):
    gm, treatments = prepare()
    made = program(gm, treatments, movable_sites(gm, treatments, KINDS[kinds]), name)
    ops = (chipmunk.fetch, chipmunk.arrive, chipmunk.store, chipmunk.keep, torch.ops.aten.copy_)
    found = targets(made, *(op.default for op in ops))
    assert tuple(found.count(op.default) for op in ops) == (fetches, arrives, stores, keeps, copies)


def test_each_fetch_stands_behind_the_last_use_of_its_slot():
    gm, treatments = prepare()
    made = program(gm, treatments, movable_sites(gm, treatments, KINDS["attention"]), "delta")
    letters = {chipmunk.fetch.default: "f", chipmunk.arrive.default: "a", chipmunk.attention_delta.default: "U"}
    calls = [node for node in made.graph.nodes if node.op == "call_function"]
    order = "".join(letters.get(node.target, ".") for node in calls)
    assert order.startswith("f" * DEPTH + ".")
    assert re.findall("[faU]+", order)[1:] == ["aUf"] * (LAYERS - DEPTH) + ["aU"] * DEPTH


def test_where_no_column_is_kept_nothing_moves():
    gm, treatments = prepare(kept=(0, 0))
    assert movable_sites(gm, treatments, KINDS["all"]) == ()
    assert offload_state(treatments, ()) == []


def test_sites_are_taken_in_the_order_of_the_graph():
    gm, treatments = prepare()
    kinds = [treatments[n].site.kind for n in movable_sites(gm, treatments, KINDS["all"])]
    assert kinds == ["attention", "mlp"] * LAYERS


def lay_out(treatments, movable, away):
    """State in which the caches of the sites `away` pass through a ring, and the others are their own homes.

    Poisoned: what is read too early is seen.
    """
    specs = [*lift_state(treatments), *offload_state(treatments, movable)]
    tensors = {spec.name: spec.empty() for spec in specs if spec.scope != "home"}
    rings = {}
    for turn, number in enumerate(movable):
        for part, spec in enumerate(site_caches(number, treatments[number])):
            if number in away:
                kind = treatments[number].site.kind
                tensors[spec.name] = rings.setdefault((turn % DEPTH, kind, part), tensors[spec.name])
                tensors[f"home_{spec.name}"] = spec.empty()
            else:
                tensors[f"home_{spec.name}"] = tensors[spec.name]
    for spec in specs:
        if spec.value is None:
            tensors[spec.name].fill_(torch.nan if spec.dtype.is_floating_point else 0)
    return [tensors[spec.name] for spec in specs]


def run(programs, inputs, state):
    """One refresh and four deltas on inputs that move."""
    outputs = []
    with torch.no_grad():
        for step in range(5):
            outputs += programs["delta" if step else "refresh"](*[i * (1 + step / 20) for i in inputs], *state)
    return outputs


def real_inputs(gm):
    torch.manual_seed(0)
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    return [torch.randn(node.meta["val"].shape) / 4 for node in placeholders]


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("share", ["all", "every other", "none"])
@pytest.mark.usefixtures("copies")
def test_programs_equal_those_that_keep_all_state_on_the_device(kinds, share):
    gm, treatments = prepare()
    movable = movable_sites(gm, treatments, KINDS[kinds])
    assert not kept_state(gm)
    away = {"all": movable, "every other": movable[::2], "none": ()}[share]
    inputs, names = real_inputs(gm), ("refresh", "delta")
    state = write_weights(gm, treatments, inputs, [t.empty() for t in lift_state(treatments)])
    plain = run({n: lower(gm, treatments, n) for n in names}, inputs, state)
    programs = {n: program(gm, treatments, movable, n) for n in names}
    moved = run(programs, inputs, write_weights(gm, treatments, inputs, lay_out(treatments, movable, away)))
    assert len(plain) == len(moved) == 5
    assert all(torch.equal(a, b) for a, b in zip(plain, moved))
    assert not any(torch.equal(a, b) for a, b in zip(plain, plain[1:])), "steps differ"


@pytest.mark.parametrize("left_out", ["arrive", "fetch", "store"])
def test_every_kind_of_node_is_needed(left_out, monkeypatch):
    monkeypatch.setattr(transfer, "_plain", Late())
    gm, treatments = prepare()
    movable = movable_sites(gm, treatments, KINDS["attention"])
    names = ("refresh", "delta")
    inputs = real_inputs(gm)
    state = write_weights(gm, treatments, inputs, [t.empty() for t in lift_state(treatments)])
    plain = run({n: lower(gm, treatments, n) for n in names}, inputs, state)
    programs = {n: program(gm, treatments, movable, n) for n in names}
    for made in programs.values():
        for node in list(made.graph.nodes):
            if node.target is getattr(chipmunk, left_out).default:
                made.graph.erase_node(node)
        made.recompile()
    moved = run(programs, inputs, write_weights(gm, treatments, inputs, lay_out(treatments, movable, movable)))
    assert torch.equal(plain[0], moved[0]), "a refresh reads no state"
    assert not all(torch.equal(a, b) for a, b in zip(plain, moved))


@pytest.mark.slow
def test_inductor_issues_copies_where_they_stand():
    gm, treatments = prepare()
    movable = movable_sites(gm, treatments, KINDS["attention"])
    args = [*real_inputs(gm), *lay_out(treatments, movable, movable)]

    def compiled():
        return compile_graph(program(gm, treatments, movable, "delta"), args, Config())(*args)

    with torch.no_grad():
        program(gm, treatments, movable, "refresh")(*args)
        _, sources = run_and_get_code(compiled)
    bodies = [source[source.index("def call(") :] for source in sources]
    pieces = [call.kind for call in find_repeats(program(gm, treatments, movable, "delta"))]
    assert len(bodies) == len(set(pieces)) < len(pieces), "a source for each kind of piece, in their order"
    body = "".join(bodies[kind] for kind in pieces)
    calls = re.findall(r"chipmunk\.(\w+)\.default\(|extern_kernels\.(\w+)\(|(cpp_fused)\w*\(", body)
    letters = {"fetch": "f", "arrive": "a", "attention_delta": "U"}
    order = "".join(letters.get(first, ".") for first, *_ in calls)
    assert order.startswith("f" * DEPTH + ".")
    assert re.findall("[faU]+", order)[1:] == ["aUf"] * (LAYERS - DEPTH) + ["aU"] * DEPTH
    assert "clone" not in body and "copy_" not in body
