"""Two GPUs: Ulysses context parallelism equals one GPU, and what a step then takes.

Run with `-s` for the milliseconds: python -m pytest -s tests/gpu/test_gpu_parallel.py
"""

from __future__ import annotations

import pytest
import torch

from tests.gpu import parallel_cases
from tests.toy_dit import worst
from tests.two_ranks import RANKS, run_cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs 2 CUDA GPUs"),
    pytest.mark.skipif(not torch.distributed.is_nccl_available(), reason="needs NCCL"),
]
# Of bfloat16 against bfloat16 summed in another order, as a share of the norm of the outputs.
BFLOAT16 = 2e-2


def of(name: str) -> list:
    results = run_cases({name: getattr(parallel_cases, name)}, [parallel_cases.Timed], backend="nccl")[name]
    for result in results:
        assert not isinstance(result, str), result
    return results


def distance(outputs, references) -> float:
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(outputs, references, strict=True))


def test_sparse_steps_of_a_plain_model_are_those_of_one_gpu():
    for alone, shared, counts in of("plain"):
        # float32 products may run in TF32, and a column at the threshold may be chosen on one side alone.
        assert worst(shared, alone) < 1e-2
        assert counts["delta"] > 0 and counts["overruled"] == 0


def test_a_flux_stack_of_diffusers_equals_one_gpu():
    pytest.importorskip("diffusers")
    ours, theirs = of("flux")
    reference = ours["dense, 1 GPU"]
    for name, run in ours.items():
        print(
            f"{name:<16}{run.ms:8.2f} ms a step, from dense {distance(run.outputs, reference.outputs):.4f}, "
            f"state {run.state_bytes / 1e6:.0f} MB a GPU, {run.deltas} deltas, {run.overruled} overruled"
        )
    for name, run in ours.items():
        assert run.deltas == (0 if name.startswith("dense") else parallel_cases.STEPS - 2)
        assert run.overruled == 0
        if not name.startswith("sparse"):
            assert distance(run.outputs, reference.outputs) < BFLOAT16
        if name.endswith("GPUs"):
            assert distance(run.outputs, theirs[name].outputs) == 0.0, "both ranks end with the same picture"
    # Another order of tokens makes other chunks: as far from dense as one GPU, not the same.
    alone, shared = (distance(ours[f"sparse, {n}"].outputs, reference.outputs) for n in ("1 GPU", "2 GPUs"))
    assert shared < 1.5 * alone + BFLOAT16
