"""State of whole models, on the device and in host memory, from shapes alone: needs no GPU and allocates nothing.

    python -m benchmarks.memory --only hunyuan-720p --budgets 60GB 40GB 20GB
    python -m benchmarks.memory --only wan-14b-720p --layers 8          a part of the layers, sooner done

Models of the published configurations are traced on the meta device and given to `chipmunk_compile.explain`. Copies are
predicted from the bytes that a delta step of all streams moves, and compute from its matrix work: the speeds are those
that the budget is fitted with (`chipmunk_compile.budget.LINKS`); --link says another. Lists of columns are rounded up
to multiples of 64 on a GPU, which adds under 1%.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time

import torch

import chipmunk_compile
from benchmarks.models_zoo import SUBJECTS, Loop, Subject, _construct
from chipmunk_compile.budget import LINKS

log = logging.getLogger("memory")
META = torch.device("meta")
HEAD = ("model", "layers", "streams", "budget", "a layer", "all streams", "on the device", "in host memory", "copies")
HEAD += ("compute", "left dense")


class Shapes(Loop):
    """The inputs of one generation, without values."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self._dtype, self._device = subject, torch.bfloat16, META
        self._fixed = [self._conditioning() for _ in range(subject.calls)]
        self.noise = self._target = self._randn(*self._latent_shape())

    def _randn(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, device=META, dtype=torch.bfloat16)


def report(model: torch.nn.Module, subject: Subject, budget: str | None) -> chipmunk_compile.Report:
    """What explain() says of the model under a budget that all its streams share."""
    options = {**subject.options, "memory_budget": budget, "steps": 50, "streams": subject.calls}
    return chipmunk_compile.explain(model, **Shapes(subject).step(0)[0], options=options)


def row(subject: Subject, budget: str | None, found: chipmunk_compile.Report, bytes_per_s: float) -> tuple[str, ...]:
    streams = subject.calls
    taken = [site for site in found.sites if site.accelerated]
    over = sum(site.reason is chipmunk_compile.Reason.OVER_BUDGET for site in found.sites)
    copied = streams * sum(site.host_bytes * (2 if site.kind == "mlp" else 1) for site in taken)
    device = streams * (found.state_bytes - found.host_bytes) + found.ring_bytes
    compute = streams * sum(graph.delta_flops for graph in found.graphs) / LINKS["cuda"].flops_per_s
    return (
        subject.name, f"{sum(site.kind == 'attention' for site in taken)} of {sum(subject.built)}", str(streams),
        budget or "none", _gb(found.layer_bytes), _gb(streams * found.state_bytes), _gb(device),
        _gb(streams * found.host_bytes), f"{copied / bytes_per_s:.2f} s", f"{compute:.2f} s", str(over),
    )  # fmt: skip


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, default=["wan-14b-720p", "hunyuan-720p"], metavar="NAME")
    parser.add_argument("--budgets", nargs="+", default=["40GB"], metavar="BYTES")
    parser.add_argument("--layers", type=int, help="build about so many, double and single ones in proportion")
    parser.add_argument("--link", type=float, default=LINKS["cuda"].bytes_per_s / 1e9, metavar="GB/s")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
    for name in options.only:
        subject = SUBJECTS[name].with_layers(options.layers or sum(SUBJECTS[name].layers))
        model = _construct(subject, META, torch.bfloat16).eval().requires_grad_(False)
        for budget in [None, *options.budgets]:
            started = time.perf_counter()
            found = report(model, subject, budget)
            print("| " + " | ".join(row(subject, budget, found, options.link * 1e9)) + " |", flush=True)
            log.info("%s: %.0f s", name, time.perf_counter() - started)
    return 0


if __name__ == "__main__":
    sys.exit(main())
