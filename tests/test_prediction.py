"""Models that predict noise: recognised, and forecast as the velocity that their outputs stand for."""

import math

import diffusers
import pytest
import torch

import chipmunk_compile
from chipmunk_compile.backend import chipmunk
from chipmunk_compile.prediction import NEAR, FirstLook, NoisePrediction, distance
from examples.tiny_dit import sampling, words

pytestmark = pytest.mark.usefixtures("uncompiled")
SIDE = 80  # pixels: 400 tokens
LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}  # PixArt, DiT, Latte
SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # Stable Diffusion


class Noise(torch.nn.Module):
    """The shipped flow model, told and asked as one that predicts noise: forward(latents, timestep) -> noise."""

    def __init__(self, betas: dict, learned: bool = False) -> None:
        """learned: a second half of the channels is a variance."""
        super().__init__()
        self.model, self.learned = sampling.load_model(), learned
        self.conditioning = sampling.condition(words.encode_captions(sampling.CAPTIONS[1:2]), SIDE, SIDE, spacing=2.0)
        self.register_buffer("left", diffusers.DDPMScheduler(**betas).alphas_cumprod.clone())

    def forward(self, latents, timestep, prompt):
        below = timestep.float().floor().clamp(0, 998)
        left = torch.lerp(self.left[below.long()], self.left[below.long() + 1], timestep.float() - below)
        picture, noise = left.sqrt(), (1 - left).sqrt()
        time, flow = noise / (picture + noise), latents / (picture + noise)[:, None, None]
        flow = flow.to(prompt.dtype)
        velocity = self.model(hidden_states=flow, timestep=time, encoder_hidden_states=prompt,
                              pooled_projections=self.conditioning.pooled_projections.to(prompt.dtype),
                              img_ids=self.conditioning.img_ids, txt_ids=self.conditioning.txt_ids,
                              return_dict=False)[0]  # fmt: skip
        predicted = (flow + (1 - time)[:, None, None] * velocity).to(latents.dtype)
        return torch.cat([predicted, velocity.square()], -1) if self.learned else predicted


@torch.no_grad()
def picture(model, scheduler, steps: int, prompt, other=None, seed: int = 0) -> torch.Tensor:
    """other: of guidance by two calls, 1.5 times as far as the prompt's."""
    scheduler.set_timesteps(steps)
    latents = torch.randn(1, 400, 48, generator=torch.Generator().manual_seed(seed))
    latents *= getattr(scheduler, "init_noise_sigma", 1.0)
    for timestep in scheduler.timesteps:
        scale = getattr(scheduler, "scale_model_input", None)
        seen = scale(latents, timestep) if scale is not None else latents
        noise = model(seen, timestep.expand(1), prompt)[..., :48]
        if other is not None:
            without = model(seen, timestep.expand(1), other)[..., :48]
            noise = without + 1.5 * (noise - without)
        latents = scheduler.step(noise, timestep, latents, return_dict=False)[0]
    return latents


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    return 10 * math.log10(4 / (one.clamp(-1, 1) - other.clamp(-1, 1)).square().mean().item())


def compiled(model, preset: str):
    return torch.compile(model, backend=chipmunk, options={"preset": preset, "min_tokens": 64})


def ddim(**betas):
    return diffusers.DDIMScheduler(**betas, clip_sample=False)


SAMPLERS = {
    "DPM-Solver++, as PixArt has it": (diffusers.DPMSolverMultistepScheduler, LINEAR, 20),
    "DDIM, as DiT has it": (ddim, LINEAR, 28),
    "DDIM, Stable Diffusion's variances": (ddim, SCALED, 28),
    "Euler, latents scaled": (diffusers.EulerDiscreteScheduler, LINEAR, 28),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_presets_beat_as_many_steps(sampler):
    make, betas, steps = SAMPLERS[sampler]
    plain = Noise(betas)
    prompt = plain.conditioning.encoder_hidden_states
    dense = [picture(plain, make(**betas), steps, prompt, seed=seed) for seed in (0, 1)]
    # At half of 20 steps a solver of second order is as good by itself.
    for preset, least in (("quality", 4.0), ("balanced", 0.0 if "Solver" in sampler else 2.0)):
        torch._dynamo.reset()
        model, better = compiled(Noise(betas), preset), []
        for seed, truth in enumerate(dense):
            chipmunk_compile.reset()
            ours = picture(model, make(**betas), steps, prompt, seed=seed)
            counts = chipmunk_compile.counters()
            assert counts["dense"] + counts["forecast"] == steps and counts["forecast"] >= steps // 4
            fewer = picture(plain, make(**betas), counts["dense"], prompt, seed=seed)
            better.append(psnr(ours, truth) - psnr(fewer, truth))
        assert sum(better) / len(better) > least, better


def test_a_learned_variance_and_guidance_by_two_calls():
    make, betas, steps = SAMPLERS["DDIM, as DiT has it"]
    plain = Noise(betas, learned=True)
    prompt, other = plain.conditioning.encoder_hidden_states, torch.zeros_like(plain.conditioning.encoder_hidden_states)
    dense = picture(plain, make(**betas), steps, prompt, other)
    model = compiled(Noise(betas, learned=True), "quality")
    for _ in range(2):  # what the first generation learned holds in the second
        before = chipmunk_compile.counters()
        ours = picture(model, make(**betas), steps, prompt, other)
        now = chipmunk_compile.counters()
        computed, skipped = (now[name] - before[name] for name in ("dense", "forecast"))
        assert computed + skipped == 2 * steps and skipped >= steps // 2 and skipped % 2 == 0
    fewer = picture(plain, make(**betas), computed // 2, prompt, other)
    assert psnr(ours, dense) > psnr(fewer, dense) + 4


def test_computed_steps_that_nothing_is_repaid_at_are_untouched():
    betas, seen = LINEAR, []
    plain = Noise(betas)
    plain.model.to(torch.bfloat16)
    model = compiled(plain, "quality")
    prompt = plain.conditioning.encoder_hidden_states.bfloat16()
    with torch.no_grad():
        for timestep in (999, 950, 900, 850):  # the warm-up, and a step that comes too soon after it
            latents = torch.randn(1, 400, 48, generator=torch.Generator().manual_seed(timestep)).bfloat16()
            moment = torch.tensor([timestep])
            seen.append((model(latents, moment, prompt), plain(latents, moment, prompt)))
    assert all(torch.equal(ours, dense) for ours, dense in seen)


class Faint(Noise):
    """The shipped flow model of pictures that are nearly grey: forward(latents, timestep) -> velocity. Before anything
    is known of a picture, its velocity is nearly the noise in the latents."""

    GREY = 0.2

    def __init__(self) -> None:
        super().__init__(LINEAR)

    def forward(self, latents, timestep, prompt):
        level = timestep.float() / 1000
        scale = self.GREY * (1 - level) + level
        time, flow = level / scale, latents / scale[:, None, None]
        velocity = self.model(hidden_states=flow, timestep=time, encoder_hidden_states=prompt,
                              pooled_projections=self.conditioning.pooled_projections,
                              img_ids=self.conditioning.img_ids, txt_ids=self.conditioning.txt_ids,
                              return_dict=False)[0]  # fmt: skip
        noise = flow + (1 - time)[:, None, None] * velocity
        return noise - self.GREY * (noise - velocity)


@pytest.mark.parametrize("guided", [False, True])
def test_a_flow_of_grey_pictures_is_not_taken_for_noise(guided, caplog):
    caplog.set_level("INFO", "chipmunk_compile")
    plain, steps = Faint(), 28
    make = lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    prompt = plain.conditioning.encoder_hidden_states
    other = torch.zeros_like(prompt) if guided else None
    latents = torch.randn(1, 400, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first = plain(latents, torch.tensor([1000.0]), prompt)
    assert distance(first, latents).item() < NEAR, "else this shows nothing"
    dense = picture(plain, make(), steps, prompt, other) / Faint.GREY
    ours = picture(compiled(Faint(), "quality"), make(), steps, prompt, other) / Faint.GREY
    counts = chipmunk_compile.counters()
    computed = counts["dense"] // (1 + guided)
    assert "predicts noise" not in caplog.text and counts["forecast"] > steps // 2
    fewer = picture(plain, make(), computed, prompt, other) / Faint.GREY
    assert psnr(ours, dense) > psnr(fewer, dense) + 5


def test_two_pictures_side_by_side_are_each_looked_at():
    """Another picture's latents are no step of this one's."""
    make, betas, steps = SAMPLERS["DDIM, as DiT has it"]
    plain, model = Noise(betas), compiled(Noise(betas), "quality")
    prompts = [plain.conditioning.encoder_hidden_states.clone() for _ in range(2)]
    prompts[1].mul_(0.5)
    made = []
    with torch.no_grad():
        scheduler = make(**betas)
        scheduler.set_timesteps(steps)
        latents = [torch.randn(1, 400, 48, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
        for timestep in scheduler.timesteps:
            for which, prompt in enumerate(prompts):
                noise = model(latents[which], timestep.expand(1), prompt)
                latents[which] = scheduler.step(noise, timestep, latents[which], return_dict=False)[0]
    for seed, prompt in enumerate(prompts):
        truth = picture(plain, make(**betas), steps, prompt, seed=seed)
        made.append(psnr(latents[seed], truth))
    assert chipmunk_compile.counters()["forecast"] >= steps // 2 and min(made) > 40, made


def test_what_was_looked_at_tells_by_where_latents_go():
    noise, scene = torch.randn(2, 500, 4), torch.randn(2, 500, 4)
    latents = 0.07 * scene + 0.9975 * noise
    look = FirstLook(noise, latents, 1)
    assert look.predicts_noise(0.04) is None
    look.follow([scene])  # another graph's inputs
    look.follow([scene, latents.clone()])  # the other call of guidance, or a first step that is left out
    assert look.predicts_noise(0.04) is None
    look.follow([scene, 0.09 * scene + 0.996 * noise])
    assert look.predicts_noise(0.04) is True
    flow = FirstLook(noise - 0.05 * scene, noise, 0)
    flow.follow([(noise - 0.002 * (noise - 0.05 * scene)).bfloat16()])  # a short step, and rounded
    assert flow.predicts_noise(0.002) is False


def test_noise_is_nearer_to_its_latents_than_a_velocity():
    latents = torch.randn(2, 9, 4)
    assert distance(latents * 0.9, latents).item() < NEAR < distance(latents * 0.7, latents).item()


@pytest.mark.parametrize("steps", [{"steps": 12}, {"steps": 12, "streams": 1}])
def test_counted_steps_say_nothing_of_the_noise(steps, caplog):
    make, betas, _ = SAMPLERS["DDIM, as DiT has it"]
    plain = Noise(betas)
    prompt = plain.conditioning.encoder_hidden_states
    options = {"preset": "fast", "min_tokens": 64, "forecast.refresh_every": 1, **steps}
    model = torch.compile(plain, backend=chipmunk, options=options)
    picture(model, make(**betas), 12, prompt)
    picture(model, make(**betas), 12, prompt)
    assert chipmunk_compile.counters()["forecast"] == 0
    assert caplog.text.count("none is forecast") == 1


def test_block_by_block_such_a_model_is_recognised_and_not_forecast(caplog):
    make, betas, steps = SAMPLERS["DDIM, as DiT has it"]
    plain, model = Noise(betas), Noise(betas)
    prompt = plain.conditioning.encoder_hidden_states
    for block in [*model.model.transformer_blocks, *model.model.single_transformer_blocks]:
        block.compile(backend=chipmunk, options={"preset": "balanced", "min_tokens": 64})
    with chipmunk_compile.generation(model):
        ours = picture(model, make(**betas), steps, prompt)
    counts = chipmunk_compile.counters()
    assert counts["forecast"] == 0 and counts["delta"] > 0
    assert "runs in pieces" in caplog.text
    assert psnr(ours, picture(plain, make(**betas), steps, prompt)) > 10


def test_the_formulas_undo_each_other():
    masked, learned = torch.randn(2, 6, 5, 5), torch.randn(2, 8, 5, 5)  # a mask behind one, a variance behind the other
    for latents, output in ((masked[:, :4], learned), (masked, learned[:, :4]), (masked, learned[:, :6])):
        for time in (0.01, 0.5, 0.99):
            velocity = NoisePrediction().velocity(output, latents, time)
            assert velocity.dtype == torch.float32
            torch.testing.assert_close(NoisePrediction().noise(velocity, latents, time, output.dtype), output)
            both = min(latents.shape[1], output.shape[1])
            torch.testing.assert_close(velocity[:, both:], output[:, both:])


def test_the_course_of_a_generation():
    prediction = NoisePrediction()
    assert math.isnan(prediction.course((999.0, 3.0), (999.0, 3.0))[0])  # which of them is the timestep?
    later, whole = prediction.course((500.0, 3.0), (999.0, 3.0))
    assert 0.5 < later < whole < 1.0
    assert prediction.course((999.0, 7.0), (999.0, 7.0)) == (whole, whole)  # known by now
    shares, _ = NoisePrediction().course((0.5,), (0.999,))
    assert shares == pytest.approx(later)
    assert 0.0 < prediction.course((-1.0, 3.0), (999.0, 3.0))[0] < 0.02
