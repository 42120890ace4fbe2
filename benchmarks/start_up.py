"""How long until every program has run, in a process of its own, against Inductor's first step.

    python -m benchmarks.start_up [--blocks 57] [--repeats 2] [--how whole|blocks]

A FLUX transformer of FLUX.1's depth and tiny width: compile time depends on the depth. Whole and block by block
(`compile_repeated_blocks`), cold (empty caches on disk) and warm (another process, twice). Each child process reports
what it took from its first call to the end of the last step. "deltas": chipmunk with sparse deltas, two refreshes and a
delta step; "preset": as it comes, where a whole model's steps are dense or forecast, until the first forecast.
Times are seconds of CPU, user and system, of the process and the compilers that it starts, and wall-clock seconds; the
first hardly depend on what else the machine does. The two backends alternate.
Writes benchmarks/results/start-up-<cpu>.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time

log = logging.getLogger("start_up")
RESULTS = pathlib.Path(__file__).parent / "results"
TOKENS, TEXT = 1024, 32
STEPS = 8
INDUCTOR, DELTAS, PRESET = METHODS = ("inductor", "deltas", "preset")


def child(how: str, method: str, blocks: int) -> dict[str, float]:
    """What one process takes until each program has run (chipmunk), or a step (Inductor)."""
    import torch

    torch.manual_seed(0)
    model, inputs = tiny_flux(blocks)
    asked = {"backend": "inductor"} if method == INDUCTOR else {"backend": "chipmunk"}
    if method == DELTAS:
        asked["options"] = {"schedule.refresh_every": 5}
    elif method == PRESET:
        asked["options"] = {"forecast.tolerance": 0.9}  # random weights: no step tells the next
    if how == "whole":
        model = torch.compile(model, **asked)
    else:
        model.compile_repeated_blocks(**asked)
    before = now()
    with torch.no_grad():
        if method == INDUCTOR:
            call(model, inputs, 0)
        else:
            until("forecast" if method == PRESET else "delta", model, inputs)
    cpu, wall = (after - start for after, start in zip(now(), before))
    return {"cpu_s": round(cpu, 2), "wall_s": round(wall, 2)}


def until(last: str, model, inputs: dict) -> None:
    """Steps until one ran the program `last`."""
    import chipmunk_compile

    with chipmunk_compile.generation(model, steps=STEPS):
        for step in range(STEPS):
            call(model, inputs, step)
            counts = chipmunk_compile.counters()
            if counts[last]:
                break
    ran = {name for name in ("dense", "refresh", "delta", "forecast") if counts[name]}
    if ran != ({"refresh", "delta"} if last == "delta" else {"dense", "forecast"}):
        raise RuntimeError(f"not what is to be measured: {counts}")


def call(model, inputs: dict, step: int) -> None:
    model(**{**inputs, "timestep": inputs["timestep"] * (1 - step / STEPS)})


def now() -> tuple[float, float]:
    """Seconds of CPU, of this process and the children that have ended, and wall-clock seconds."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used), time.perf_counter()


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


def run_child(how: str, method: str, blocks: int, cache: str) -> dict[str, float]:
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": os.path.join(cache, "inductor"),
        "XDG_CACHE_HOME": cache,
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait for a core that another program has are not work
    }
    command = [sys.executable, "-m", "benchmarks.start_up", "--child", how, method, "--blocks", str(blocks)]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return json.loads(printed.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=57)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--how", choices=["whole", "blocks"], action="append")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(*args.child, args.blocks)))
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = []
    for how in args.how or ("whole", "blocks"):
        rows += measure(how, args.blocks, args.repeats)
    write(rows)
    for row in rows:
        ratios = f"{row['cpu_ratio']:.2f}x of CPU, {row['wall_ratio']:.2f}x of wall"
        seconds = f"{row['inductor']['cpu_s']:7.1f} s of Inductor, {row['chipmunk']['cpu_s']:7.1f} s"
        print(f"{row['how']:<8}{row['method']:<8}{row['caches']:<6}{seconds}   {ratios}")


def measure(how: str, blocks: int, repeats: int) -> list[dict]:
    """Of each method a row for cold and one for warm caches."""
    measured: dict[tuple[str, str], list[dict]] = {}
    methods = METHODS if how == "whole" else (INDUCTOR, DELTAS)  # blocks cannot be forecast
    for _ in range(repeats):
        with contextlib.ExitStack() as stack:
            caches = {method: stack.enter_context(tempfile.TemporaryDirectory()) for method in methods}
            for state in ("cold", "warm", "warm"):
                for method in methods:
                    took = run_child(how, method, blocks, caches[method])
                    log.info("%s %s %s: %s", how, method, state, took)
                    measured.setdefault((method, state), []).append(took)
    rows = []
    for method in methods[1:]:
        for state in ("cold", "warm"):
            row: dict = {"how": how, "method": method, "caches": state, "blocks": blocks}
            for backend, of in (("inductor", INDUCTOR), ("chipmunk", method)):
                all_of = measured[of, state]
                row[backend] = {kind: statistics.median(took[kind] for took in all_of) for kind in ("cpu_s", "wall_s")}
                row[backend]["all"] = all_of
            for kind in ("cpu", "wall"):
                row[f"{kind}_ratio"] = round(row["chipmunk"][f"{kind}_s"] / row["inductor"][f"{kind}_s"], 3)
            rows.append(row)
    return rows


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
