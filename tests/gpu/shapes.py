"""The shapes that the GPU kernels are checked at, and one run of all of them, for sanitizers and for one form.

    python -m tests.gpu.shapes                          every shape, with the forms that the tuning tables choose
    python -m tests.gpu.shapes --form 3 --output f.json   those of one form of the warp-specialised kernels
    python -m tests.gpu.shapes --part 2/4               every fourth shape, from the third on: sanitizers side by side
    python -m tests.gpu.shapes --kind mlp               those of one op

Prints a line for each shape; the exit status says whether all were right.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from chipmunk_compile.kernels import launch, tuner, tuning
from tests.kernels import triton_cases as cases

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GATED = "mul(silu(h0), h1)"

ATTENTION = {
    "whole chunks of 128": dict(segments=(512,), chunk=128, kept=96, head_dim=128),
    "whole chunks of 64": dict(segments=(512,), chunk=64, kept=96, head_dim=128),
    "segments, ragged, batch 2": dict(batch=2, segments=(300, 77), chunk=128, kept=129, head_dim=128),
    "ragged chunks of 64, batch 3": dict(batch=3, segments=(63, 100, 1), chunk=64, kept=33, head_dim=64),
    "patches of up to 126": dict(segments=(126, 120, 126, 30), chunk=126, kept=128, head_dim=128),
    "patches of up to 60": dict(segments=(60, 48, 60, 60), chunk=60, kept=64, head_dim=64),
    "chunks of 192": dict(segments=(500,), chunk=192, kept=200, head_dim=128),
    "chunks of 32": dict(segments=(101,), chunk=32, kept=20, head_dim=64),
    "long lists, chunks of 128": dict(heads=1, segments=(1500,), chunk=128, kept=1100, head_dim=128),
    "long lists, chunks of 64": dict(heads=1, segments=(1500,), chunk=64, kept=1100, head_dim=128),
    "more tiles than multiprocessors": dict(heads=6, segments=(4000,), chunk=64, kept=65, head_dim=64),
    "more tiles, shared": dict(heads=6, segments=(4000,), chunk=128, kept=300, head_dim=128),
    "grouped queries": dict(heads=4, kv_heads=2, segments=(257,), kv_len=1000, chunk=64, kept=70, head_dim=128),
    "everything": dict(segments=(163,), chunk=64, kept=163, head_dim=64),
    "one column": dict(segments=(130,), chunk=128, kept=1, head_dim=128),
    "overflow, chunks of 128": dict(segments=(400,), chunk=128, kept=150, head_dim=128, peaked=True),
    "overflow, chunks of 64": dict(segments=(400, 30), chunk=64, kept=150, head_dim=64, peaked=True),
    "head_dim 16": dict(segments=(200,), chunk=64, kept=64, head_dim=16),
    "head_dim 72": dict(segments=(200,), chunk=64, kept=64, head_dim=72),
    "head_dim 80": dict(segments=(200,), chunk=128, kept=64, head_dim=80),
    "head_dim 256": dict(segments=(130,), chunk=64, kept=40, head_dim=256),
    "boolean mask": dict(batch=2, segments=(400, 19), chunk=128, kept=64, head_dim=96, mask="bool"),
    "text padding": dict(
        batch=2, segments=(400, 77), chunk=128, kept=96, head_dim=128, mask="padding", attended=(0, 400)
    ),
    "more than text padding": dict(
        batch=3, segments=(77, 400), chunk=64, kept=96, head_dim=64, mask="padding and more", attended=(77, 477)
    ),
    "every key expected open": dict(
        batch=2, segments=(400,), chunk=64, kept=96, head_dim=128, mask="padding and more", attended=(0, 400)
    ),
    "additive mask": dict(batch=2, segments=(400, 19), chunk=64, kept=200, head_dim=128, mask="additive"),
    "heads first": dict(segments=(256,), chunk=64, kept=48, head_dim=128, layout="heads first"),
    "fused projection": dict(segments=(256,), chunk=128, kept=48, head_dim=64, layout="fused"),
    "16 samples": dict(segments=(256,), chunk=64, kept=48, head_dim=64, samples=16),
    "float16": dict(dtype=FP16, batch=2, segments=(300, 77), chunk=128, kept=129, head_dim=128),
    "float32": dict(dtype=FP32, segments=(200,), chunk=64, kept=50, head_dim=64),
    "float32, masked": dict(dtype=FP32, segments=(200,), chunk=64, kept=50, head_dim=40, mask="bool"),
}
MLP = {
    "whole chunks": dict(segments=(512,), width=256, hidden=1024, out_features=256, chunk=128, kept=304),
    "segments, unaligned, batch 2": dict(
        batch=2, segments=(301, 77), width=192, hidden=768, out_features=200, chunk=128, kept=230
    ),
    "gated": dict(
        region=GATED, bias=False, segments=(384,), width=128, hidden=512, out_features=512, chunk=128, kept=160
    ),
    "gated, bias, ragged": dict(
        region=GATED, segments=(200,), width=128, hidden=520, out_features=96, chunk=128, kept=131
    ),
    "patches of up to 120": dict(
        segments=(120, 96, 120, 7), width=128, hidden=512, out_features=256, chunk=120, kept=192
    ),
    "more tiles than multiprocessors": dict(
        segments=(9000,), width=64, hidden=1024, out_features=512, chunk=128, kept=704
    ),
    "chunks of 64": dict(segments=(300,), width=128, hidden=512, out_features=128, chunk=64, kept=150),
    "chunks of 192": dict(segments=(300,), width=128, hidden=512, out_features=128, chunk=192, kept=150),
    "chunks of 256": dict(segments=(600,), width=128, hidden=512, out_features=128, chunk=256, kept=150),
    "odd widths": dict(
        segments=(200,), width=100, hidden=330, out_features=100, chunk=128, kept=100, region="gelu(h0)"
    ),
    "all columns": dict(segments=(256,), width=128, hidden=512, out_features=128, chunk=128, kept=512),
    "float16": dict(dtype=FP16, segments=(300, 77), width=192, hidden=768, out_features=192, chunk=128, kept=230),
    "float32": dict(dtype=FP32, segments=(300, 77), width=192, hidden=768, out_features=200, chunk=128, kept=230),
}


@dataclass(frozen=True)
class Form:
    """One form of a warp-specialised kernel: its template, and how it differs from the default form."""

    template: str
    shared: bool | None  # of attention: whether two consumers share a ring
    change: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        kind = {True: " shared", False: " apart", None: ""}[self.shared]
        return f"{self.template}{kind} {dict(self.change) or 'default'}"

    def override(self) -> dict[str, dict]:
        """For tuning.override: this form for all classes of shape."""
        tiles = {}
        for key, default in _classes():
            if key.startswith(self.template + " ") and default.get("shared") in (self.shared, None):
                tiles[key] = {**default, **dict(self.change)}
        return tiles

    def shapes(self) -> Iterator[tuple[str, dict]]:
        """The shapes that this form takes."""
        for name, arguments in (MLP if self.shared is None else ATTENTION).items():
            chunk = arguments["chunk"]
            if arguments.get("dtype", BF16) is FP32 or self.shared not in (None, 64 < chunk <= 128):
                continue
            if self.shared is None or arguments["head_dim"] in (64, 128) and not arguments.get("mask"):
                yield name, arguments


def forms() -> list[Form]:
    attention = [("attention_delta_hopper", s, c) for s, t in ((True, tuner.SHARED), (False, tuner.APART)) for c in t]
    mlp = [("mlp_hopper", None, change) for change in tuner.MLP]
    return [Form(template, shared, tuple(change.items())) for template, shared, change in (*attention, *mlp)]


def _classes() -> list[tuple[str, dict]]:
    """All classes of the warp-specialised kernels, with their defaults."""
    found, device = [], torch.device("cpu")
    with mock.patch.object(tuning, "_find", lambda key, default, _: found.append((key, default)) or default):
        for kept in (1, tuning.FEW_COLUMNS + 1):
            for head_dim in (64, 128):
                for chunk in (16, 32, 64, 128, 192):
                    tuning.attention_delta_hopper(head_dim, chunk, kept, device)
        for rows in (1, tuning.FEW_CHUNKS + 1):
            tuning.mlp_hopper(1, rows, device), tuning.mlp_hopper(2, rows, device)
    return found


def run(arguments: dict, device: str = "cuda") -> dict[str, float]:
    """The errors of one shape, checked."""
    arguments = {"dtype": BF16, "samples": 8, **arguments}
    case = cases.attention if "head_dim" in arguments else cases.mlp
    errors = case(device=device, **arguments)
    cases.check(errors, arguments["dtype"])
    assert not launch._refused, f"a portable kernel ran instead of {launch._refused}"
    return errors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", type=int, help="a place in forms()")
    parser.add_argument("--part", default="0/1", metavar="K/N", help="every Nth shape, from number K on")
    parser.add_argument("--kind", choices=("attention", "mlp"), help="default: both")
    parser.add_argument("--output", type=Path, help="JSON: {shape: what was wrong, or nothing}")
    options = parser.parse_args()
    torch.manual_seed(torch.seed() % 2**32)
    kinds = {"attention": ATTENTION, "mlp": MLP}
    shapes = [item for kind in ([options.kind] if options.kind else kinds) for item in kinds[kind].items()]
    overrides: contextlib.AbstractContextManager = contextlib.nullcontext()
    if options.form is not None:
        form = forms()[options.form]
        shapes, overrides = list(form.shapes()), tuning.override(form.override())
        print(form.name, flush=True)
    wrong: dict[str, str] = {}
    first, every = map(int, options.part.split("/"))
    with overrides:
        for name, arguments in shapes[first::every]:
            try:
                run(arguments)
                wrong[name] = ""
            except Exception as error:
                wrong[name] = f"{type(error).__name__}: {str(error)[:500]}"
            print(f"  {name}: {wrong[name] or 'right'}", flush=True)
    if options.output:
        options.output.write_text(json.dumps(wrong))
    return int(any(wrong.values()))


if __name__ == "__main__":
    sys.exit(main())
