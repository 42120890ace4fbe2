"""How long until the first delta step, in a process of its own, against Inductor's first step.

    python -m benchmarks.start_up [--blocks 57] [--repeats 2]

A FLUX transformer of FLUX.1's depth and tiny width: compile time depends on the depth. Whole and block by block
(`compile_repeated_blocks`), cold (empty caches on disk) and warm (a second process). Each child process reports the
seconds from its first call to the end of the step; chipmunk's are those of refresh and delta together, all programs.
The two alternate. Writes benchmarks/results/start-up-<cpu>.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

log = logging.getLogger("start_up")
RESULTS = pathlib.Path(__file__).parent / "results"
TOKENS, TEXT = 1024, 32


def child(how: str, backend: str, blocks: int) -> dict[str, float]:
    """Seconds of one process: its calls until a delta step has run (chipmunk), or a step (Inductor)."""
    import torch

    torch.manual_seed(0)
    model, inputs = tiny_flux(blocks)
    if how == "whole":
        model = torch.compile(model, backend=backend)
    else:
        model.compile_repeated_blocks(backend=backend)
    seconds = []
    with torch.no_grad():
        if backend == "inductor":
            seconds.append(timed(model, inputs, 0))
            return {"first_step_s": sum(seconds), "first_delta_s": sum(seconds)}
        import chipmunk_compile

        with chipmunk_compile.generation(model, steps=8):
            while not chipmunk_compile.counters()["delta"]:
                seconds.append(timed(model, inputs, len(seconds)))
        counts = chipmunk_compile.counters()
        assert counts["refresh"] and not counts["dense"], counts
    return {"first_step_s": seconds[0], "first_delta_s": sum(seconds)}


def timed(model, inputs: dict, step: int) -> float:
    started = time.perf_counter()
    model(**{**inputs, "timestep": inputs["timestep"] * (1 - step / 8)})
    return time.perf_counter() - started


def tiny_flux(blocks: int):
    import torch
    from diffusers import FluxTransformer2DModel

    double = blocks // 3
    model = FluxTransformer2DModel(
        in_channels=16, num_layers=double, num_single_layers=blocks - double, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6),
    ).eval().requires_grad_(False)  # fmt: skip
    side = int(TOKENS**0.5)
    ids = torch.zeros(side, side, 3)
    ids[..., 1], ids[..., 2] = torch.arange(side)[:, None], torch.arange(side)
    return model, {
        "hidden_states": torch.randn(1, TOKENS, 16), "timestep": torch.ones(1),
        "encoder_hidden_states": torch.randn(1, TEXT, 32), "pooled_projections": torch.randn(1, 32),
        "img_ids": ids.view(-1, 3), "txt_ids": torch.zeros(TEXT, 3), "return_dict": False,
    }  # fmt: skip


def run_child(how: str, backend: str, blocks: int, cache: str) -> dict[str, float]:
    environment = {
        **os.environ, "TORCHINDUCTOR_CACHE_DIR": os.path.join(cache, "inductor"), "XDG_CACHE_HOME": cache,
    }  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.start_up", "--child", how, backend, "--blocks", str(blocks)]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return json.loads(printed.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=57)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(*args.child, args.blocks)))
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = []
    for how in ("whole", "blocks"):
        measured: dict[tuple[str, str], list[dict]] = {}
        for _ in range(args.repeats):
            for backend in ("inductor", "chipmunk"):
                with tempfile.TemporaryDirectory() as cache:
                    for state in ("cold", "warm"):
                        seconds = run_child(how, backend, args.blocks, cache)
                        log.info("%s %s %s: %s", how, backend, state, seconds)
                        measured.setdefault((backend, state), []).append(seconds)
        for state in ("cold", "warm"):
            plain, ours = ([m["first_delta_s"] for m in measured[b, state]] for b in ("inductor", "chipmunk"))
            rows.append({
                "how": how, "caches": state, "blocks": args.blocks, "inductor_s": statistics.median(plain),
                "chipmunk_s": statistics.median(ours), "ratio": statistics.median(ours) / statistics.median(plain),
                "inductor_all_s": plain, "chipmunk_all_s": ours,
            })  # fmt: skip
    write(rows)
    for row in rows:
        print(f"{row['how']:<8}{row['caches']:<6} Inductor {row['inductor_s']:7.1f} s   "
              f"chipmunk {row['chipmunk_s']:7.1f} s   {row['ratio']:.2f}x")  # fmt: skip


def write(rows: list[dict]) -> None:
    import torch

    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "cpu")
    name = "-".join("".join(c if c.isalnum() else " " for c in cpu.lower()).split()[:2])
    whole = {
        "device": cpu, "cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version(),
        "rows": rows,
    }  # fmt: skip
    (RESULTS / f"start-up-{name}.json").write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
