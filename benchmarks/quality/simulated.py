"""Models whose denoising loops run with forecasts as this package makes them, around a model called as it is.

Nothing is compiled or captured, so that hundreds of rules can be run one after the other (rules.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.models_timing import fastest_sdpa
from chipmunk_compile.forecast import History
from examples.tiny_dit import sampling as shipped

from . import checkpoints, metrics
from .sampling import captions, pictures_of, schedule, starting_noise
from .sdpa import inference_sdpa
from .subjects import SUBJECTS, Subject, tiny

WARM_UP = 2  # first steps that are always computed
SHIPPED_BATCH = 4
Run = tuple[float, float, list[int]]  # decibels to every step computed, computed steps (mean), and which they were


@dataclass(eq=False)
class Model:
    """A flow model, and the loop around it.

    noise: the start of each batch, float32. streams: calls a step. levels(steps): noise levels from 1 down to 0,
    steps + 1 of them. call(batch, latents, level, stream): the velocity of one stream. guided: of all of them one, in
    float32. pictures(latents): in 0..1, as metrics take them.
    """

    noise: Sequence[Tensor]
    streams: int
    levels: Callable[[int], list[float]]
    call: Callable[[int, Tensor, float, int], Tensor]
    guided: Callable[[list[Tensor]], Tensor]
    pictures: Callable[[Tensor], Tensor]
    _known: dict[int, list[Tensor]] = field(default_factory=dict)

    def fewer(self, steps: int, whole: int) -> Run:
        """All of fewer steps, held against the `whole` number of them."""
        made = [self._dense(batch, steps) for batch in range(len(self.noise))]
        return self._like(made, whole), steps, list(range(steps))

    def judged(self, history: Callable[[], History], steps: int, together: bool = True) -> Run:
        """Steps are forecast where histories allow it: those of all streams, or each for its own."""

        def forecasts(k: int, held: list[History], level: float) -> list[bool]:
            allowed = [one.judge.computed >= WARM_UP and one.reaches(level) for one in held]
            return [all(allowed)] * len(held) if together else allowed

        return self._run(history, steps, forecasts)

    def fixed(self, history: Callable[[], History], computed: Iterable[int], steps: int) -> Run:
        """The first step and those `computed` are; the others are forecast."""
        wanted = {0, *computed}
        return self._run(history, steps, lambda k, held, level: [k not in wanted] * len(held))

    def _run(self, history: Callable[[], History], steps: int, forecasts: Callable) -> Run:
        made, ran = zip(*(self._forecast(batch, history, steps, forecasts) for batch in range(len(self.noise))))
        calls = sum(map(len, ran)) / len(self.noise)
        return self._like(made, steps), calls / self.streams, sorted(set(ran[0]))

    def _forecast(
        self, batch: int, history: Callable[[], History], steps: int, forecasts: Callable
    ) -> tuple[Tensor, list[int]]:
        """The latents of a batch, and the step of each call that ran the model."""
        held, ran = [history() for _ in range(self.streams)], []

        def velocities(k: int, latents: Tensor, level: float) -> list[Tensor]:
            found = []
            for stream, (one, forecast) in enumerate(zip(held, forecasts(k, held, level))):
                if forecast:
                    found += one.forecast(level)
                else:
                    ran.append(k)
                    found += one.keep(level, [self.call(batch, latents, level, stream)], 1.0, k)
            return found

        return self._denoise(batch, steps, velocities), ran

    def _dense(self, batch: int, steps: int) -> Tensor:
        return self._denoise(
            batch, steps, lambda k, latents, level: [self.call(batch, latents, level, s) for s in range(self.streams)]
        )

    def _denoise(self, batch: int, steps: int, velocities: Callable[[int, Tensor, float], list[Tensor]]) -> Tensor:
        latents, levels = self.noise[batch], self.levels(steps)
        for k, (level, after) in enumerate(zip(levels, levels[1:])):
            latents = latents + (after - level) * self.guided(velocities(k, latents, level))
        return latents

    def _like(self, made: Sequence[Tensor], steps: int) -> float:
        if steps not in self._known:
            self._known[steps] = [self.pictures(self._dense(batch, steps)) for batch in range(len(self.noise))]
        scores = [metrics.psnr(self.pictures(latents), known) for latents, known in zip(made, self._known[steps])]
        return torch.cat(scores).mean().item()


def trained(name: str, folder: Path | None, clips: int, small: bool) -> Model:
    """A model that train.py left in `folder`."""
    device, dtype = where(small)
    subject = tiny(SUBJECTS[name]) if small else replace(SUBJECTS[name], measured=min(clips, SUBJECTS[name].measured))
    if not small and folder is None:
        raise SystemExit(f"the {name} model needs --checkpoint")
    model = subject.build().eval() if small else checkpoints.load_weights(folder, device, dtype)
    return guided_model(subject, model, max(1, clips // subject.measured) * subject.measured, device, dtype)


def guided_model(
    subject: Subject, model: torch.nn.Module, count: int, device: torch.device, dtype: torch.dtype
) -> Model:  # fmt: skip
    """Two calls a step, with the caption and without; `count` clips."""
    texts = captions(subject, count, 1).to(device, dtype).split(subject.measured)
    sdpa = inference_sdpa(subject, subject.measured, device)[0]

    def call(batch: int, latents: Tensor, level: float, stream: int) -> Tensor:
        with fastest_sdpa(sdpa):
            return model(
                hidden_states=latents.to(dtype), timestep=torch.full((len(latents),), 1000 * level, device=device),
                encoder_hidden_states=texts[batch] if stream == 0 else torch.zeros_like(texts[batch]),
                return_dict=False,
            )[0]  # fmt: skip

    def guided(velocities: list[Tensor]) -> Tensor:
        captioned, free = velocities
        return torch.lerp(free.float(), captioned.float(), subject.guidance)

    noise = starting_noise(subject, count, 1, device).split(subject.measured)
    return Model(noise, 2, lambda steps: schedule(steps, subject.shift), call, guided, pictures_of)


def shipped_model(folder: Path | None, clips: int, small: bool) -> Model:
    """examples/tiny_dit: guidance is an input, so a step is one call. No folder is read."""
    device, dtype = where(small)
    batch = 1 if small else SHIPPED_BATCH
    model = shipped.load_model(device=device, dtype=dtype)
    told = shipped.prepare(list(shipped.CAPTIONS[:batch]), model)

    def call(_: int, latents: Tensor, level: float, stream: int) -> Tensor:
        return model(
            hidden_states=latents.to(dtype), encoder_hidden_states=told.encoder_hidden_states,
            timestep=torch.full((len(latents),), level, dtype=dtype, device=device), img_ids=told.img_ids,
            pooled_projections=told.pooled_projections, txt_ids=told.txt_ids, return_dict=False,
        )[0]  # fmt: skip

    return Model(
        [shipped.starting_noise(batch, seed, model).float() for seed in range(max(1, clips // batch))], 1,
        lambda steps: schedule(steps, shipped.SHIFT), call, lambda velocities: velocities[0].float(),
        lambda latents: (shipped.unpack(latents).clamp(-1, 1) + 1) / 2,
    )  # fmt: skip


def where(small: bool) -> tuple[torch.device, torch.dtype]:
    on_gpu = torch.cuda.is_available() and not small
    return torch.device("cuda" if on_gpu else "cpu"), torch.bfloat16 if on_gpu else torch.float32


# Each makes a model: from a folder of weights, for so many clips, small or not.
MODELS: dict[str, Callable[[Path | None, int, bool], Model]] = {
    "shipped": shipped_model,
    **{name: partial(trained, name) for name in SUBJECTS},
}
