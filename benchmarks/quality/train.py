"""Train the DiT of moving scenes, or that of large pictures, from nothing, on one GPU, in stretches.

    python -m benchmarks.quality.train --model video --total 13 --minutes 8 --folder out/video
    python -m benchmarks.quality.train --model video --total 13 --minutes 8 --folder out/video      the rest
    python -m benchmarks.quality.train --model image --total 5 --minutes 5 --folder out/image

`--total` is what the schedule plans for: half size first, then full size, learning rates falling to zero at its end.
`--minutes` is the wall-clock time of this call, compiling and saving included. A call goes on where --folder says the
last one stopped: exactly so where state.pt lies there; from the averaged weights alone, with a short warm-up of the
optimizers, where only the shards came along.

Writes into --folder: config.json and shards of fp16 weights (averaged), training.json (settings, loss log), samples.png
and state.pt.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import logging
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.models_timing import SDPA, fastest_sdpa
from examples.tiny_dit.muon import Muon
from examples.tiny_dit.png import save_grid

from . import checkpoints
from .sampling import captions, generate, starting_noise
from .sdpa import training_sdpa
from .subjects import SUBJECTS, Subject, tiny, unfold

log = logging.getLogger("train")
STARTED = time.monotonic()
DROPOUT = 0.1  # captions left out, for guidance
TIME_SPREAD = 1.3  # of logit(t) before the shift
EMA_DECAY = 0.998
WARM_UP = 200  # steps, also after weights were taken up without their optimizers
COARSE = 0.4  # share of the whole time at half size: 4 to 10 times as many clips a second
DECAY_FROM = 0.5  # share of the whole time after which learning rates fall to zero
RESERVE = 15.0  # seconds of a call kept for saving and samples


def build(subject: Subject) -> torch.nn.Module:
    """Every block starts as the identity, the output as zero."""
    model = subject.build()
    torch.nn.init.zeros_(model.condition_embedder.time_proj.weight)
    torch.nn.init.zeros_(model.condition_embedder.time_proj.bias)
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    for block in model.blocks:
        torch.nn.init.zeros_(block.scale_shift_table)
        torch.nn.init.zeros_(block.attn2.to_out[0].weight)
    return model


def space_rope(model: torch.nn.Module, spacing: int) -> None:
    """Puts tokens so many places apart: at half size a picture then spans the same places as at full size."""
    rope = model.rope
    whole = type(rope)(rope.attention_head_dim, rope.patch_size, rope.max_seq_len)
    count = rope.max_seq_len // spacing
    for name in ("freqs_cos", "freqs_sin"):
        time_part, *space = getattr(whole, name).split((rope.t_dim, rope.h_dim, rope.w_dim), dim=1)
        spaced = [torch.cat((part[: count * spacing : spacing], part[count * spacing :])) for part in space]
        spaced = [F.pad(part, (0, 0, 0, len(time_part) - len(part))) for part in spaced]
        getattr(rope, name).copy_(torch.cat((time_part, *spaced), dim=1))


def build_optimizers(model: torch.nn.Module, muon_lr: float, adamw_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    fused = next(model.parameters()).device.type == "cuda"
    return [Muon(matrices, lr=muon_lr), torch.optim.AdamW(rest, lr=adamw_lr, betas=(0.9, 0.98), weight_decay=0.0,
                                                          fused=fused)]  # fmt: skip


def flow_loss(
    model: torch.nn.Module, latents: Tensor, text: Tensor, shift: float, generator: torch.Generator
) -> Tensor:
    """Rectified flow: x_t = (1 - t) x_0 + t noise; the model predicts noise - x_0. Times are stratified."""
    device, count = generator.device, len(latents)
    noise = torch.randn(latents.shape, generator=generator, device=device)
    even = (torch.arange(count, device=device) + torch.rand(count, generator=generator, device=device)) / count
    t = torch.sigmoid(TIME_SPREAD * math.sqrt(2) * torch.erfinv((2 * even - 1).clamp(-0.99999, 0.99999)))
    t = shift * t / (1 + (shift - 1) * t)
    kept = torch.rand(count, generator=generator, device=device) >= DROPOUT
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        velocity = model(
            hidden_states=torch.lerp(latents, noise, t.view(-1, 1, 1, 1, 1)),
            timestep=1000 * t,
            encoder_hidden_states=text * kept[:, None, None],
            return_dict=False,
        )[0]
    return F.mse_loss(velocity.float(), noise - latents)


class Trainer:
    """The model, its average, the optimizers and the log; all of it is in `state`."""

    def __init__(self, subject: Subject, folder: Path, args: argparse.Namespace) -> None:
        self.subject, self.folder, self.args = subject, folder, args
        self.device = torch.device(args.device)
        torch.manual_seed(args.seed)
        self.model = build(subject).to(self.device)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        # Under autocast the embedding answers in bf16, and the residual stream takes its dtype.
        self.model.patch_embedding.register_forward_hook(lambda module, inputs, output: output.float())
        self.optimizers = build_optimizers(self.model, args.muon_lr, args.adamw_lr)
        self.generator = torch.Generator(self.device).manual_seed(args.seed)
        self.step, self.warm_from, self.seconds, self.seen = 0, 0, 0.0, 0
        self.log = {
            "model": subject.name, "config": subject.config, "parameters": self.count, "grid": list(subject.grid),
            "settings": {name: value for name, value in vars(args).items() if name != "folder"},
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "torch": torch.__version__, "loss": [],
        }  # fmt: skip
        self._resume()

    @property
    def count(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def progress(self) -> float:
        return min(1.0, self.seconds / (60 * self.args.total))

    @property
    def coarse(self) -> bool:
        return self.progress < COARSE

    def _resume(self) -> None:
        state = checkpoints.load_state(self.folder, self.device)
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.generator.set_state(state["generator"].cpu())
            for name in ("step", "warm_from", "seconds", "seen"):
                setattr(self, name, state[name])
            self.log["loss"] = json.loads(state["loss"])
            log.info("goes on at step %d, %.1f min in", self.step, self.seconds / 60)
        elif checkpoints.has_weights(self.folder):
            weights = checkpoints.load_weights(self.folder, self.device).state_dict()
            self.model.load_state_dict(weights)
            self.average.load_state_dict(weights)
            before = json.loads((self.folder / "training.json").read_text())
            self.log["loss"], self.step, self.seconds = before["loss"], before["steps"], before["seconds"]
            self.seen, self.warm_from = before["clips"], before["steps"]
            log.info("goes on from the weights of step %d; the optimizers start anew", self.step)

    def save(self) -> None:
        self.log.update(steps=self.step, seconds=round(self.seconds, 1), clips=self.seen)
        checkpoints.save_weights(self.average, self.log, self.folder)
        checkpoints.save_state(
            {
                "model": self.model.state_dict(), "average": self.average.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "generator": self.generator.get_state(), "step": self.step, "warm_from": self.warm_from,
                "seconds": self.seconds, "seen": self.seen, "loss": json.dumps(self.log["loss"]),
            },
            self.folder,
        )  # fmt: skip

    def update(self, latents: Tensor, text: Tensor) -> Tensor:
        """One step; the loss, still on the device."""
        loss = flow_loss(self.model, latents, text, self.subject.shift, self.generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        warm = min(1.0, (self.step - self.warm_from + 1) / WARM_UP)
        factor = warm * min(1.0, (1.0 - self.progress) / (1.0 - DECAY_FROM))
        for optimizer, peak in zip(self.optimizers, (self.args.muon_lr, self.args.adamw_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        self.step, self.seen = self.step + 1, self.seen + len(latents)
        return loss.detach()

    def train(self) -> None:
        """Until this call's time is over, or the whole plan's."""
        args, subject = self.args, self.subject
        if args.compile:
            self.model.compile_repeated_blocks(fullgraph=True, dynamic=False)
        deadline = STARTED + 60 * args.minutes - RESERVE
        losses, marked, stage, source = [], (time.monotonic(), self.seen), None, None
        clock, next_save = time.monotonic(), time.monotonic() + 120
        with contextlib.ExitStack() as stack:
            while time.monotonic() < deadline and self.progress < 1.0:
                if stage is not self.coarse:  # a seed of its own for every stretch and stage: nothing is seen twice
                    stage = self.coarse
                    space_rope(self.model, 2 if stage else 1)
                    batch = subject.coarse_batch if stage else subject.batch
                    source = subject.stream(batch, args.seed + self.step, self.device, stage)
                    stack.close()
                    name = args.sdpa or training_sdpa(subject, batch, stage, self.device)
                    stack.enter_context(fastest_sdpa(name))
                    log.info("%s size, %d a step, SDPA %s", "half" if stage else "full", batch, name)
                losses.append(self.update(*next(source)))
                if self.step % args.log_every == 0:
                    mean = torch.stack(losses).mean().item()  # the only place that waits for the device
                    losses.clear()
                    marked = self._report(mean, stage, marked)
                    if time.monotonic() > next_save:
                        self.save()
                        next_save = time.monotonic() + 120
                now = time.monotonic()
                self.seconds, clock = self.seconds + now - clock, now
        self.save()

    def _report(self, mean: float, coarse: bool, marked: tuple[float, int]) -> tuple[float, int]:
        now = time.monotonic()
        rate = (self.seen - marked[1]) / (now - marked[0])
        entry = {"step": self.step, "seconds": round(self.seconds, 1), "coarse": coarse, "loss": round(mean, 6)}
        self.log["loss"].append(entry)
        teraflops = 3 * rate * self.subject.flops(coarse) / 1e12
        left = min(60 * self.args.total - self.seconds, STARTED + 60 * self.args.minutes - RESERVE - now)
        log.info("%5.2f of %g min  %s  step %6d  loss %.5f  %6.1f clips/s  %4.0f TFLOP/s  %3.0f s left",
                 self.seconds / 60, self.args.total, "half" if coarse else "full", self.step, mean, rate, teraflops,
                 max(0.0, left))  # fmt: skip
        if not math.isfinite(mean):
            raise SystemExit("the loss is not finite: lower --muon-lr and --adamw-lr")
        return now, self.seen


def draw_samples(model: torch.nn.Module, subject: Subject, count: int, device, path: Path) -> None:
    """Clips as rows of four frames, pictures as a grid."""
    text = captions(subject, count, seed=0)
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    model = checkpoints.cast(copy.deepcopy(model), dtype)
    clips = unfold(generate(model, subject, starting_noise(subject, count, 0, device), text, 28, dtype))
    shown = range(0, subject.frames, max(1, subject.frames // 4))
    save_grid(clips[:, :, list(shown)].transpose(1, 2).flatten(0, 1).float().cpu(), path, columns=4)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--model", choices=SUBJECTS, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="where the last call stopped, where this one writes")
    parser.add_argument("--minutes", type=float, default=8.0, help="wall-clock time of this call")
    parser.add_argument("--total", type=float, default=13.0, help="minutes of training that the schedule plans for")
    parser.add_argument("--muon-lr", type=float, default=3e-3)
    parser.add_argument("--adamw-lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sdpa", choices=SDPA, help="instead of the fastest that proves right")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--log-every", type=int, default=25)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda)
    parser.add_argument("--tiny", action="store_true", help="narrow, shallow and small: that it runs")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)7d ms  %(message)s", stream=sys.stdout)
    args = parse(arguments)
    subject = tiny(SUBJECTS[args.model]) if args.tiny else SUBJECTS[args.model]
    folder = args.folder.resolve()
    args.folder = str(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(subject, folder, args)
    log.info("%.2fM parameters, %d tokens, %.2f TFLOP a forward, on %s", trainer.count / 1e6, subject.tokens,
             subject.flops() / 1e12, trainer.log["device"])  # fmt: skip
    trainer.train()
    draw_samples(trainer.average, subject, args.samples, trainer.device, folder / "samples.png")
    log.info("%d steps, %d clips, %.2f of %g min; wrote %s", trainer.step, trainer.seen, trainer.seconds / 60,
             args.total, folder.name)  # fmt: skip


if __name__ == "__main__":
    main()
