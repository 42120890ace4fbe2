"""Which keys a mask of text padding is written to leave open, told from the graph; never more than it says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from chipmunk_compile.passes import PASSES
from chipmunk_compile.passes.attention_sites import find_attention
from chipmunk_compile.passes.key_masks import attended_keys, mask_inputs
from tests.record import record
from tests.tiny_models import MODELS
from tests.token_graphs import traced

IMAGE, TEXT = 9, 4


def after(words):
    """As HunyuanVideo writes it: image first, then as many text tokens as count."""
    mask = torch.ones(2, IMAGE + TEXT, dtype=torch.bool)
    length = IMAGE + words.sum(1, dtype=torch.int)
    return mask.masked_fill(torch.arange(IMAGE + TEXT)[None] >= length[:, None], False)


MASKS = {
    "joined, text first": (lambda w: torch.cat([w, torch.ones(2, IMAGE, dtype=torch.bool)], 1), (TEXT, TEXT + IMAGE)),
    "joined, text last": (lambda w: torch.cat([torch.full((2, IMAGE), True), w], 1), (0, IMAGE)),
    "joined, new_ones between": (
        lambda w: torch.cat([w, w.new_ones(2, 5), w.new_ones(2, 4), w], 1),
        (TEXT, TEXT + 9),
    ),
    "padded": (lambda w: F.pad(w, (IMAGE, 0), value=True), (0, IMAGE)),
    "padded behind": (lambda w: F.pad(w, (0, IMAGE), value=1), (TEXT, TEXT + IMAGE)),
    "counted": (after, (0, IMAGE)),
    "counted, less than": (lambda w: torch.arange(13)[None] < (IMAGE + w.sum(1))[:, None], (0, IMAGE)),
    "a constant length": (lambda w: (torch.arange(13) < 7)[None], (0, 7)),
    "negated": (lambda w: ~(torch.arange(13)[None] >= (IMAGE + w.sum(1))[:, None]), (0, IMAGE)),
    "both of two": (lambda w: after(w) & F.pad(w, (IMAGE, 0), value=True), (0, IMAGE)),
    "a part": (lambda w: after(w)[:, 2:11], (0, IMAGE - 2)),
    "in another order": (lambda w: after(w).index_select(1, torch.arange(13).flip(0)), (0, IMAGE)),
}
UNKNOWN = {
    "an input": lambda w: w,
    "padded with closed keys": lambda w: F.pad(w, (IMAGE, 0), value=False),
    "all closed": lambda w: torch.zeros(2, 13, dtype=torch.bool),
    "text only, counted": lambda w: torch.arange(13)[None] < w.sum(1)[:, None],
    "counted down": lambda w: torch.arange(13).flip(0)[None] < (IMAGE + w.sum(1))[:, None],
    "counted in steps": lambda w: torch.arange(0, 26, 2)[None] < (IMAGE + w.sum(1))[:, None],
    "more than a length": lambda w: torch.arange(13)[None] > (IMAGE + w.sum(1))[:, None],
    "fewer words than that": lambda w: torch.arange(13)[None] < (w.sum(1) - IMAGE)[:, None],
    "one or the other": lambda w: F.pad(w, (IMAGE, 0), value=True) ^ after(w),
    "transposed": lambda w: torch.ones(13, 2, dtype=torch.bool).masked_fill(w[:, :1].T, False).T,
}


def spans(function, transform=lambda mask: mask[:, None, None]):
    words = torch.tensor([[True] * 3 + [False], [True] * 2 + [False] * 2])
    gm = traced(lambda w: transform(function(w)), words)
    (mask,) = gm.graph.output_node().all_input_nodes
    return attended_keys(mask), gm(words)


@pytest.mark.parametrize("name", MASKS)
def test_open_keys(name):
    function, expected = MASKS[name]
    found, mask = spans(function)
    assert found == expected
    if name != "in another order":
        assert mask[..., slice(*found)].all()
    views = lambda mask: mask.unsqueeze(1).expand(-1, 3, -1)[:, :1].reshape(len(mask), 1, 1, -1).bool()
    assert spans(function, views)[0] == expected


@pytest.mark.parametrize("name", UNKNOWN)
def test_nothing_is_expected_of_other_masks(name):
    assert spans(UNKNOWN[name])[0] is None


def test_an_additive_mask_is_not_spoken_of():
    assert spans(lambda w: torch.ones(2, 13).masked_fill(after(w), 0.0))[0] is None


@pytest.mark.parametrize("name, expected", [("hunyuan_video", (0, 72)), ("qwen_image", (7, 67)), ("chroma", None)])
def test_models_of_diffusers(name, expected):
    """Chroma gets its mask ready-made."""
    model, kwargs = MODELS[name](layers=1)
    _, runs = record(model, passes=PASSES, **kwargs)
    (gm,) = [run.gm for run in runs]
    sites, _ = find_attention(gm, min_tokens=60)
    assert {attended_keys(site.key_mask) for site in sites} == {expected}
    inputs = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    (position,) = mask_inputs(gm, sites)
    assert "attention_mask" in inputs[position] or "hidden_states_mask" in inputs[position]
