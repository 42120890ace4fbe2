"""The MLP op on a GPU against its meaning in float64: ragged sizes, regions, dtypes, poison; and the gather."""

from __future__ import annotations

import pytest
import torch

from chipmunk_compile.kernels import tuner, tuning
from tests.kernels.triton_cases import check, permute, weights

pytest.importorskip("triton")
from tests.gpu import shapes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("arguments", shapes.MLP.values(), ids=shapes.MLP.keys())
def test_equals_its_meaning(arguments):
    shapes.run(arguments)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_gathers_tokens(dtype):
    check(permute(device="cuda", dtype=dtype, batch=3, tokens=1001, moved=777), dtype)


def test_the_tuner_measures_what_fits(monkeypatch):
    monkeypatch.setitem(tuner.CANDIDATES, "mlp_down", {"BO": (64,), "num_stages": (2, 80)})  # 80: 320 KiB
    device = torch.device("cuda", torch.cuda.current_device())
    key, default = "mlp_down 16-bit chunk 64", tuning.mlp_down(BF16, 64, torch.device("cpu"))
    assert tuner.measure(key, default, device) == {key: {**default, "BO": 64, "num_stages": 2}}


@pytest.mark.parametrize("dtype", [BF16, torch.float16, FP32])
@pytest.mark.parametrize("shape", [(3072, 12288, 0), (3072, 12288, 3072), (1001, 777, 8)])
def test_weights_are_turned_over(dtype, shape):
    check(weights("cuda", dtype, *shape), dtype)
