"""What tests/test_parallel.py runs on two ranks. Each case takes the rank and returns what the test looks at."""

from __future__ import annotations

import math
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from unittest.mock import patch

import torch
import torch.distributed as dist

import chipmunk_compile
from chipmunk_compile.backend import chipmunk
from chipmunk_compile.passes.permute_tokens import plan_permutation
from chipmunk_compile.runner import Runner
from tests import tiny_models
from tests.parallel_dit import GatheringBlock, RingBlock, Steps, UlyssesBlock, spread
from tests.tiny_parts import image_ids
from tests.toy_dit import SMALL, toy, worst
from tests.two_ranks import RANKS, enable_context_parallelism

EXACT = {"preset": "exact", "order": "raster"}
SPARSE = {"attention.sparsity": 0.6, "mlp.sparsity": 0.6, "order": "raster"}
FLUX = dict(height=16, width=16, text=8, layers=1, single=1)
QWEN = dict(height=16, width=16, text=8, layers=1)
WAN = dict(frames=2, height=8, width=16, layers=1)


@dataclass
class Outcome:
    """error: the largest relative one of any step against one rank. counts: `chipmunk_compile.counters()`.
    alone: the bytes of state that one rank holds for all."""

    error: float
    counts: dict[str, int]
    accelerated: list[str] = field(default_factory=list)  # kinds of the sites
    reasons: list[str] = field(default_factory=list)  # of attention that stays dense
    order: str = ""  # why tokens keep their order
    reordered: bool = False
    alone: int = 0


@contextmanager
def programs_as_they_are():
    """Programs run as they are, without Inductor."""
    with (
        patch("chipmunk_compile.programs.compile_graph", lambda graph, args, config: graph),
        patch("chipmunk_compile.backend.inductor_program", lambda gm, inputs, config: gm.forward),
    ):
        yield


def compiled(model, **options):
    """(the compiled model, the runners that it makes)."""
    runners = []

    def spy(gm, inputs, **kwargs):
        runners.append(chipmunk(gm, inputs, **kwargs))
        return runners[-1]

    return torch.compile(model, backend=spy, options={**SMALL, **options}), runners


def outcome(outputs, reference, runners) -> Outcome:
    analyses = [runner._analysis for runner in runners if isinstance(runner, Runner)]
    order = next((a.permutation for a in analyses if a.permutation is not None), None)
    counts = chipmunk_compile.counters()
    chipmunk_compile.reset()
    return Outcome(
        worst(outputs, reference),
        counts,
        [site.kind for a in analyses for site in a.sites],
        [d.reason.name for a in analyses for d in a.declined if d.kind == "attention"],
        getattr(getattr(order, "reason", None), "name", ""),
        any(runner.programs.plan.order for runner in runners if isinstance(runner, Runner) and runner.programs),
    )


# --- the plain DiT ------------------------------------------------------------------------------------------------


def _plain(rank: int, block, options, layers: int = 1, inductor: bool = False) -> Outcome:
    """Against the same options on one rank: attention alike, MLPs alike, chunk by chunk."""
    steps = Steps()
    fast, _ = compiled(toy(heads=4, layers=layers), **options)
    with programs_as_they_are():
        whole = steps.run(fast)
    alone = chipmunk_compile.counters()["state_bytes"]
    torch._dynamo.reset()
    chipmunk_compile.reset()
    steps = Steps((rank, RANKS))
    fast, runners = compiled(spread(block, layers=layers), **options)
    with nullcontext() if inductor else programs_as_they_are():
        outputs = steps.run(fast)
    return replace(outcome(outputs, [w.chunk(RANKS, 1)[rank] for w in whole], runners), alone=alone)


def ulysses(rank: int) -> Outcome:
    return _plain(rank, UlyssesBlock, SPARSE, layers=2)


def by_inductor(rank: int) -> Outcome:
    return _plain(rank, UlyssesBlock, SPARSE, inductor=True)


def gathered_keys(rank: int) -> Outcome:
    return _plain(rank, GatheringBlock, EXACT)


def ring(rank: int) -> Outcome:
    return _plain(rank, RingBlock, EXACT)


def by_inductor_in_boxes(rank: int) -> Outcome:
    with permuted_at_any_price():
        return _plain(rank, UlyssesBlock, {"preset": "exact", "grid": (1, 8, 16)}, inductor=True)


# --- ranks that would choose differently --------------------------------------------------------------------------


COUNTED = ("dense", "refresh", "delta", "forecast", "overruled")


def _unlike(rank: int, switched_off: bool = False, count: int = 8, **options) -> list[tuple[int, ...]]:
    """What each of `count` steps counts, by COUNTED. From step 4 on rank 1 has another prompt: its stream is over and
    another begins with a refresh. switched_off: it is dense at step 4 instead."""
    fast, _ = compiled(spread(UlyssesBlock, layers=1), **options)
    steps, counts = Steps((rank, RANKS), steps=count), []
    other = steps.prompt + 1
    with programs_as_they_are(), torch.no_grad():
        for step, (x, t, prompt) in enumerate(steps):
            changes = rank == 1 and step >= 4 and not switched_off
            before = chipmunk_compile.counters()
            with chipmunk_compile.disabled() if rank == 1 and step == 4 and switched_off else nullcontext():
                fast(x, t, other if changes else prompt)
            after = chipmunk_compile.counters()
            counts.append(tuple(after[name] - before[name] for name in COUNTED))
    return counts


def unlike_streams(rank: int) -> list:
    return _unlike(rank)


def unlike_switches(rank: int) -> list:
    return _unlike(rank, switched_off=True)


def unlike_forecasts(rank: int) -> list:
    """Without agreement rank 0 would forecast and rank 1, in a collective, wait for it."""
    return _unlike(rank, count=10, **{"schedule.compute_every": 2})


def unlike_corrections(rank: int) -> list:
    """Without agreement rank 0 would run two programs at its next refresh, and rank 1 one."""
    return _unlike(rank, **{"forecast.residual": 1.0, "schedule.refresh_every": 3})


# --- models of diffusers ------------------------------------------------------------------------------------------


def _loop(model, kwargs, steps: int = 5) -> list[torch.Tensor]:
    noise, time = kwargs["hidden_states"], kwargs["timestep"]
    with torch.no_grad():
        return [
            model(
                **{**kwargs, "hidden_states": noise * (1 - i / 10), "timestep": time * (1 - i / 5)}, return_dict=False
            )[0].clone()
            for i in range(steps)
        ]


def _diffusers(rank: int, name: str, sizes: dict, options: dict, sparse: bool = False, **inputs) -> Outcome:
    model, kwargs = tiny_models.MODELS[name](**sizes)
    kwargs |= inputs
    alone, _ = compiled(model, **options)
    with programs_as_they_are():
        reference = _loop(alone if sparse else model, kwargs)
        torch._dynamo.reset()
        chipmunk_compile.reset()
        enable_context_parallelism(model, ulysses_degree=RANKS)
        fast, runners = compiled(model, **options)
        return outcome(_loop(fast, kwargs), reference, runners)


@contextmanager
def permuted_at_any_price():
    """Tiny models are not worth it."""
    with patch("chipmunk_compile.plan.plan_permutation", partial(plan_permutation, share=math.inf)):
        yield


def flux(rank: int) -> Outcome:
    """Ids say that each rank's half of the picture is a grid of its own."""
    with permuted_at_any_price():
        return _diffusers(rank, "flux", FLUX, {"preset": "exact"})


def flux_with_unlike_halves(rank: int) -> Outcome:
    """Two pictures, one lying and one standing: each rank has one, and would reorder it in its own way."""
    ids = torch.cat([image_ids(8, 16), image_ids(16, 8)])
    with permuted_at_any_price():
        return _diffusers(rank, "flux", FLUX, {"preset": "exact"}, img_ids=ids)


def wan_in_boxes(rank: int) -> Outcome:
    with permuted_at_any_price():
        return _diffusers(rank, "wan", WAN, {"preset": "exact", "grid": (2, 8, 16)})


def qwen_in_boxes(rank: int) -> Outcome:
    """Its text mask is gathered from both ranks, and put in the order of the tokens."""
    with permuted_at_any_price():
        return _diffusers(rank, "qwen_image", QWEN, {"preset": "exact", "grid": (1, 16, 16)})


def wan_sparse(rank: int) -> Outcome:
    return _diffusers(rank, "wan", WAN, SPARSE, sparse=True)


def flux_in_blocks(rank: int) -> Outcome:
    """Blocks compiled one by one."""
    model, kwargs = tiny_models.MODELS["flux"](**FLUX)
    reference = _loop(model, kwargs)
    enable_context_parallelism(model, ulysses_degree=RANKS)
    runners = []

    def spy(gm, inputs, **options):
        runners.append(chipmunk(gm, inputs, **options))
        return runners[-1]

    model.compile_repeated_blocks(backend=spy, options={**SMALL, **EXACT})
    with programs_as_they_are(), chipmunk_compile.generation(model):
        return outcome(_loop(model, kwargs), reference, runners)


# --- sharded weights ----------------------------------------------------------------------------------------------


def fsdp(rank: int) -> Outcome:
    """FSDP2: every rank holds a shard of each weight, and its own pictures."""
    return _fsdp(rank, whole=True)


def fsdp_in_blocks(rank: int) -> Outcome:
    return _fsdp(rank, whole=False)


def _fsdp(rank: int, whole: bool) -> Outcome:
    from torch.distributed.fsdp import fully_shard

    steps = Steps(seed=rank)
    with programs_as_they_are():
        fast, _ = compiled(toy(layers=2), **EXACT)
        reference = steps.run(fast)
    alone = chipmunk_compile.counters()["state_bytes"]
    torch._dynamo.reset()
    chipmunk_compile.reset()
    model = toy(layers=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    runners = []

    def spy(gm, inputs, **options):
        runners.append(chipmunk(gm, inputs, **options))
        return runners[-1]

    options = {**SMALL, **EXACT}
    if not whole:
        for block in model.blocks:
            block.compile(backend=spy, options=options)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with programs_as_they_are():
        if whole:
            ran = outcome(steps.run(torch.compile(model, backend=spy, options=options)), reference, runners)
        else:
            with chipmunk_compile.generation(model):
                ran = outcome(steps.run(model), reference, runners)
    return replace(ran, alone=alone)


def tensor_parallel(rank: int) -> tuple[Outcome, list[str]]:
    """Weights that are DTensors: columns and rows of the MLPs on their ranks."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    reference = Steps().run(toy())
    model = toy()
    mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fast, runners = compiled(model, **EXACT)
    with programs_as_they_are():
        ran = outcome(Steps().run(fast), reference, runners)
    torch._dynamo.reset()
    report = chipmunk_compile.explain(model, *next(iter(Steps())))
    return ran, [graph.reason.name for graph in report.graphs if graph.reason is not None]


CASES = {
    case.__name__: case
    for case in (
        ulysses,
        gathered_keys,
        ring,
        unlike_streams,
        unlike_switches,
        unlike_forecasts,
        unlike_corrections,
        flux,
        flux_with_unlike_halves,
        wan_in_boxes,
        qwen_in_boxes,
        wan_sparse,
        flux_in_blocks,
        fsdp,
        fsdp_in_blocks,
        tensor_parallel,
    )
}
