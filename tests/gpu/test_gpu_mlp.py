"""The MLP op on a GPU against its meaning in float64: ragged sizes, regions, dtypes, poison; and the gather."""

from __future__ import annotations

import pytest
import torch

from chipmunk_compile.kernels import tuner, tuning
from tests.kernels.triton_cases import check, mlp, permute

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GATED = "mul(silu(h0), h1)"

CASES = {
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


@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES.keys())
def test_equals_its_meaning(arguments):
    arguments = {"dtype": BF16, "samples": 8, **arguments}
    check(mlp(device="cuda", **arguments), arguments["dtype"])


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_gathers_tokens(dtype):
    check(permute(device="cuda", dtype=dtype, batch=3, tokens=1001, moved=777), dtype)


def test_the_tuner_measures_what_fits(monkeypatch):
    monkeypatch.setitem(tuner.CANDIDATES, "mlp_down", {"BO": (64, 4096), "num_stages": (2,)})
    device = torch.device("cuda", torch.cuda.current_device())
    key, default = "mlp_down 16-bit chunk 64", tuning.mlp_down(BF16, 64, torch.device("cpu"))
    assert tuner.measure(key, default, device) == {key: {**default, "BO": 64, "num_stages": 2}}
