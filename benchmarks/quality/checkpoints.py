"""Checkpoints: weights in small shards for whoever samples, everything else in one local file for whoever resumes."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

SHARD = "14MB"  # of at most 15 MB, headers and all
STATE = "state.pt"


def save_weights(model: WanTransformer3DModel, log: dict, folder: Path) -> None:
    """fp16 weights in diffusers' format, in shards, and training.json."""
    half = copy.deepcopy(model).requires_grad_(False)
    for parameter in half.parameters():
        parameter.data = parameter.data.half()
    folder.mkdir(parents=True, exist_ok=True)
    half.save_pretrained(folder, max_shard_size=SHARD)
    (folder / "training.json").write_text(json.dumps(log, indent=1) + "\n")


def load_weights(folder: Path, device, dtype: torch.dtype = torch.float32) -> WanTransformer3DModel:
    """The model, ready to denoise. from_pretrained would want accelerate: this class keeps some weights in float32."""
    model = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(folder))
    weights = {}
    for path in sorted(folder.glob("diffusion_pytorch_model*.safetensors")):
        weights |= load_file(path)
    model.load_state_dict(weights)
    return cast(model.to(device).eval().requires_grad_(False), dtype)


def cast(model: WanTransformer3DModel, dtype: torch.dtype) -> WanTransformer3DModel:
    """Parameters in `dtype`, but for those that diffusers keeps in float32 (norms, the timestep's embedding): as
    from_pretrained does."""
    for name, parameter in model.named_parameters():
        if not set(model._keep_in_fp32_modules).intersection(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model


def has_weights(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("diffusion_pytorch_model*.safetensors"))


def digest(folder: Path) -> str:
    """Which weights these are."""
    hashed = hashlib.sha256()
    for path in sorted(folder.glob("diffusion_pytorch_model*.safetensors")):
        hashed.update(path.read_bytes())
    return hashed.hexdigest()[:12]


def save_state(state: dict, folder: Path) -> None:
    """All that a resumed run needs, whole or not at all: a run may be killed while it writes."""
    temporary = folder / (STATE + ".tmp")
    torch.save(state, temporary)
    os.replace(temporary, folder / STATE)


def load_state(folder: Path, device) -> dict | None:
    path = folder / STATE
    return torch.load(path, map_location=device, weights_only=True) if path.is_file() else None
