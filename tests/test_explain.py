"""explain(): what a report holds, and that looking changes nothing."""

import json

import pytest
import torch

import chipmunk_compile
from chipmunk_compile import OptionError, Reason
from tests.positioned_dit import PositionedLoop, position_ids, positioned
from tests.toy_dit import SMALL, Loop, compile_toy, toy


def report(model=None, **options):
    return chipmunk_compile.explain(
        toy() if model is None else model, *next(iter(Loop())), options={**SMALL, **options}
    )


def test_sites_names_shapes_and_predictions():
    found = report(**{"attention.sparsity": 0.75, "mlp.sparsity": 0.5})
    taken = {site.name: site for site in found.sites if site.accelerated}
    assert sum(site.accelerated for site in found.sites) == 4
    attention = [s for s in found.sites if s.kind == "attention"]
    assert [s.shapes["q_len"] for s in attention] == [68, 68]
    assert all(s.work_saved == pytest.approx(0.75) and s.detail == {"columns": 17, "of": 68} for s in attention)
    assert all(site.reason is None for site in taken.values())
    conditioning = [s for s in found.sites if s.reason is Reason.CONDITIONING_MLP]
    assert conditioning and not any(s.accelerated for s in conditioning)
    tables = found.state_bytes - sum(s.state_bytes for s in found.sites)
    assert 0 < tables < 1000  # chunk starts and sample tokens, shared by sites of a kind


def test_few_tokens_are_left_dense_with_the_numbers_and_the_cure():
    found = report(min_tokens=100)
    few = [s for s in found.sites if s.reason is Reason.TOO_FEW_TOKENS]
    assert len(few) == 4 and not any(s.accelerated for s in found.sites)
    assert all(s.detail["min_tokens"] == 100 for s in few)
    assert found.delta_share == 1.0 and found.state_bytes == 0
    assert "min_tokens" in found.to_text()


def test_forecasts_are_said():
    def lines(**options):
        return [line.split(maxsplit=1)[1] for line in report(**options).to_text().splitlines() if "forecast " in line]

    assert lines() == []
    (every,) = lines(**{"schedule.compute_every": 3})
    assert "one step in 3" in every and "refreshes count computed steps" in every
    (tolerance,) = lines(**{"forecast.tolerance": 0.004})
    assert "prove good to a tolerance of 0.004" in tolerance


def test_switched_off_by_an_option():
    found = report(**{"mlp.sparsity": None})
    assert [s.reason for s in found.sites if s.kind == "mlp" and s.shapes == {} and "option" in s.detail] == [
        Reason.DISABLED_BY_OPTION
    ] * 2
    assert sum(s.accelerated for s in found.sites) == 2


def test_every_form_says_the_same():
    found = report()
    data = json.loads(found.to_json())
    assert len(data["sites"]) == len(found.sites)
    assert data["delta_share"] == found.delta_share
    markdown = found.to_markdown()
    for site in found.sites:
        assert f"`{site.name}`" in markdown
        assert site.reason is None or site.reason.name in markdown
    assert str(found) == found.to_text()


def test_a_model_without_a_clock_is_told_so():
    class Timeless(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = toy().blocks[0]

        def forward(self, x, t, prompt):
            return self.block(torch.cat([prompt, x], 1).repeat(1, 1, 6)[..., :32], t[:, None].expand(-1, 32))

    found = report(Timeless().eval())
    assert [g.clock for g in found.graphs] == [False]
    assert "NO_CLOCK" in found.to_text() and "generation(" in found.to_text()


def test_explaining_compiles_nothing_and_leaves_the_model_as_it_was():
    model = toy()
    compiled, _ = compile_toy(model)
    for target in (model, compiled):
        report(target)
    assert chipmunk_compile.counters()["compiles"] == 0
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_bad_options_are_errors_here_too():
    with pytest.raises(OptionError, match="attention.sparsity"):
        report(**{"attention.sparsity": 1.5})


def report_of_order(model, **options):
    return chipmunk_compile.explain(
        model, *next(iter(PositionedLoop())), position_ids(), options={**SMALL, **options}
    ).permutation


def test_order_says_where_tokens_are_permuted_what_that_moves_and_what_is_kept():
    found = report_of_order(positioned())
    assert found.reason is None and found.order == "patch" and found.grids == ((1, 21, 23),)
    assert sorted((g.value, g.direction, g.kept) for g in found.gathers) == [
        ("cumsum.default", "in", True),
        ("input", "in", False),
        ("input", "in", True),  # the ids
        ("input", "in", True),  # the learned table
        ("linear.default of final", "out", False),
    ]
    assert found.bytes == sum(g.bytes for g in found.gathers if not g.kept) == 2 * 2 * 483 * 6 * 4
    assert found.walls == ("cumsum.default", "view.default")
    text = "\n".join([str(found), *found.lines()])
    assert "2 gathers move 46.4 KB a step, 3 kept" in text
    assert "1x21x23" in text and "linear.default of final" in text and "ends at" in text


def test_order_names_the_wall_that_is_too_dear_to_go_around():
    class Walled(type(positioned())):
        def forward(self, x, t, prompt, ids):
            c = self.time(torch.sin(t[:, None] * torch.arange(64)))
            h = self.into(x) + ids.sin().sum(-1, keepdim=True)
            for block in self.blocks:
                h = block(h.cumsum(1), c)
            return self.final(h).unflatten(1, (21, 23)).flip(1)

    found = report_of_order(Walled().eval().requires_grad_(False))
    assert found.reason is Reason.WALLED_IN and "WALLED_IN" in str(found) and "cumsum.default" in str(found)


def test_order_can_be_chosen():
    assert report_of_order(positioned(), order="hilbert").order == "hilbert"
    raster = report_of_order(positioned(), order="raster")
    assert raster.reason is Reason.DISABLED_BY_OPTION and not raster.gathers


class Broken(torch.nn.Module):
    """Reads a number from the device before its second block, which Dynamo then captures by itself or not at all."""

    def __init__(self, hidden: bool):
        super().__init__()
        self.model, self.hidden = toy(), hidden

    def forward(self, x, t, prompt):
        output = self.model(x, t, prompt)
        if self.hidden:
            return unseen(output)
        if output.mean().item() > 1e9:
            output = -output
        return output + self.model.blocks[0].attend(*3 * [output[:, None]])[:, 0]


@torch._dynamo.disable
def unseen(x):
    return x + torch.nn.functional.scaled_dot_product_attention(*3 * [x[:, None]])[:, 0]


@pytest.mark.parametrize("hidden", [False, True])
def test_what_dynamo_did_not_capture_is_said(hidden):
    capture = report(Broken(hidden).eval()).capture
    assert (capture.attention_calls, capture.attention_seen) == (3, 2 if hidden else 3)
    assert len(capture.breaks) == 1
    text = "\n".join(capture.lines())
    assert ("capture_scalar_outputs = True" in text) is not hidden
    assert f"{capture.attention_seen} of 3" in text


def test_a_model_captured_whole_says_nothing_of_it():
    found = report()
    assert (found.capture.attention_calls, found.capture.attention_seen) == (2, 2)
    assert found.capture.lines() == [] and "capture" not in found.to_text()


def test_attention_inside_torch_s_own_modules_counts():
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x)

    found = chipmunk_compile.explain(Wrapped(), torch.randn(1, 64, 16), options=SMALL)
    assert found.capture.attention_calls == found.capture.attention_seen == 1
