"""The backend function: what `torch.compile(model, backend="chipmunk")` calls for every graph that Dynamo captures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from . import telemetry
from .config import Config
from .passes import PASSES
from .passes.attention_sites import find_attention
from .passes.canonical import canonicalise
from .passes.lower import Treatment, lift_state
from .passes.mlp_sites import find_mlps
from .passes.reasons import Reason
from .passes.sites import AttentionSite, Declined, MlpSite
from .passes.timestep import find_timesteps
from .programs import Inputs, Programs, Runner, compile_graph

log = logging.getLogger(__name__)
_warned_of_training = False


@dataclass(frozen=True)
class Analysis:
    """What the passes found in one captured graph. `reason`: why the whole graph stays dense, where it does."""

    canonical: fx.GraphModule | None
    inputs: Inputs
    treatments: tuple[Treatment, ...]
    declined: tuple[Declined, ...]
    reason: Reason | None = None
    detail: str = ""

    @property
    def state_bytes(self) -> int:
        """Bytes of one stream of one owner, weights' share included."""
        return sum(tensor.bytes for tensor in lift_state(self.treatments))


def chipmunk(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Callable:
    """Dynamo's graph in, a callable out: dense, refresh or delta, as the step asks.

    Raises OptionError for options that do not exist or cannot be; nothing else: what cannot be made sparse is left
    to Inductor, with a reason (`chipmunk_compile.explain`).
    """
    config = Config.from_options(options, mode=mode)
    if torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in example_inputs):
        _warn_of_training()
        return _inductor(gm, example_inputs, config)
    analysis = analyse(gm, example_inputs, config)
    for declined in analysis.declined:
        log.debug("%s %s stays dense: %s %s", declined.kind, declined.name, declined.reason.value, declined.detail)
    if analysis.reason is not None:
        log.info("the graph goes to Inductor untouched: %s %s", analysis.reason.value, analysis.detail)
        return _inductor(gm, example_inputs, config)
    programs = Programs(gm, analysis.canonical, analysis.treatments, config)
    return Runner(programs, analysis.inputs, config)


chipmunk.reset = telemetry.reset  # torch._dynamo.reset() calls it


def analyse(gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config) -> Analysis:
    """All passes up to the sites, without compiling anything."""
    inputs = _classify(gm, example_inputs)

    def dense(reason: Reason, detail: str = "", declined: Sequence[Declined] = (), canonical=None) -> Analysis:
        return Analysis(canonical, inputs, (), tuple(declined), reason, detail)

    if any(isinstance(i, torch.SymInt) or _is_symbolic(i) for i in example_inputs):
        return dense(Reason.DYNAMIC_SHAPES)
    try:
        canonical = canonicalise(gm, list(example_inputs))
    except Exception as error:  # whatever the export cannot take, Inductor may
        return dense(Reason.NO_CANONICAL_FORM, f"({type(error).__name__}: {str(error).splitlines()[0][:200]})")
    telemetry.trace_artifact("canonical", lambda: canonical.print_readable(print_output=False))
    if _mutates_shared_storage(canonical, example_inputs):
        return dense(Reason.ALIASED_MUTATION, canonical=canonical)
    for rewrite in PASSES:
        canonical = rewrite(canonical)
        telemetry.trace_artifact(rewrite.__name__, lambda: canonical.print_readable(print_output=False))
    attention, no_attention = find_attention(canonical, min_tokens=config.min_tokens)
    mlps, no_mlps = find_mlps(canonical, min_tokens=config.min_tokens)
    treatments, switched_off = _treat([*attention, *mlps], config)
    declined = (*no_attention, *no_mlps, *switched_off)
    if not treatments:
        return dense(Reason.NO_SITES, declined=declined, canonical=canonical)
    if not inputs.parameters:
        return dense(Reason.NO_OWNER, declined=declined, canonical=canonical)
    timesteps = find_timesteps(canonical, set(inputs.user))
    user = [i for i in inputs.user if i not in timesteps]
    latents = frozenset(p for p, i in enumerate(user) if _has_shape_of_an_output(canonical, example_inputs[i]))
    inputs = Inputs(inputs.parameters, tuple(user), tuple(timesteps), latents)
    return Analysis(canonical, inputs, tuple(treatments), declined)


def _treat(sites: Sequence[AttentionSite | MlpSite], config: Config) -> tuple[list[Treatment], list[Declined]]:
    """How sparse each site becomes, in graph order."""
    treatments, declined = [], []
    for site in sites:
        options = config.attention if site.kind == "attention" else config.mlp
        if options.sparsity is None:
            declined.append(Declined(site.kind, site.name, Reason.DISABLED_BY_OPTION, {"option": f"{site.kind}.sparsity"}))
            continue
        tokens, columns = (site.q_len, site.kv_len) if site.kind == "attention" else (site.tokens, site.hidden)
        kept = min(columns, round((1.0 - options.sparsity) * columns)) if options.sparsity < 1.0 else 0
        kept = max(kept, 1) if options.sparsity < 1.0 else 0
        treatments.append(Treatment(site, kept, options.chunk, options.samples, (tokens,)))
    return treatments, declined


def _classify(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Inputs:
    """Which inputs are parameters, and which the caller passed; what a module holds besides is neither."""
    parameters, user = [], []
    for i, node in enumerate(n for n in gm.graph.nodes if n.op == "placeholder"):
        value, source = example_inputs[i], getattr(node, "_dynamo_source", None)
        held = source is not None and source.guard_source.is_unspecialized_nn_module()
        if isinstance(value, torch.nn.Parameter):
            parameters.append(i)
        elif isinstance(value, torch.Tensor) and not held and "_dynamo_static_input_type" not in node.meta.get("tensor_dict", {}):
            user.append(i)
    return Inputs(tuple(parameters), tuple(user), ())


def _has_shape_of_an_output(canonical: fx.GraphModule, value: torch.Tensor) -> bool:
    """Whether an input could be the latents: an output's shape, up to the channels (many models take more in)."""
    if not value.is_floating_point() or value.dim() < 3:
        return False

    def alike(shape: torch.Size) -> bool:
        differing = [d for d, (a, b) in enumerate(zip(shape, value.shape)) if a != b]
        return len(shape) == value.dim() and len(differing) <= 1 and (value.dim() > 3 or differing in ([], [2]))

    output = next(iter(reversed(canonical.graph.nodes)))
    return any(alike(o.meta["val"].shape) for o in output.all_input_nodes if isinstance(o.meta.get("val"), torch.Tensor))


def _is_symbolic(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and any(isinstance(n, torch.SymInt) for n in value.shape)


def _mutates_shared_storage(canonical: fx.GraphModule, example_inputs: Sequence[Any]) -> bool:
    """Functional graphs know nothing of aliasing: a write to one of two overlapping inputs would be lost to the other."""
    placeholders = [n for n in canonical.graph.nodes if n.op == "placeholder"]
    written = {n.args[0] for n in canonical.graph.nodes if n.target is torch.ops.aten.copy_.default}
    storages: dict[int, int] = {}
    for value in example_inputs:
        if isinstance(value, torch.Tensor):
            key = value.untyped_storage()._cdata
            storages[key] = storages.get(key, 0) + 1
    return any(
        node in written and storages[value.untyped_storage()._cdata] > 1
        for node, value in zip(placeholders, example_inputs)
    )


def _inductor(gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config) -> Callable:
    """What `torch.compile(model)` would do: while Dynamo's own tracing context stands."""
    from torch._inductor.compile_fx import compile_fx

    telemetry.count("compiles")
    compiled = compile_fx(gm, list(example_inputs), config_patches=config.inductor_options())

    def dense(*args):
        telemetry.count("dense")
        return compiled(*args)

    return dense


def _warn_of_training() -> None:
    global _warned_of_training
    if not _warned_of_training:
        _warned_of_training = True
        log.warning(
            "chipmunk: gradients are enabled and a weight requires them, so this graph is left to Inductor. "
            "For inference, call the model under torch.no_grad() (or torch.inference_mode())."
        )
