"""Runs the printed kernels in Triton's interpreter: TRITON_INTERPRET=1 python -m tests.kernels.interpreted out.json

A process of its own, since the switch is read when Triton is imported.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tests.kernels import triton_cases as cases

HALF = torch.float16  # the interpreter multiplies no bfloat16

ATTENTION: dict[str, dict] = {
    "segments": dict(batch=2, segments=(40, 23)),
    "half precision": dict(dtype=HALF, segments=(70,)),
    "head_dim 72, everything": dict(heads=1, head_dim=72, segments=(64,), kept=64, chunk=64),
    "grouped queries, longer keys": dict(heads=4, kv_heads=2, segments=(33,), kv_len=75),
    "boolean mask": dict(batch=2, segments=(50,), mask="bool", kept=17),
    "additive mask, few open": dict(segments=(40,), mask="additive", kept=39, layout="fused"),
    "text padding": dict(batch=2, segments=(50, 9), mask="padding", kept=17, attended=(0, 50)),
    "text padding at both ends, head_dim 72": dict(
        heads=1, head_dim=72, segments=(60,), mask="padding", attended=(7, 52), dtype=HALF
    ),
    "more than text padding": dict(batch=3, segments=(40,), mask="padding and more", attended=(10, 40), kept=25),
    "every key expected open": dict(batch=2, segments=(40,), mask="padding and more", attended=(0, 40)),
    "overflow": dict(segments=(64,), peaked=True),
    "patches, head_dim 80": dict(heads=1, head_dim=80, segments=(30, 24, 30), chunk=30, kept=32),
    "odd samples, odd kept": dict(segments=(61,), samples=3, kept=33, layout="heads first"),
}
MLP: dict[str, dict] = {
    "gelu": dict(batch=2, segments=(33, 20)),
    "gated, no bias": dict(region="mul(silu(h0), h1)", bias=False, segments=(64,)),
    "ragged everything": dict(width=41, hidden=90, out_features=50, kept=23, segments=(37,)),
    "all columns": dict(kept=500, segments=(40,)),
    "half precision, chunk 64": dict(dtype=HALF, chunk=64, segments=(64, 24)),
}
WEIGHTS: dict[str, dict] = {
    "one tile": dict(),
    "ragged, in a wider matrix": dict(dtype=HALF, features=200, hidden=150, beside=24),
    "not in rows": dict(features=40, hidden=70, turned=True),
}
PERMUTE: dict[str, dict] = {"all tokens": dict(), "some tokens": dict(dtype=HALF, moved=20)}


def main(path: str) -> None:
    torch.set_num_threads(1)
    results = {}
    tables = {cases.attention: ATTENTION, cases.mlp: MLP, cases.weights: WEIGHTS, cases.permute: PERMUTE}
    for run, table in tables.items():
        for name, arguments in table.items():
            torch.manual_seed(torch.seed() % 2**32)
            results[f"{run.__name__}: {name}"] = run(**arguments)
    Path(path).write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
