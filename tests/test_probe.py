"""probe(): what is measured, held against a brute force in float64; and that looking changes nothing."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import chipmunk_compile
from chipmunk_compile import OptionError, Reason
from chipmunk_compile.kernels import reference
from chipmunk_compile.watching import AttentionWatch, Memory
from tests import tiny_pipelines
from tests.test_pipelines import CALLS, generate
from tests.toy_dit import SMALL, TEXT, TOKENS, Block, Loop, ToyDiT, toy

ALL = {"chunks": 99, "tokens": 99}  # nothing is sampled
TOTAL = TEXT + TOKENS
OPTIONS = {**SMALL, "attention.sparsity": 0.75, "mlp.sparsity": 0.5, "schedule.warmup": 1, "schedule.refresh_every": 3}


class Recorded(Block):
    """Keeps what its attention and its MLP compute, outside of any graph."""

    def attend(self, q, k, v):
        if not torch.compiler.is_compiling():
            self.seen.append((q, k, v))
        return super().attend(q, k, v)

    def mlp(self, x):
        if not torch.compiler.is_compiling():
            self.hidden.append(F.gelu(self.up(x), approximate="tanh"))
        return super().mlp(x)


class Planted(Block):
    """Attends to the last two keys alone."""

    def attend(self, q, k, v):
        k = torch.cat([k[:, :, :-2], 0 * k[:, :, -2:] + 10], 2)
        return F.scaled_dot_product_attention(q.abs() + 1, k, v)


def model_of(block: type[Block], layers: int = 1) -> ToyDiT:
    model = toy(layers=layers)
    for layer in model.blocks:
        layer.__class__ = block
        layer.seen, layer.hidden = [], []
    return model


def look(model: nn.Module, steps: int = 5, options=OPTIONS, **more) -> chipmunk_compile.probe:
    with chipmunk_compile.probe(model, options=options, **{**ALL, **more}) as seen:
        Loop(steps).run(model)
    return seen


def rows_of(seen, kind: str) -> list[dict]:
    return [row for row in seen.rows if row["kind"] == kind]


@pytest.fixture(scope="module")
def looked():
    model = model_of(Recorded)
    return look(model), model.blocks[0]


def chunks_of(tokens: int) -> list[slice]:
    return [slice(start, min(tokens, start + 32)) for start in range(0, tokens, 32)]


def test_attention_mass_is_that_of_a_brute_force(looked):
    seen, block = looked
    rows = rows_of(seen, "attention")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4] and len(block.seen) == 5
    for row, (q, k, _) in zip(rows, block.seen):
        weights = (q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        masses, needed = [], []
        for chunk in chunks_of(TOTAL):
            held = weights[:, :, chunk].mean(2).sort(-1, descending=True).values.cumsum(-1)  # [B, H, M]
            masses.append([held[..., round(share * TOTAL) - 1].mean() for share in (0.05, 0.1, 0.2, 0.3)])
            needed.append([((held < part).sum(-1) + 1).double().mean() / TOTAL for part in (0.9, 0.95)])
        assert_row(row, ("mass_5", "mass_10", "mass_20", "mass_30"), torch.tensor(masses).mean(0))
        assert_row(row, ("columns_90", "columns_95"), torch.tensor(needed).mean(0))


def assert_row(row: dict, names: tuple[str, ...], expected: torch.Tensor) -> None:
    got = torch.tensor([row[name] for name in names], dtype=torch.float64)
    torch.testing.assert_close(got, expected.double(), rtol=1e-4, atol=1e-5)


def test_what_a_delta_follows_is_what_the_delta_op_gives(looked):
    seen, block = looked
    rows = rows_of(seen, "attention")
    assert [row["age"] for row in rows] == [0, 0, 1, 0, 1]  # of step 1 the clock is not sure, as in a real run
    starts = reference.chunk_table([TOTAL], 32)
    samples = reference.sample_table(starts, 8)
    heads, dim = block.seen[0][0].shape[1], block.seen[0][0].shape[3]
    state = reference.attention_state(
        1, heads, TOTAL, TOTAL, dim, round(0.25 * TOTAL), len(starts) - 1, torch.float32, "cpu"
    )
    for row, (q, k, v) in zip(rows, block.seen):
        if row["age"] == 0:
            refreshed = reference.attention_refresh(q, k, v, None, starts, samples, *state, dim**-0.5, 32)
            assert row["caught"] is None
            continue
        exact = F.scaled_dot_product_attention(q, k, v)
        delta = reference.attention_delta(q, k, v, None, starts, *state, dim**-0.5, 32)
        caught = 1 - (exact - delta).square().sum() / (exact - refreshed).square().sum()
        assert 0.1 < caught < 0.99
        assert row["caught"] == pytest.approx(caught.item(), abs=1e-3)


def test_changes_are_those_of_the_outputs(looked):
    seen, block = looked
    outputs = [F.scaled_dot_product_attention(*qkv).double() for qkv in block.seen]
    for row, before, now in zip(rows_of(seen, "attention")[2:], outputs[1:], outputs[2:]):
        assert row["change"] == pytest.approx(((now - before).norm() / now.norm()).item(), rel=1e-3)
    model = model_of(Block)
    made = [output.double() for output in Loop(5).run(model)]
    rows = rows_of(seen, "model")
    assert rows[0]["change"] is None and rows[2]["line"] is None
    for row, before, now in zip(rows[2:], made[1:], made[2:]):
        assert row["change"] == pytest.approx(((now - before).norm() / now.norm()).item(), rel=1e-4)
    line = 2 * made[3] - made[2]  # Loop's steps are evenly spaced
    assert rows[4]["line"] == pytest.approx(((made[4] - line).norm() / made[4].norm()).item(), rel=1e-3)


def test_energy_of_an_mlps_change_is_that_of_a_brute_force(looked):
    seen, block = looked
    norm = block.down.weight.double().norm(dim=0)
    rows = rows_of(seen, "mlp")
    assert rows[0]["energy_10"] is None
    samples = reference.sample_table(reference.chunk_table([TOTAL], 32), 8).long()
    for row, before, now in zip(rows[2:], block.hidden[1:], block.hidden[2:]):
        moved = now.double() - before.double()
        shares, caught = [], []
        for chunk, sample in zip(chunks_of(TOTAL), samples):
            energy = moved[0, chunk].square().sum(0) * norm.square()
            held = energy.sort(descending=True).values.cumsum(0) / energy.sum()
            shares.append([held[round(share * len(energy)) - 1] for share in (0.1, 0.2, 0.3)])
            best = (moved[0, sample].abs().sum(0) * norm).topk(len(energy) // 2).indices
            caught.append(energy[best].sum() / energy.sum())
        assert_row(row, ("energy_10", "energy_20", "energy_30"), torch.tensor(shares).mean(0))
        assert_row(row, ("caught",), torch.stack(caught).mean()[None])
        assert row["act_change"] == pytest.approx((moved.norm() / now.double().norm()).item(), rel=1e-3)


def test_planted_concentration_is_seen():
    rows = rows_of(look(model_of(Planted), steps=2), "attention")
    even = rows_of(look(model_of(Block), steps=2), "attention")
    for planted, plain in zip(rows, even):
        assert planted["mass_5"] > 0.999 and planted["columns_95"] == pytest.approx(2 / TOTAL, abs=1e-3)
        assert planted["mass_chosen"] > 0.999
        assert plain["mass_5"] < 0.2 and plain["columns_90"] > 0.5


def test_a_sample_stands_for_the_whole():
    whole, part = (look(model_of(Block, 2), steps=4, **size) for size in (ALL, {"chunks": 2, "tokens": 8}))
    assert part.state_bytes < whole.state_bytes / 3
    for kind, name, rel in (("attention", "mass_20", 0.05), ("attention", "change", 0.2), ("mlp", "energy_20", 0.3)):
        for a, b in zip(rows_of(whole, kind), rows_of(part, kind)):
            assert (a["site"], a["step"]) == (b["site"], b["step"])
            assert a[name] is b[name] is None or b[name] == pytest.approx(a[name], rel=rel)


@pytest.mark.parametrize("masked", [False, True])
def test_grouped_heads_and_masks(masked, monkeypatch):
    """Key heads shared by query heads, keys masked out, heads in blocks of one: the same as in one piece."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 40, 8, generator=generator) for heads in (4, 2, 2))
    mask = torch.ones(2, 1, 1, 40, dtype=torch.bool)
    mask[1, ..., 25:] = not masked
    keys = k.repeat_interleave(2, 1).double()
    logits = q.double() @ keys.transpose(-1, -2) * 8**-0.5
    weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    out = weights @ v.repeat_interleave(2, 1).double()
    held = torch.stack([weights[:, :, c].mean(2).sort(-1, descending=True).values.cumsum(-1) for c in chunks_of(40)])
    expected = held[..., 7].mean()  # 20% of 40 columns
    site = SimpleNamespace(node=SimpleNamespace(meta={"val": out}), scale=8**-0.5)
    watch = AttentionWatch(SimpleNamespace(site=site, kept=10, samples=8, chunks=(32, 8)), **ALL)
    found = []
    for block in (1, 1 << 24):
        monkeypatch.setattr("chipmunk_compile.concentration.BLOCK", block)
        memory = Memory()
        args = q, k, v, mask if masked else None, out.float()
        watch.look(memory, True, *args)
        found.append(watch.look(memory, False, *args))
    torch.testing.assert_close(*found, equal_nan=True)
    numbers = dict(zip(watch.names, found[0].tolist()))
    assert numbers["mass_20"] == pytest.approx(expected.item(), rel=1e-5)
    assert numbers["change"] == 0.0 and 0 < numbers["mass_chosen"] < 1


def test_guidance_by_two_calls_makes_two_streams():
    model = model_of(Block)
    other = torch.randn(1, TEXT, 6, generator=torch.Generator().manual_seed(9))
    with chipmunk_compile.probe(model, options=OPTIONS) as seen, torch.no_grad():
        for x, t, prompt in Loop(5):
            model(x, t, prompt)
            model(x, t, other)
    alone = look(model, options=OPTIONS, chunks=6, tokens=32)
    for kind in ("attention", "mlp", "model"):
        rows = rows_of(seen, kind)
        assert [(row["step"], row["stream"]) for row in rows] == [(step, s) for step in range(5) for s in (0, 1)]
        first = [row for row in rows if row["stream"] == 0]
        assert [row["change"] for row in first[2:]] == [row["change"] for row in rows_of(alone, kind)[2:]]
        assert all(row["change"] < 0.5 for row in rows[4:])


def test_another_generation_starts_from_nothing():
    model = model_of(Block)
    with chipmunk_compile.probe(model, options=OPTIONS) as seen:
        for seed in (0, 1):
            Loop(4, seed=seed).run(model)
    rows = rows_of(seen, "model")
    assert [(row["generation"], row["step"]) for row in rows] == [(g, step) for g in (1, 2) for step in range(4)]
    assert rows[4]["change"] is None and rows_of(seen, "mlp")[4]["change"] is None


@pytest.mark.parametrize("how", ["eager", "in place", "wrapped"])
def test_compiled_or_not_it_sees_the_same_and_changes_nothing(how, looked):
    model = model_of(Block)
    plain = Loop(5).run(model)
    called = torch.compile(model, backend="eager") if how == "wrapped" else model
    if how == "in place":
        model.compile(backend="eager")
    with chipmunk_compile.probe(called, options=OPTIONS, **ALL) as seen:
        outputs = Loop(5).run(called)
    assert all(map(torch.equal, outputs, plain))
    assert seen.rows == looked[0].rows
    assert not model._forward_hooks
    assert all(map(torch.equal, Loop(5).run(called), plain)) and len(seen.rows) == len(looked[0].rows)


def test_a_graph_break_hides_nothing():
    model = toy(broken=True, layers=2)
    whole = look(toy(layers=2))
    broken = look(model)
    names = [(row["kind"], row["step"]) for row in whole.rows]
    assert sorted(names) == sorted((row["kind"], row["step"]) for row in broken.rows)
    mass = [[row["mass_20"] for row in rows_of(seen, "attention")] for seen in (whole, broken)]
    assert mass[0] == pytest.approx(mass[1], rel=1e-5)


def test_a_graph_captured_anew_begins_with_a_refresh():
    model = toy(layers=2)
    with chipmunk_compile.probe(model, options={**OPTIONS, "schedule.refresh_every": 9}) as seen, torch.no_grad():
        for step, inputs in enumerate(Loop(6)):
            model.broken = step > 3
            model(*inputs)
    rows = rows_of(seen, "attention")
    assert [row["age"] for row in rows[::2]] == [0, 0, 1, 2, 0, 4]
    assert [row["caught"] is None for row in rows[::2]] == [True, True, False, False, True, False]


def test_a_module_called_twice_is_two_layers():
    model = toy(layers=2)
    model.blocks[1] = model.blocks[0]
    rows = rows_of(look(model, steps=3), "attention")
    names = [row["site"] for row in rows]
    assert len(set(names)) == 2 and names == names[:2] * 3
    assert rows[0]["mass_20"] != rows[1]["mass_20"]


def test_what_is_not_looked_at_has_a_reason():
    seen = look(model_of(Block), options={**SMALL, "min_tokens": 100})
    assert {row["kind"] for row in seen.rows} == {"model"} and (seen.forwards, seen.captured) == (5, 0)
    assert Reason.TOO_FEW_TOKENS in {declined.reason for declined in seen.declined.values()}
    assert "TOO_FEW_TOKENS" in str(seen) and "5 of 5 calls" in str(seen)


def test_switched_off_sites_are_looked_at():
    seen = look(model_of(Block), steps=2, options={**SMALL, "attention.sparsity": None, "dense_layers": 1})
    assert {row["kind"] for row in seen.rows} == {"model", "attention", "mlp"}


def test_rows_are_plain_and_the_report_names_every_layer(looked):
    seen, _ = looked
    assert json.loads(json.dumps(seen.rows)) == seen.rows
    text = str(seen)
    assert all(row["site"] in text for row in seen.rows)
    assert "5 steps, 1 stream" in text and "25.0% of the columns" in text


@pytest.mark.parametrize("name, streams", [("flux", 1), ("wan", 2)])
def test_a_whole_pipeline(name, streams):
    pipe = getattr(tiny_pipelines, f"{name}_pipeline")()
    call = {**CALLS[name], "num_inference_steps": 5}
    plain = generate(pipe, name, **call)
    with chipmunk_compile.probe(pipe.transformer, options={**SMALL, "min_tokens": 16}) as seen:
        pictures = generate(pipe, name, **call)
    assert (pictures == plain).all()
    for kind in ("model", "attention", "mlp"):
        places = {(row["step"], row["stream"]) for row in rows_of(seen, kind)}
        assert places == {(step, stream) for step in range(5) for stream in range(streams)}
        later = [row for row in rows_of(seen, kind) if row["step"] > 1]
        moving = [row for row in later if "text_embedder" not in row["site"]]
        assert moving and all(0 < row["change"] < 1 for row in moving)
        still = [row for row in later if row not in moving]  # the prompt's MLP: nothing to hold, nothing to catch
        assert all((row["change"], row["caught"], row["energy_10"]) == (0.0, None, None) for row in still)


def test_bad_arguments_and_nothing_seen():
    with pytest.raises(ValueError, match="chunks=0"):
        chipmunk_compile.probe(toy(), chunks=0)
    with pytest.raises(OptionError, match="min_tokens"):
        chipmunk_compile.probe(toy(), options={"min_token": 3})
    with chipmunk_compile.probe(toy()) as seen:
        pass
    assert "no forward of ToyDiT" in str(seen) and seen.rows == []
    with pytest.raises(ValueError, match="nothing to draw"):
        pytest.importorskip("matplotlib")
        seen.plot("never.png")


def test_a_failing_run_leaves_the_model_as_it_was():
    model = toy()
    with pytest.raises(ZeroDivisionError), chipmunk_compile.probe(model):
        raise ZeroDivisionError
    assert not model._forward_hooks


def test_plot(looked, tmp_path, monkeypatch):
    seen, _ = looked
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ImportError, match="pip install matplotlib"):
            seen.plot(tmp_path / "probe.png")
    pytest.importorskip("matplotlib")
    seen.plot(tmp_path / "probe.svg")
    drawn = (tmp_path / "probe.svg").read_text()
    assert drawn.startswith("<?xml") and "<path" in drawn
