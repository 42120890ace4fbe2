"""Models trained for quality against time: moving scenes, training in stretches, checkpoints, the harness."""

import importlib.util
import json
from itertools import islice

import pytest
import torch
from safetensors import safe_open

from benchmarks.quality import __main__ as command
from benchmarks.quality import attention_mass, caches, checkpoints, frechet, frontier, plot, train
from benchmarks.quality.sampling import captions, generate, pictures_of, starting_noise
from benchmarks.quality.subjects import IMAGE, SUBJECTS, VIDEO, fold, tiny, unfold
from benchmarks.quality.video import drawing, scenes
from benchmarks.quality.video import words as video_words
from benchmarks.quality.windows import TILE, tile_window_model

CPU = torch.device("cpu")
SMALL = tiny(VIDEO)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SMALL.build().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def inputs():
    return starting_noise(SMALL, 2, 0, CPU), captions(SMALL, 2, 0)


def test_clips_are_of_their_seed_and_move():
    clips, text = next(drawing.clips(3, 5, CPU, 4, 32))
    assert clips.shape == (3, 3, 4, 32, 32) and clips.min() >= -1 and clips.max() <= 1
    again, other = (next(drawing.clips(3, seed, CPU, 4, 32))[0] for seed in (5, 6))
    assert torch.equal(clips, again) and not torch.equal(clips, other)
    assert all((clip[:, 0] - clip[:, -1]).abs().mean() > 0.02 for clip in clips)
    assert text.shape == (3, video_words.PHRASES, video_words.VOCABULARY)
    for caption in video_words.read(text):
        assert len(caption.split(", ")) == 2 + video_words.OBJECTS


def test_words_say_what_is_drawn():
    drawn = scenes.sample_scenes(64, torch.Generator().manual_seed(0))
    right = drawn.text[:, 2, video_words.INDEX["right"]] == 1
    assert right.any() and (drawn.velocity[right, 0, 0] > 0.3).all()
    pans = drawn.text[:, 1, video_words.INDEX["pan-left"]] == 1
    assert pans.any() and (drawn.pan[pans, 0] < 0).all()


@pytest.mark.parametrize("name, tokens", [("video", 9216), ("image", 4096)])
def test_subjects_have_the_tokens_that_the_issue_asks_for(name, tokens):
    subject = SUBJECTS[name]
    assert subject.tokens == tokens
    parameters = sum(p.numel() for p in subject.build().parameters())
    assert parameters < 18e6  # 36 MB in fp16


def test_latents_are_pixels():
    for subject in (SMALL, tiny(IMAGE)):
        latents, text = next(subject.stream(2, 0, CPU))
        assert latents.shape == (2, *subject.latents) and text.shape[1:] == (subject.phrases, 64)
        assert torch.equal(fold(unfold(latents)), latents)
        coarse = next(subject.stream(2, 0, CPU, coarse=True))[0]
        assert coarse.shape[3:] == tuple(side // 2 for side in latents.shape[3:])


def options(folder, *more: str):
    args = train.parse(["--model", "video", "--folder", str(folder), "--tiny", "--device", "cpu", *more])
    args.folder = str(args.folder)
    return args


def test_training_learns_a_batch_and_resumes_to_the_bit(tmp_path):
    trainer = train.Trainer(SMALL, tmp_path, options(tmp_path, "--muon-lr", "0.01", "--adamw-lr", "0.01"))
    latents, text = next(SMALL.stream(4, 0, CPU))
    trainer.warm_from = -train.WARM_UP  # at full learning rate from the first step
    losses = [trainer.update(latents, text).item() for _ in range(6)]
    assert sum(losses[3:]) < 0.97 * sum(losses[:3])
    trainer.save()
    trainer.update(latents, text)
    resumed = train.Trainer(SMALL, tmp_path, options(tmp_path, "--muon-lr", "0.01", "--adamw-lr", "0.01"))
    assert resumed.step == 6
    resumed.update(latents, text)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_training_goes_on_from_weights_alone(tmp_path):
    trainer = train.Trainer(SMALL, tmp_path, options(tmp_path))
    trainer.update(*next(SMALL.stream(2, 0, CPU)))
    trainer.seconds = 30.0
    trainer.save()
    (tmp_path / checkpoints.STATE).unlink()
    resumed = train.Trainer(SMALL, tmp_path, options(tmp_path))
    assert (resumed.step, resumed.warm_from, resumed.seconds) == (1, 1, 30.0)
    for kept, taken in zip(trainer.average.parameters(), resumed.model.parameters()):
        assert torch.equal(kept.half().float(), taken)


def test_rope_at_half_size_spans_the_same_places():
    model = SMALL.build()
    whole = [t.clone() for t in model.rope(torch.zeros(1, 12, 4, 16, 16))]
    train.space_rope(model, 2)
    half = model.rope(torch.zeros(1, 12, 4, 8, 8))
    for full, spaced in zip(whole, half):
        assert torch.equal(full.view(4, 8, 8, -1)[:, ::2, ::2], spaced.view(4, 4, 4, -1))
    train.space_rope(model, 1)
    assert all(map(torch.equal, whole, model.rope(torch.zeros(1, 12, 4, 16, 16))))


def test_shards_are_small_and_whole(tmp_path):
    model = VIDEO.build()
    checkpoints.save_weights(model, {}, tmp_path)
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1 and all(path.stat().st_size <= 15e6 for path in shards)
    assert sum(len(safe_open(path, "pt").keys()) for path in shards) == len(model.state_dict())
    loaded = checkpoints.load_weights(tmp_path, CPU, torch.bfloat16)
    for name, parameter in model.named_parameters():
        got = loaded.get_parameter(name)
        expected = parameter.half().float().to(got.dtype)
        assert torch.equal(got, expected), name
    assert loaded.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert loaded.blocks[0].scale_shift_table.dtype == torch.float32


def test_parts_are_the_model(model, inputs):
    noise, text = inputs
    parts = caches.Parts(model, compiled=False)
    plain = generate(model, SMALL, noise, text, 4, torch.float32)
    for make in (lambda: caches.TeaCache(parts, 0.0, [0.0, 1.0]), lambda: caches.FirstBlock(parts, 0.0)):
        assert torch.allclose(generate(caches.PerStream(make), SMALL, noise, text, 4, torch.float32), plain, atol=1e-5)
    skipping = generate(caches.PerStream(lambda: caches.FirstBlock(parts, 9.0)), SMALL, noise, text, 4, torch.float32)
    assert (skipping - plain).abs().max() > 1e-3


def test_a_window_of_all_tiles_is_dense_attention(model, inputs):
    noise, text = inputs
    call = dict(hidden_states=noise, timestep=torch.full((2,), 500.0), encoder_hidden_states=text, return_dict=False)
    windowed, kept = tile_window_model(model, SMALL.grid, (9, 9, 9), CPU)
    assert kept == 1.0
    assert torch.allclose(windowed(**call)[0], model(**call)[0], atol=1e-4)
    narrow, kept = tile_window_model(model, SMALL.grid, (0, 0, 0), CPU)
    assert kept == TILE / SMALL.tokens
    assert (narrow(**call)[0] - model(**call)[0]).abs().max() > 1e-3


def test_attention_mass_of_known_attention():
    query = torch.zeros(1, 1, 128, 4)
    chunks = [torch.arange(64)]
    even = attention_mass.column_mass(query, query, chunks)
    assert even.tolist() == pytest.approx([9 / 128, 21 / 128, 38 / 128])
    query[..., 0], key = 1.0, torch.zeros(1, 1, 128, 4)
    key[:, :, 5, 0] = 100.0
    assert attention_mass.column_mass(query, key, chunks).tolist() == pytest.approx([1.0, 1.0, 1.0])


def test_attention_mass_sees_every_layer(model, inputs):
    noise, text = inputs
    found = attention_mass.attention_mass(model, SMALL, noise[:1], text[:1], torch.float32, steps=6)
    assert len(found["layers"]) == 2 and set(found["moments"]) == {"early", "middle", "late"}
    assert all(0 < row[0] < row[1] < row[2] <= 1 for row in found["layers"])


def test_frechet_distance():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(4000, 3, generator=generator).double()
    second = 2 * torch.randn(4000, 3, generator=generator).double() + torch.tensor([1.0, 0.0, 0.0])
    of = lambda x: (x.mean(0), x.T.cov())
    assert frechet.frechet(of(first), of(first)) == pytest.approx(0.0, abs=1e-6)
    assert frechet.frechet(of(first), of(second)) == pytest.approx(1 + 3 * (2 - 1) ** 2, rel=0.1)


def test_harness(model, tmp_path, uncompiled):
    """Two methods, and the rows of a second run are those of the first."""
    folder, output = tmp_path / "weights", tmp_path / "rows.json"
    checkpoints.save_weights(model, {}, folder)
    asked = [
        "--model", "video", "--tiny", "--eager", "--checkpoint", str(folder), "--output", str(output), "--seeds", "2",
        "--steps", "8", "--encoder-seconds", "0", "--only", "step reuse every=2", "sparsity=0.7 sparsity=0.5",
    ]  # fmt: skip
    command.main(asked)
    whole = json.loads(output.read_text())
    rows = {row["label"]: row for row in whole["rows"]}
    assert len(rows) == 2 and not any("failure" in row for row in rows.values())
    ours = next(row for label, row in rows.items() if label.startswith("chipmunk"))
    assert ours["calls"] == {"refresh": 6, "delta": 10}  # R R d d d R d d, of two streams
    for row in rows.values():
        assert {"model", "method", "setting", "steps", "speedup", "psnr", "ssim", "rel_l1", "frechet"} <= set(row)
        assert 10 < row["psnr"] < 100
    assert len(whole["attention_mass"]["layers"]) == 2
    command.main(asked)
    assert json.loads(output.read_text())["rows"] == whole["rows"]
    if importlib.util.find_spec("matplotlib"):  # tests do without
        assert plot.draw(output).read_text().startswith("<?xml")


def test_rows_as_a_table(tmp_path):
    whole = {"device": "some GPU", "rows": [
        {"method": method, "label": method + " x", "setting": setting, "steps": steps, "speedup": speedup, "psnr": 40.0,
         "psnr_ci": 0.5, "ssim": 0.9, "rel_l1": 0.1, "frechet": None}
        for method, setting, steps, speedup in (
            ("step reuse", {}, 28, 2.0), ("chipmunk", {"preset": "fast"}, 28, 1.5), ("dense again", {}, 28, 1.0),
            ("chipmunk", {"attention.chunk": 192}, 28, 3.0), ("step reuse", {}, 50, 1.2),
        )
    ]}  # fmt: skip
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(whole))
    lines = plot.table(path, 28).splitlines()[2:]
    assert [line.split(" | ")[:2] for line in lines] == [
        ["| **chipmunk x**", "1.50x"], ["| step reuse x", "2.00x"], ["| chipmunk x", "3.00x"],
    ]  # fmt: skip
    if importlib.util.find_spec("matplotlib"):
        assert plot.draw(path).is_file()


def test_settings_are_the_same_for_all_numbers_of_steps(model):
    def never(*args, **kwargs):
        raise AssertionError("nothing runs before it is asked for")

    builder = frontier.Builder(model, SMALL, never, lambda called: called, never, compiled=False)
    few, many = (list(builder.methods(steps)) for steps in (12, 50))
    pairs = [(a.label, b.label) for a, b in zip(few, many, strict=True)]
    assert all(a == b or "forecast_at" in a and "forecast_at" in b for a, b in pairs)  # which steps: of as many
    assert sum(a != b for a, b in pairs) == 1 and len({a for a, _ in pairs}) == len(pairs)
    assert {m.steps for m in many if m.name == "fewer steps"} == {38, 25, 16, 12, 10, 8, 7}


def test_pictures_keep_frames_apart():
    latents = next(islice(SMALL.stream(1, 0, CPU), 1))[0]
    pictures = pictures_of(latents)
    assert pictures.shape == (1, 3 * SMALL.frames, SMALL.size, SMALL.size)
    assert torch.allclose(pictures[0, 0], (unfold(latents)[0, 0, 0] + 1) / 2)
