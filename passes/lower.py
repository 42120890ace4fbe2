"""Sites -> sparse-delta ops: the refresh and the delta program of a graph, with their state as extra inputs.

State is lifted: every cached tensor is a placeholder behind the graph's own, the same list for both programs, at
addresses that stay. A refresh writes it (`copy_`, or an op that says so in its schema), a delta updates it in place.
No op looks anything up, so Inductor fuses around the ops and CUDA graphs can replay a program.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import fx

from ..kernels import ops  # noqa: F401  (defines torch.ops.chipmunk)
from ..kernels.reference import sample_table
from .canonical import clean
from .exchanges import flatten_exchanges
from .graphs import copy_graph, graph_module, part_of
from .keep_gathers import kept_gathers, use_kept
from .key_masks import attended_keys, has_boolean_mask
from .quantised import call_quantised
from .sites import AttentionSite, MlpSite

aten = torch.ops.aten


@dataclass(frozen=True)
class Treatment:
    """How one site is made sparse."""

    site: AttentionSite | MlpSite
    kept: int  # columns (keys or hidden neurons) that a delta computes for each chunk
    samples: int  # tokens of a chunk that choose its columns
    chunks: tuple[int, ...]  # lengths of the chunks, in token order; they sum to the site's tokens

    @property
    def chunk(self) -> int:
        """The longest chunk: the tile that a kernel needs."""
        return max(self.chunks)

    @property
    def columns(self) -> int:
        return self.site.kv_len if self.site.kind == "attention" else self.site.hidden

    @property
    def dense_flops(self) -> int:
        """Matrix multiplications of the dense site, two operations per multiply-add."""
        return self._flops(self.columns)

    @property
    def delta_flops(self) -> int:
        """The same for a delta step, the choice of neurons included."""
        if self.site.kind == "attention" or self.kept in (0, self.columns):
            return self._flops(self.kept)
        site = self.site
        choice = 2 * site.batch * len(self.chunks) * self.samples * site.hidden * site.in_features * len(site.up)
        return self._flops(self.kept) + choice

    @property
    def refresh_flops(self) -> int:
        """The same for a refresh: an attention's columns are chosen, and their share taken off."""
        if self.site.kind == "mlp" or not self.kept:
            return self.dense_flops
        s = self.site
        sampled = 0 if self.kept == self.columns else len(self.chunks) * self.samples
        return self.dense_flops + self.delta_flops + 2 * s.batch * s.heads * sampled * s.kv_len * s.head_dim

    def _flops(self, columns: int) -> int:
        s = self.site
        if s.kind == "attention":
            return 4 * s.batch * s.heads * s.q_len * columns * s.head_dim
        return 2 * s.batch * s.tokens * columns * (len(s.up) * s.in_features + s.out_features)


@dataclass(frozen=True)
class StateTensor:
    """One lifted tensor: what it is, before it is allocated."""

    name: str
    scope: str  # "table": fixed for the plan; "weights": per owner; "stream": per owner and stream; "home": offload.py
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    value: torch.Tensor | None = None  # of a table, on the CPU

    @property
    def bytes(self) -> int:
        extent = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride)) if math.prod(self.shape) else 0
        return extent * self.dtype.itemsize

    def empty(self) -> torch.Tensor:
        if self.value is not None:
            return self.value.to(self.device)
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


def lift_state(treatments: Sequence[Treatment]) -> list[StateTensor]:
    """All state of the treated sites, in the order in which both programs take it."""
    tensors: dict[str, StateTensor] = {}
    for number, treatment in enumerate(treatments):
        for tensor in _tables(treatment) + _caches(number, treatment):
            tensors.setdefault(tensor.name, tensor)
    return list(tensors.values())


def site_caches(number: int, treatment: Treatment, scope: str = "stream") -> list[StateTensor]:
    """Those of the site's tensors that each stream has for itself, or those of another scope but "table"."""
    return [tensor for tensor in _caches(number, treatment) if tensor.scope == scope]


def kept_state(gm: fx.GraphModule) -> list[StateTensor]:
    """The token gathers that hold still (`keep_gathers`), as state of a stream; it follows that of the sites."""
    values = [node.meta["val"] for node in kept_gathers(gm)]
    return [
        StateTensor(f"kept_{k}", "stream", tuple(v.shape), tuple(v.stride()), v.dtype, v.device)
        for k, v in enumerate(values)
    ]


def lower(
    gm: fx.GraphModule, treatments: Sequence[Treatment], program: str, masks_hold: bool = False
) -> fx.GraphModule:
    """A copy of canonical `gm` with each treated site replaced; `program` is "refresh" or "delta".

    masks_hold: boolean key masks are those of the refresh, by which columns were chosen: a delta needs them no more.

    attention:  sdpa(q, k, v)               ->  chipmunk.attention_refresh / attention_delta
    mlp:        linear(act(linear(x)))      ->  the same + copy_ into the caches / chipmunk.mlp_delta
    gathers of tokens that hold still       ->  state, made by the keep program
    """
    lowered, env = copy_graph(gm)
    graph = lowered.graph
    state: dict[str, fx.Node] = {}
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    kept = kept_state(gm)
    for tensor in [*lift_state(treatments), *kept]:
        with graph.inserting_after(last):
            last = state[tensor.name] = graph.placeholder(tensor.name)
        last.meta["lifted"] = tensor
    use_kept(gm, env, [state[tensor.name] for tensor in kept])
    for number, treatment in enumerate(treatments):
        build = _BUILDERS[treatment.site.kind, program]
        node = env[treatment.site.node]
        result = build(_Site(graph, env, state, number, treatment, node, masks_hold), node)
        if result is not node:
            result.meta.update(node.meta)
            node.replace_all_uses_with(result)
    return _runnable(lowered)


def weights_program(
    gm: fx.GraphModule, treatments: Sequence[Treatment]
) -> tuple[fx.GraphModule | None, tuple[int, ...]]:
    """(program, positions): `program(*inputs, *weights)` writes what deltas want of the weights in another form, the
    state of that scope; of the inputs of canonical `gm` it reads those at `positions`. No program where there is none.

    It is no part of a refresh, since weights hold still: of FLUX's, 57 layers, it was 2% of the step.
    """
    sites = [t.site for t in treatments if t.site.kind == "mlp" and t.kept]
    if not sites:
        return None, ()
    graph, env, positions = part_of(gm, [site.down.weight for site in sites])
    for number, site in enumerate(sites):
        weight = env[site.down.weight]
        down_t, down_norm = (graph.placeholder(f"{name}_{number}") for name in ("down_t", "down_norm"))
        graph.call_function(torch.ops.chipmunk.mlp_weights.default, (weight, down_t, down_norm))
    graph.output(())
    return _runnable(graph_module(gm, graph)), positions


def dense_copy(gm: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A copy of canonical `gm` that runs as it is, and where its nodes are in it: for looking at sites from outside."""
    copied, env = copy_graph(gm)
    return _runnable(copied), env


def _runnable(gm: fx.GraphModule) -> fx.GraphModule:
    """In place: what a canonical graph needs to be run."""
    for node in gm.graph.nodes:
        if node.target is aten.view.default:  # of values that may be laid out otherwise than those it was traced on
            node.target = aten.reshape.default
    flatten_exchanges(gm)
    call_quantised(gm.graph)
    return clean(gm)


def _tables(treatment: Treatment) -> list[StateTensor]:
    device = treatment.site.node.meta["val"].device
    starts = torch.tensor([0, *accumulate(treatment.chunks)], dtype=torch.int32)
    return [
        StateTensor(name, "table", tuple(v.shape), tuple(v.stride()), v.dtype, device, v)
        for name, v in zip(_table_names(treatment), (starts, sample_table(starts, treatment.samples)))
    ]


def _table_names(treatment: Treatment) -> tuple[str, str]:
    """Sites whose chunks are alike share their tables: the name says all there is to a table."""
    runs = "_".join(f"{len(list(group))}x{length}" for length, group in groupby(treatment.chunks))
    if len(runs) > 40:
        runs = hashlib.sha1(runs.encode()).hexdigest()[:12]
    return f"chunk_starts_{runs}", f"sample_tokens_{runs}_{treatment.samples}"


def _caches(number: int, treatment: Treatment) -> list[StateTensor]:
    site, chunks = treatment.site, len(treatment.chunks)
    value = site.node.meta["val"]

    def tensor(name: str, scope: str, shape: tuple[int, ...], dtype=value.dtype, stride=None) -> StateTensor:
        stride = stride or _contiguous(shape)
        return StateTensor(f"{name}_{number}", scope, shape, stride, dtype, value.device)

    if site.kind == "attention":
        b, h, n, d = site.batch, site.heads, site.q_len, site.head_dim
        caches = [tensor("o_cache", "stream", (b, h, n, d), stride=(n * h * d, d, h * d, 1))]
        if treatment.kept:
            caches.append(tensor("columns", "stream", (b, h, chunks, treatment.kept), torch.int32))
            caches.append(tensor("counts", "stream", (b, h, chunks), torch.int32))
        return caches
    b, n, f, o = site.batch, site.tokens, site.hidden, site.out_features
    caches = [tensor("out_cache", "stream", (b, n, o), torch.float32)]
    if treatment.kept:
        # Feature-major, rows padded so that each begins on a 16-token boundary: a chunk gathers whole rows.
        row = -(-n // 16) * 16
        caches.append(tensor("act_cache", "stream", (b, f, n), stride=(f * row, row, 1)))
        caches.append(tensor("sample_cache", "stream", (b, chunks, treatment.samples, f)))
        caches.append(tensor("down_t", "weights", (f, o)))
        caches.append(tensor("down_norm", "weights", (f,), torch.float32))
    return caches


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


class _Site:
    """Builds nodes one behind the other, the first behind the site's own node."""

    def __init__(self, graph, env, state, number: int, treatment: Treatment, node: fx.Node, masks_hold: bool) -> None:
        self.graph, self.env, self.state, self.number, self.treatment = graph, env, state, number, treatment
        self.site, self.masks_hold = treatment.site, masks_hold
        self._last = node

    def cache(self, name: str) -> fx.Node:
        return self.state[f"{name}_{self.number}"]

    def tables(self) -> list[fx.Node]:
        return [self.state[name] for name in _table_names(self.treatment)]

    def node(self, old: fx.Node | None) -> fx.Node | None:
        return None if old is None else self.env[old]

    def call(self, target, *args, **kwargs) -> fx.Node:
        with self.graph.inserting_after(self._last):
            self._last = self.graph.call_function(target, args, kwargs)
        return self._last


def _refresh_attention(at: _Site, node: fx.Node) -> fx.Node:
    site, (starts, samples) = at.site, at.tables()
    if not at.treatment.kept:  # nothing is ever recomputed: the cache is the output itself
        at.call(aten.copy_.default, at.cache("o_cache"), node)
        return node
    return at.call(
        torch.ops.chipmunk.attention_refresh.default,
        *(at.node(n) for n in (site.query, site.key, site.value, site.key_mask)),
        starts, samples, at.cache("o_cache"), at.cache("columns"), at.cache("counts"), site.scale, at.treatment.chunk,
        *_mostly_open(site),
    )  # fmt: skip


def _mostly_open(site: AttentionSite) -> list[list[int]]:
    """The keys that a mask is expected to leave open, where they are most of them."""
    start, stop = attended_keys(site.key_mask) or (0, 0)
    return [[start, stop]] if 2 * (stop - start) > site.kv_len else []


def _delta_attention(at: _Site, node: fx.Node) -> fx.Node:
    site, (starts, _) = at.site, at.tables()
    if not at.treatment.kept:
        return at.call(aten.clone.default, at.cache("o_cache"))
    mask = None if at.masks_hold and has_boolean_mask(site) else site.key_mask
    return at.call(
        torch.ops.chipmunk.attention_delta.default,
        *(at.node(n) for n in (site.query, site.key, site.value, mask)),
        starts, at.cache("o_cache"), at.cache("columns"), at.cache("counts"), site.scale, at.treatment.chunk,
    )  # fmt: skip


def _refresh_mlp(at: _Site, node: fx.Node) -> fx.Node:
    site, (_, samples) = at.site, at.tables()
    out = at.call(aten.reshape.default, node, [site.batch, site.tokens, site.out_features])
    at.call(aten.copy_.default, at.cache("out_cache"), out)
    if not at.treatment.kept:
        return node
    activation = node.args[0]
    rows = at.call(aten.reshape.default, activation, [site.batch, site.tokens, site.hidden])
    columns = at.call(aten.transpose.int, rows, 1, 2)
    at.call(aten.copy_.default, at.cache("act_cache"), columns)
    flat = at.call(aten.reshape.default, samples, [-1])
    sampled = at.call(aten.index_select.default, rows, 1, flat)
    shape = list(at.cache("sample_cache").meta["lifted"].shape)
    at.call(aten.copy_.default, at.cache("sample_cache"), at.call(aten.view.default, sampled, shape))
    return node


def _delta_mlp(at: _Site, node: fx.Node) -> fx.Node:
    site, (starts, samples) = at.site, at.tables()
    shape = list(site.node.meta["val"].shape)
    if not at.treatment.kept:
        narrow = at.call(aten._to_copy.default, at.cache("out_cache"), dtype=site.node.meta["val"].dtype)
        return at.call(aten.view.default, narrow, shape)
    rows = at.call(aten.reshape.default, at.node(site.input), [site.batch, site.tokens, site.in_features])
    biases = [at.node(up.bias) for up in site.up]
    if None in biases and any(biases):
        like = next(b for b in biases if b is not None)
        biases = [at.call(aten.zeros_like.default, like) if b is None else b for b in biases]
    out = at.call(
        torch.ops.chipmunk.mlp_delta.default,
        rows, [_by_rows(at, up.weight) for up in site.up], [b for b in biases if b is not None],
        at.cache("down_t"), at.cache("down_norm"), starts, samples,
        at.cache("act_cache"), at.cache("sample_cache"), at.cache("out_cache"),
        site.region, at.treatment.chunk, at.treatment.kept,
    )  # fmt: skip
    return at.call(aten.view.default, out, shape)


def _by_rows(at: _Site, weight: fx.Node) -> fx.Node:
    """[hidden, in_features], each row contiguous: kernels gather rows. Only a matrix kept transposed is copied."""
    rows = at.node(weight)
    if weight.meta["val"].stride(-1) == 1:
        return rows
    return at.call(aten.clone.default, rows, memory_format=torch.contiguous_format)


_BUILDERS = {
    ("attention", "refresh"): _refresh_attention,
    ("attention", "delta"): _delta_attention,
    ("mlp", "refresh"): _refresh_mlp,
    ("mlp", "delta"): _delta_mlp,
}
