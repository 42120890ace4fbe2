"""Real diffusers transformers: at sparsity 0 the delta program runs and equals what `torch.compile(model)` gives."""

import pytest

from tests.zoo import ZOO
from tests.zoo.coverage import KINDS, cover

CLASSES = (
    "FluxTransformer2DModel",
    "SD3Transformer2DModel",
    "PixArtTransformer2DModel",
    "WanTransformer3DModel",
    "HunyuanVideoTransformer3DModel",
    "QwenImageTransformer2DModel",
    "CogVideoXTransformer3DModel",
    "LTXVideoTransformer3DModel",
    "AuraFlowTransformer2DModel",
)


@pytest.mark.parametrize("name", CLASSES)
def test_sparsity_zero_equals_inductor(name):
    coverage = cover(ZOO[name], inductor=True)
    assert coverage.calls["refresh"] >= 2 and coverage.calls["delta"] >= 2, coverage.calls
    assert all(coverage.accelerated[kind] == coverage.of[kind] >= 2 for kind in KINDS)
    assert coverage.error < 1e-4
