"""Models whose denoising loops run with forecasts as this package makes them, around a model called as it is.

Nothing is compiled or captured, so that hundreds of rules can be run one after the other (rules.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.models_timing import fastest_sdpa
from chipmunk_compile.forecast import History
from examples.tiny_dit import sampling as shipped

from . import checkpoints, metrics
from .sampling import captions, pictures_of, schedule, starting_noise
from .sdpa import inference_sdpa
from .subjects import SUBJECTS, tiny

WARM_UP = 2  # first steps that are always computed
Run = tuple[float, float, list[int]]  # decibels to every step computed, computed steps (mean), and which they were


class Model:
    """A flow model. streams: its calls a step; noise: the start of each batch, float32."""

    streams = 1
    noise: tuple[Tensor, ...]

    def __init__(self) -> None:
        self._known: dict[int, list[Tensor]] = {}

    def levels(self, steps: int) -> list[float]:
        """Noise levels from 1 down to 0, steps + 1 of them."""
        raise NotImplementedError

    def call(self, batch: int, latents: Tensor, level: float, stream: int) -> Tensor:
        """The velocity of one stream."""
        raise NotImplementedError

    def guided(self, velocities: list[Tensor]) -> Tensor:
        return velocities[0].float()

    def pictures(self, latents: Tensor) -> Tensor:
        raise NotImplementedError

    def fewer(self, steps: int, whole: int) -> Run:
        """All of fewer steps, held against the `whole` number of them."""
        made = [self._euler(batch, steps) for batch in range(len(self.noise))]
        return self._like(made, whole), steps, list(range(steps))

    def judged(self, history: Callable[[], History], steps: int) -> Run:
        """Steps are forecast where the histories of all streams allow it."""
        return self._run(
            history, steps, lambda k, held, level: held[0].judge.computed >= WARM_UP and all(
                [one.reaches(level) for one in held]
            ),
        )  # fmt: skip

    def fixed(self, history: Callable[[], History], computed: Iterable[int], steps: int) -> Run:
        """The first step and those `computed` are; the others are forecast."""
        wanted = {0, *computed}
        return self._run(history, steps, lambda k, held, level: k not in wanted)

    def _run(self, history: Callable[[], History], steps: int, forecasts: Callable) -> Run:
        levels, made, count, which = self.levels(steps), [], 0, []
        for batch, latents in enumerate(self.noise):
            held, computed = [history() for _ in range(self.streams)], []
            for k, (level, after) in enumerate(zip(levels, levels[1:])):
                if forecasts(k, held, level):
                    velocities = [one.forecast(level)[0] for one in held]
                else:
                    computed.append(k)
                    velocities = [
                        one.keep(level, [self.call(batch, latents, level, stream)], 1.0, k)[0]
                        for stream, one in enumerate(held)
                    ]
                latents = latents + (after - level) * self.guided(velocities)
            made.append(latents)
            count, which = count + len(computed), which or computed
        return self._like(made, steps), count / len(self.noise), which

    def _euler(self, batch: int, steps: int) -> Tensor:
        latents, levels = self.noise[batch], self.levels(steps)
        for level, after in zip(levels, levels[1:]):
            velocities = [self.call(batch, latents, level, stream) for stream in range(self.streams)]
            latents = latents + (after - level) * self.guided(velocities)
        return latents

    def _like(self, made: list[Tensor], steps: int) -> float:
        if steps not in self._known:
            self._known[steps] = [self.pictures(self._euler(batch, steps)) for batch in range(len(self.noise))]
        scores = [metrics.psnr(self.pictures(latents), known) for latents, known in zip(made, self._known[steps])]
        return torch.cat(scores).mean().item()


class Trained(Model):
    """A model that train.py left in `folder`: two calls a step, with the caption and without."""

    streams = 2

    def __init__(self, name: str, folder: Path | None, clips: int, small: bool) -> None:
        super().__init__()
        self._device, self._dtype = where(small)
        self._subject = tiny(SUBJECTS[name]) if small else SUBJECTS[name]
        if not small and folder is None:
            raise SystemExit(f"the {name} model needs --checkpoint")
        self._model = (
            self._subject.build().eval() if small else checkpoints.load_weights(folder, self._device, self._dtype)
        )
        batch = self._subject.measured
        count = max(1, clips // batch) * batch
        self.noise = starting_noise(self._subject, count, 1, self._device).split(batch)
        self._text = captions(self._subject, count, 1).to(self._device, self._dtype).split(batch)
        self._sdpa = inference_sdpa(self._subject, batch, self._device)[0]

    def levels(self, steps: int) -> list[float]:
        return schedule(steps, self._subject.shift)

    def call(self, batch: int, latents: Tensor, level: float, stream: int) -> Tensor:
        text = self._text[batch] if stream == 0 else torch.zeros_like(self._text[batch])
        with fastest_sdpa(self._sdpa):
            return self._model(
                hidden_states=latents.to(self._dtype), encoder_hidden_states=text,
                timestep=torch.full((len(latents),), 1000 * level).to(latents.device), return_dict=False,
            )[0]  # fmt: skip

    def guided(self, velocities: list[Tensor]) -> Tensor:
        captioned, free = velocities
        return torch.lerp(free.float(), captioned.float(), self._subject.guidance)

    def pictures(self, latents: Tensor) -> Tensor:
        return pictures_of(latents)


class Shipped(Model):
    """examples/tiny_dit: guidance is an input, so a step is one call."""

    BATCH = 4

    def __init__(self, folder: Path | None, clips: int, small: bool) -> None:
        super().__init__()
        device, self._dtype = where(small)
        batch = 1 if small else self.BATCH
        self._model = shipped.load_model(device=device, dtype=self._dtype)
        self._told = shipped.prepare(list(shipped.CAPTIONS[:batch]), self._model)
        count = max(1, clips // batch)
        self.noise = tuple(shipped.starting_noise(batch, seed, self._model).float() for seed in range(count))

    def levels(self, steps: int) -> list[float]:
        return schedule(steps, shipped.SHIFT)

    def call(self, batch: int, latents: Tensor, level: float, stream: int) -> Tensor:
        told = self._told
        return self._model(
            hidden_states=latents.to(self._dtype), encoder_hidden_states=told.encoder_hidden_states,
            timestep=torch.full((len(latents),), level, dtype=self._dtype).to(latents.device),
            pooled_projections=told.pooled_projections, img_ids=told.img_ids, txt_ids=told.txt_ids, return_dict=False,
        )[0]  # fmt: skip

    def pictures(self, latents: Tensor) -> Tensor:
        return (shipped.unpack(latents).clamp(-1, 1) + 1) / 2


def where(small: bool) -> tuple[torch.device, torch.dtype]:
    on_gpu = torch.cuda.is_available() and not small
    return torch.device("cuda" if on_gpu else "cpu"), torch.bfloat16 if on_gpu else torch.float32


# Each makes a model: from a folder of weights, for so many clips, small or not.
MODELS: dict[str, Callable[[Path | None, int, bool], Model]] = {
    "shipped": Shipped,
    **{name: lambda *how, name=name: Trained(name, *how) for name in SUBJECTS},
}
