"""What tests/gpu/test_gpu_parallel.py runs on two GPUs: each case takes the rank, and first has one GPU do it alone."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

import chipmunk_compile
from chipmunk_compile.backend import chipmunk
from tests.parallel_dit import Steps, UlyssesBlock, spread
from tests.toy_dit import toy
from tests.two_ranks import RANKS

# FLUX.1-dev's width at 1024x1024, few of its layers.
SIDE, TEXT = 64, 512
MODEL = dict(num_layers=1, num_single_layers=2, guidance_embeds=True)
DEVICE = "cuda"
STEPS = 12
SCHEDULE = {"schedule.refresh_at": []}  # all deltas behind the warm-up


@dataclass
class Timed:
    """outputs: of each step. ms: the median of the last steps, which are deltas where they are sparse."""

    outputs: list[torch.Tensor]
    ms: float
    deltas: int
    overruled: int
    state_bytes: int


def flux_stack() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Random weights of unit gain, the same on every rank, and the inputs of a call; bfloat16."""
    import diffusers

    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = diffusers.FluxTransformer2DModel(**MODEL)
    model = model.to(torch.bfloat16).eval().requires_grad_(False)
    generator = torch.Generator(DEVICE).manual_seed(1)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            weight.normal_(0, weight.shape[1] ** -0.5, generator=generator)
        else:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE).bfloat16()

    rows, columns = torch.meshgrid(*[torch.arange(SIDE, device=DEVICE).bfloat16()] * 2, indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).view(SIDE * SIDE, 3)
    inputs = dict(
        hidden_states=randn(1, SIDE * SIDE, model.config.in_channels),
        encoder_hidden_states=randn(1, TEXT, model.config.joint_attention_dim),
        pooled_projections=randn(1, model.config.pooled_projection_dim),
        img_ids=ids,
        txt_ids=torch.zeros(TEXT, 3, device=DEVICE, dtype=torch.bfloat16),
        guidance=torch.full((1,), 3.5, device=DEVICE, dtype=torch.bfloat16),
    )
    return model, inputs


def timed_loop(model, inputs: dict[str, torch.Tensor]) -> Timed:
    noise, outputs, times = inputs["hidden_states"], [], []
    before = chipmunk_compile.counters()
    with torch.no_grad():
        for step in range(STEPS):
            moment = torch.full((1,), 1 - step / STEPS, device=DEVICE, dtype=torch.bfloat16)
            latents = noise * (1 - step / (2 * STEPS))
            torch.accelerator.synchronize()
            begun = time.perf_counter()
            output = model(**{**inputs, "hidden_states": latents, "timestep": moment}, return_dict=False)[0]
            torch.accelerator.synchronize()
            times.append(1e3 * (time.perf_counter() - begun))
            outputs.append(output.float().cpu())
    after = chipmunk_compile.counters()
    deltas, overruled = (after[name] - before[name] for name in ("delta", "overruled"))
    timed = Timed(outputs, statistics.median(times[STEPS // 2 :]), deltas, overruled, after["state_bytes"])
    chipmunk_compile.reset()
    torch._dynamo.reset()
    return timed


def flux(rank: int) -> dict[str, Timed]:
    """Dense and sparse on one GPU (each rank for itself), then on both by diffusers' Ulysses."""
    from diffusers import ContextParallelConfig

    model, inputs = flux_stack()
    sparse = {**SCHEDULE, "preset": "balanced"}
    results = {
        "dense, 1 GPU": timed_loop(torch.compile(model), inputs),
        "sparse, 1 GPU": timed_loop(torch.compile(model, backend=chipmunk, options=sparse), inputs),
    }
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=RANKS))
    exact = {**SCHEDULE, "preset": "exact"}
    results["dense, 2 GPUs"] = timed_loop(torch.compile(model), inputs)
    results["exact, 2 GPUs"] = timed_loop(torch.compile(model, backend=chipmunk, options=exact), inputs)
    results["sparse, 2 GPUs"] = timed_loop(torch.compile(model, backend=chipmunk, options=sparse), inputs)
    return results


def plain(rank: int) -> tuple[list[torch.Tensor], list[torch.Tensor], dict[str, int]]:
    """A DiT in plain torch at sparsity 0.6: this rank's share of every step, by one GPU and by both; counts of both."""
    options = {"min_tokens": 8, "attention.chunk": 32, "mlp.chunk": 32, "order": "raster"}
    options |= {"attention.sparsity": 0.6, "mlp.sparsity": 0.6}
    runs = []
    for model, share in ((toy(heads=4, dim=128), None), (spread(UlyssesBlock, heads=4, dim=128), (rank, RANKS))):
        steps = Steps(share)
        for name in ("prompt", "latents", "noise"):
            setattr(steps, name, getattr(steps, name).to(DEVICE))
        fast = torch.compile(model.to(DEVICE), backend=chipmunk, options=options)
        runs.append([output.cpu() for output in steps.run(fast)])
        counts = chipmunk_compile.counters()
        torch._dynamo.reset()
        chipmunk_compile.reset()
    whole, shared = runs
    return [output.chunk(RANKS, 1)[rank] for output in whole], shared, counts
