"""Real models: raised without a change of output, their attention told apart, no constancy claimed wrongly."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from chipmunk_compile.passes.attention_sites import find_attention
from chipmunk_compile.passes.raise_attention import raise_attention
from chipmunk_compile.passes.reasons import Reason
from chipmunk_compile.passes.sdpa import SDPA, read_sdpa
from tests.raised_attention import check_constancy
from tests.record import Recorded, record, tensors
from tests.tiny_models import MODELS

FEW, CROSS, LINEAR = Reason.TOO_FEW_TOKENS, Reason.CROSS_ATTENTION, Reason.NOT_SOFTMAX_ATTENTION
# By the models' own structure: size, sites, then what is declined.
EXPECTED = {
    "flux": ({"layers": 1, "single": 1}, 2, {}),
    "sd3": ({}, 3, {}),  # one of two blocks attends to the image alone as well
    "wan_i2v": ({}, 2, {CROSS: 4}),  # text and image context
    "wan_vace": ({"layers": 1}, 2, {CROSS: 2}),  # a control stream
    "hunyuan_video": ({"layers": 1, "single": 1}, 2, {FEW: 1}),  # the text refiner
    "qwen_image": ({}, 2, {}),
    "cogvideox": ({}, 2, {}),
    "ltx": ({}, 2, {CROSS: 2}),
    "pixart": ({}, 2, {CROSS: 2}),
    "auraflow": ({"layers": 1, "single": 1}, 2, {}),
    "lumina2": ({}, 3, {FEW: 1}),  # the image refiner; the text refiner
    "chroma": ({"layers": 1, "single": 1}, 2, {}),
    "latte": ({}, 2, {CROSS: 2, FEW: 2}),  # attention over three frames
    "sana": ({}, 0, {CROSS: 2, LINEAR: 2}),
}


def run(model: torch.nn.Module, **kwargs) -> list[Recorded]:
    """Records the raised graphs, checked against the model itself and against their own labels."""
    with torch.no_grad():
        expected = tensors(model(**kwargs))
    out, runs = record(model, passes=(raise_attention,), **kwargs)
    for a, b in zip(out, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for recorded in runs:
        check_constancy(recorded)
    return runs


def attention(runs: list[Recorded], min_tokens: int = 16):
    found = [find_attention(recorded.gm, min_tokens=min_tokens) for recorded in runs]
    return [s for sites, _ in found for s in sites], [d for _, declined in found for d in declined]


@pytest.mark.parametrize("name", EXPECTED)
def test_models(name):
    size, expected_sites, expected_reasons = EXPECTED[name]
    model, kwargs = MODELS[name](**size)
    sites, declined = attention(run(model, **kwargs))
    assert len(sites) == expected_sites
    assert Counter(d.reason for d in declined) == Counter(expected_reasons)
    modules = dict(model.named_modules())
    assert all(entry.name in modules for entry in (*sites, *declined))
    masked = name in ("hunyuan_video", "qwen_image", "chroma")
    for site in sites:
        assert site.kv_len == site.q_len >= 60
        assert (site.key_mask is not None) == masked
        assert site.kv_heads == (2 if name == "lumina2" else site.heads)


@pytest.mark.parametrize("context", [7, 35])
def test_grouped_cross_attention_of_any_length(context):
    """Stable Audio: full heads for itself, grouped heads for the text, which may be as long as the audio."""
    from diffusers import StableAudioDiTModel

    model = StableAudioDiTModel(
        sample_size=34, in_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=4,
        num_key_value_attention_heads=2, out_channels=4, cross_attention_dim=32, time_proj_dim=16,
        global_states_input_dim=20, cross_attention_input_dim=24,
    ).eval().requires_grad_(False)  # fmt: skip
    runs = run(
        model,
        hidden_states=torch.randn(1, 4, 34),
        timestep=torch.tensor([5.0]),
        encoder_hidden_states=torch.randn(1, context, 24),
        global_hidden_states=torch.randn(1, 1, 20),
        rotary_embedding=(torch.randn(35, 8), torch.randn(35, 8)),
    )
    sites, declined = attention(runs)
    assert [(s.name, s.q_len) for s in sites] == [("transformer_blocks.0.attn1", 35)]
    assert [(d.name, d.reason) for d in declined] == [("transformer_blocks.0.attn2", CROSS)]
    assert [read_sdpa(n).enable_gqa for n in runs[0].gm.graph.nodes if n.target is SDPA] == [False, True]


def test_text_as_long_as_the_video():
    model, kwargs = MODELS["wan"](text=72, layers=1)
    sites, declined = attention(run(model, **kwargs))
    assert [(s.q_len, s.kv_len) for s in sites] == [(72, 72)]
    assert [(d.reason, d.detail["kv_len"]) for d in declined] == [(CROSS, 72)]


def test_attention_spelled_out():
    """diffusers' processor without scaled_dot_product_attention: baddbmm, softmax, bmm, 3-D masks."""
    from diffusers.models.attention_processor import AttnProcessor

    model, kwargs = MODELS["pixart"]()
    model.set_attn_processor(AttnProcessor())
    (recorded,) = run(model, **kwargs)
    raised = [read_sdpa(n) for n in recorded.gm.graph.nodes if n.target is SDPA]
    assert recorded.before["baddbmm"] == 4 and len(raised) == 4 and "baddbmm" not in recorded.after
    assert {tuple(a.query.meta["val"].shape[:2]) for a in raised} == {(2, 2)}
    assert [a.mask and tuple(a.mask.meta["val"].shape) for a in raised] == [None, (2, 1, 1, 7)] * 2
    sites, declined = attention([recorded])
    assert len(sites) == 2 and [d.reason for d in declined] == [CROSS, CROSS]
