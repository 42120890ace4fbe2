"""Two processes on this machine: on two GPUs with NCCL between them, or, one thread each and with gloo, for two."""

from __future__ import annotations

import os
import socket
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

import chipmunk_compile

RANKS = 2
# A rank that waits for one that failed gives up after this.
PATIENCE = {"gloo": timedelta(seconds=120), "nccl": timedelta(seconds=400)}
# NVLink multicast can put GPUs out of service that others share: off, where the environment does not say so already.
WITHOUT_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}


def run_cases(
    cases: Mapping[str, Callable[[int], object]], returned: Sequence[type], backend: str = "gloo"
) -> dict[str, list]:
    """For each case what it returned on each rank: `case(rank)`, one case after the other in the same processes.

    returned: the classes of what cases return. backend: "gloo", or "nccl" with a GPU a rank. A case that raised is the
    text of its traceback; those after it are missing.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        torch.multiprocessing.spawn(_run, (port, folder, dict(cases), backend), nprocs=RANKS)
        with torch.serialization.safe_globals(list(returned)):
            by_rank = [torch.load(Path(folder) / str(rank), weights_only=True) for rank in range(RANKS)]
    return {name: [results[name] for results in by_rank] for name in by_rank[0] if all(name in r for r in by_rank)}


def _run(rank: int, port: int, folder: str, cases: dict[str, Callable[[int], object]], backend: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for name, value in WITHOUT_MULTICAST.items():
        os.environ.setdefault(name, value)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(backend, rank=rank, world_size=RANKS, timeout=PATIENCE[backend])
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
