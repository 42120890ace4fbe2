"""Two processes on this machine that stand for two GPUs: gloo between them, one thread each."""

from __future__ import annotations

import os
import socket
import tempfile
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

import chipmunk_compile

RANKS = 2
# A rank that waits for one that failed gives up after this.
PATIENCE = timedelta(seconds=60)


def run_cases(cases: Mapping[str, Callable[[int], object]]) -> dict[str, list]:
    """For each case what it returned on each rank: `case(rank)`, one case after the other in the same processes.

    A case that raised is the text of its traceback; those after it are missing.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        torch.multiprocessing.spawn(_run, (port, folder, dict(cases)), nprocs=RANKS)
        by_rank = [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(RANKS)]
    return {name: [results[name] for results in by_rank] for name in by_rank[0] if all(name in r for r in by_rank)}


def _run(rank: int, port: int, folder: str, cases: dict[str, Callable[[int], object]]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, timeout=PATIENCE)
    results: dict[str, object] = {}
    for name, case in cases.items():
        try:
            results[name] = case(rank)
        except Exception:
            results[name] = traceback.format_exc()
            break
        torch._dynamo.reset()
        chipmunk_compile.reset()
    torch.save(results, Path(folder) / str(rank))
    dist.destroy_process_group()


def enable_context_parallelism(model: torch.nn.Module, **degrees: int) -> None:
    """`model.enable_parallelism(config=ContextParallelConfig(**degrees))` of diffusers, which asks for an accelerator
    before all else; its other steps do not need one."""
    from diffusers import ContextParallelConfig
    from diffusers.hooks.context_parallel import apply_context_parallel
    from diffusers.models._modeling_parallel import ParallelConfig

    context = ContextParallelConfig(**degrees)
    mesh = dist.device_mesh.init_device_mesh("cpu", context.mesh_shape, mesh_dim_names=context.mesh_dim_names)
    config = ParallelConfig(context_parallel_config=context)
    config.setup(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), mesh=mesh)
    for module in model.modules():
        if hasattr(getattr(module, "processor", None), "_parallel_config"):
            module.processor._parallel_config = config
    apply_context_parallel(model, context, model._cp_plan)
