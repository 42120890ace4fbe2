"""Train the tiny diffusion transformer that the other examples use, on one GPU, in minutes.

    python examples/train_tiny_dit.py --minutes 10 --out my_weights

The model is diffusers' own FluxTransformer2DModel in a small configuration, trained from random weights by
rectified flow on pictures drawn as it goes (see examples/tiny_dit/). The first third of the time goes to
pictures of half the size: they are cheaper and already teach what the words mean and what goes where.
`--minutes` is the wall-clock time of the whole run, compiling and sampling included; the learning rate
follows the clock, so a shorter run is a complete, worse one.

Writes to --out: config.json and diffusion_pytorch_model.safetensors (fp16, averaged weights); training.json
(settings and loss log); loss.png and samples.png.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from tiny_dit.muon import Muon
from tiny_dit.pictures import SIZE, stream
from tiny_dit.png import save_curve, save_grid
from tiny_dit.sampling import PATCH, SHIFT, condition, denoise, pack, starting_noise, unpack
from tiny_dit.scenes import sample_scenes
from tiny_dit.words import VOCABULARY, decode_captions

CONFIG = {
    "patch_size": 1,
    "in_channels": 3 * PATCH * PATCH,
    "num_layers": 1,
    "num_single_layers": 5,
    "attention_head_dim": 64,
    "num_attention_heads": 4,
    "joint_attention_dim": VOCABULARY,
    "pooled_projection_dim": VOCABULARY,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 24, 24),
}
# Spread of logit(t) before the shift; above 1, so that nearly clean pictures, where edges form, are seen too.
TIME_SPREAD = 1.3
DROPOUT = 0.1  # captions left out, so that the unconditional model is learned too
EMA_DECAY = 0.998
WARM_UP = 200  # steps
DECAY_FROM = 0.5  # share of the training time after which the learning rate falls to zero
RESERVE = 12.0  # seconds kept back for samples and files
HALF_SIZE = 0.35  # share of the training time at half size, with twice the batch


def build_model() -> FluxTransformer2DModel:
    """The model with adaLN-zero initialisation: every block starts as the identity, the output as zero."""
    model = FluxTransformer2DModel(**CONFIG)
    modulations = [block.norm.linear for block in model.single_transformer_blocks]
    for block in model.transformer_blocks:
        modulations += [block.norm1.linear, block.norm1_context.linear]
    for linear in (*modulations, model.norm_out.linear, model.proj_out):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    return model


def keep_residual_fp32(model: FluxTransformer2DModel) -> None:
    """Under autocast the embedders answer in bf16, and all that follows, the timestep too, takes their dtype.

    In bf16 a time near 1 is known to 1 part in 256 only; in fp32 the model learns the times that it will see.
    """
    for embedder in (model.x_embedder, model.context_embedder):
        embedder.register_forward_hook(lambda module, args, output: output.float())


def build_optimizers(model: FluxTransformer2DModel, muon_lr: float, adamw_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest (embedders, biases, norms, output)."""
    in_blocks = [p for name, p in model.named_parameters() if "transformer_blocks" in name and p.ndim == 2]
    chosen = {id(p) for p in in_blocks}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(in_blocks, lr=muon_lr),
        torch.optim.AdamW(rest, lr=adamw_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=model.device.type == "cuda"),
    ]


def sample_times(count: int, generator: torch.Generator) -> torch.Tensor:
    """Times in 0..1, [count]: logit-normal, shifted as the sampler's schedule, stratified over the batch."""
    strata = torch.arange(count, device=generator.device)
    uniform = (strata + torch.rand(count, generator=generator, device=generator.device)) / count
    t = torch.sigmoid(TIME_SPREAD * math.sqrt(2) * torch.erfinv((2 * uniform - 1).clamp(-0.99999, 0.99999)))
    return SHIFT * t / (1 + (SHIFT - 1) * t)


def flow_loss(model, pictures: torch.Tensor, text_tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rectified flow: x_t = (1 - t) x_0 + t noise, the model predicts noise - x_0."""
    device = generator.device
    clean = pack(pictures)
    noise = torch.randn(clean.shape, generator=generator, device=device)
    t = sample_times(len(clean), generator)
    kept = torch.rand(len(clean), generator=generator, device=device) >= DROPOUT
    conditioning = condition(text_tokens * kept[:, None, None], *pictures.shape[2:], spacing=SIZE / pictures.shape[-1])
    with torch.autocast(device.type, torch.bfloat16):
        velocity = model(
            hidden_states=torch.lerp(clean, noise, t[:, None, None]),
            timestep=t,
            encoder_hidden_states=conditioning.encoder_hidden_states,
            pooled_projections=conditioning.pooled_projections,
            img_ids=conditioning.img_ids,
            txt_ids=conditioning.txt_ids,
            return_dict=False,
        )[0]
    return F.mse_loss(velocity.float(), noise - clean)


def learning_rate(step: int, progress: float) -> float:
    """Factor on the learning rates: warm-up by steps, then flat, then linearly to zero by the clock."""
    return min(1.0, (step + 1) / WARM_UP) * min(1.0, (1.0 - progress) / (1.0 - DECAY_FROM))


def save(model: FluxTransformer2DModel, log: dict, out: Path) -> None:
    """Weights as fp16 in diffusers' format, and the log."""
    half = copy.deepcopy(model)
    for parameter in half.parameters():
        parameter.data = parameter.data.half()
    half.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(log, indent=1) + "\n")


def train(args: argparse.Namespace) -> None:
    start = time.monotonic()
    device = torch.device(args.device)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    generator = torch.Generator(device).manual_seed(args.seed)

    model = build_model().to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    keep_residual_fp32(model)
    if device.type == "cuda":
        # cuDNN's attention backward fails at 1616 tokens of head dim 64 (torch 2.11, cuDNN 9.19, H200).
        torch.backends.cuda.enable_cudnn_sdp(False)
    if args.compile:
        model.compile_repeated_blocks(fullgraph=True, dynamic=False)
    optimizers = build_optimizers(model, args.muon_lr, args.adamw_lr)
    parameters, averages = list(model.parameters()), list(ema.parameters())
    count = sum(p.numel() for p in parameters)
    print(f"{count / 1e6:.2f}M parameters on {device}, batch {args.batch}", flush=True)

    settings = {name: value for name, value in vars(args).items() if name != "out"}
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    log = {
        "settings": settings,
        "device": name,
        "torch": torch.__version__,
        "parameters": count,
        "config": CONFIG,
        "loss": [],
    }
    deadline = start + 60 * args.minutes - RESERVE
    first_step = time.monotonic()
    next_save = first_step + 120
    half_size = stream(2 * args.batch, args.seed, device, SIZE // 2)
    full_size = stream(args.batch, args.seed + 1, device, SIZE)
    losses, step, seen, marked = [], 0, 0, (first_step, 0)
    while (now := time.monotonic()) < deadline:
        progress = (now - first_step) / (deadline - first_step)
        pictures, text_tokens = next(half_size if progress < HALF_SIZE else full_size)
        loss = flow_loss(model, pictures, text_tokens, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, peak in zip(optimizers, (args.muon_lr, args.adamw_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * learning_rate(step, progress)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(averages, parameters, 1 - min(EMA_DECAY, (1 + step) / (10 + step)))
        losses.append(loss.detach())
        step, seen = step + 1, seen + len(pictures)
        if step % args.log_every == 0:
            mean = torch.stack(losses).mean().item()  # the only place that waits for the GPU
            losses.clear()
            now = time.monotonic()
            rate = (seen - marked[1]) / (now - marked[0])
            marked = (now, seen)
            entry = {
                "step": step,
                "seconds": round(now - start, 1),
                "pixels": pictures.shape[-1],
                "loss": round(mean, 6),
            }
            log["loss"].append(entry)
            print(
                f"{(now - start) / 60:5.2f}/{args.minutes:g} min  {entry['pixels']} pixels  step {step:6d}  "
                f"loss {mean:.5f}  {rate:6.0f} pictures/s",
                flush=True,
            )
            if not math.isfinite(mean):
                raise SystemExit("the loss is not finite: lower --muon-lr and --adamw-lr")
            if now > next_save:
                save(ema, log, out)
                next_save = now + 120
    log.update(steps=step, pictures=seen)
    save(ema, log, out)
    print(f"trained {step} steps, {seen} pictures, in {(time.monotonic() - start) / 60:.2f} min", flush=True)

    points = [(entry["step"], entry["loss"]) for entry in log["loss"][1:]]
    if len(points) > 1:
        save_curve(
            points,
            out / "loss.png",
            "rectified-flow loss, at half size, then at full size",
            "step",
            "mean squared error",
        )
    words = sample_scenes(args.samples, torch.Generator().manual_seed(args.seed + 2)).words
    tokens = denoise(ema, starting_noise(args.samples, args.seed, ema), condition(words.to(device)), steps=28)
    save_grid(unpack(tokens), out / "samples.png")
    for number, caption in enumerate(decode_captions(words), start=1):
        print(f"{number:3d}  {caption}")
    print(f"written to {out} after {(time.monotonic() - start) / 60:.2f} min", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--minutes", type=float, default=10.0, help="wall-clock time of the whole run")
    parser.add_argument("--out", default="tiny_dit_weights", help="folder to write to")
    parser.add_argument("--batch", type=int, default=128, help="pictures a step (twice as many at half size)")
    parser.add_argument("--muon-lr", type=float, default=3e-3)
    parser.add_argument("--adamw-lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=16, help="pictures in samples.png")
    parser.add_argument("--log-every", type=int, default=50, help="steps between two points of the loss log")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
