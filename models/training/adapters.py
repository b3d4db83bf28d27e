"""What the add-ons of the base model share: its parts, prepared scenes, the training loop, and
LoRA files.

LoRA factors sit on linears and 1x1 convolutions of the transformer blocks and of the text encoder
only: those are the sites that the engine serves per row.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from models.loupe.reader import as_batch
from models.training import data
from models.training.common import (
    Curve,
    Ema,
    average_gradients,
    load_checkpoint,
    log,
    prefer_plain_attention,
    save_checkpoint,
    start_processes,
)
from models.training.styles import WideAtlas
from models.training.text import token_ids

REPOSITORY = Path(__file__).parents[2]
BASE = REPOSITORY / "models" / "tintype"

_BLOCK = r"transformer_blocks\.\d+\.(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))"
UNET_SITES = rf".*attentions\.\d+\.(proj_in|proj_out|{_BLOCK})"
TEXT_SITES = r".*(self_attn\.(q_proj|k_proj|v_proj|out_proj)|mlp\.fc[12])"

PEFT_FILE, KOHYA_FILE = "pytorch_lora_weights.safetensors", "kohya.safetensors"


@dataclass(frozen=True)
class Parts:
    """The base model's networks, frozen, in single precision."""

    unet: UNet2DConditionModel
    text: CLIPTextModel
    tokenizer: CLIPTokenizer
    vae: AutoencoderKL

    def tokens(self, prompts: list[str]) -> Tensor:
        """Prompts to int64 ``(n, words)``."""
        return token_ids(self.tokenizer, prompts)


def load_parts(folder: Path, device: str) -> Parts:
    """Read a Diffusers folder for training add-ons on it."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    for network in (pipe.unet, pipe.text_encoder, pipe.vae):
        network.to(device).requires_grad_(False)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    return Parts(pipe.unet, pipe.text_encoder, pipe.tokenizer, pipe.vae)


@torch.no_grad()
def encode_scenes(parts: Parts, scenes: list[data.Scene], atlas: WideAtlas) -> Tensor:
    """Compose and encode scenes of one canvas: float32 ``(n, channels, h, w)``."""
    device = next(parts.vae.parameters()).device
    latents = []
    for start in range(0, len(scenes), 16):
        part = [data.compose(scene, atlas) for scene in scenes[start : start + 16]]
        pictures = as_batch(part, device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            mode = parts.vae.encode(pictures).latent_dist.mode()
        latents.append(mode.float().cpu() * parts.vae.config.scaling_factor)
    return torch.cat(latents)


def add_arguments(parser: argparse.ArgumentParser, *, steps: int, batch: int, rate: float) -> None:
    """The options that every add-on's stage takes."""
    parser.add_argument(
        "--base", type=Path, default=BASE, help="the Diffusers folder to derive from"
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="the folder to write (default: under models/)")
    parser.add_argument(
        "--start-from", type=Path, help="a folder written before, to begin with its weights"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch, help="samples per process and step")
    parser.add_argument("--rate", type=float, default=rate)
    parser.add_argument("--report", type=int, default=25, help="steps between points of the curve")
    parser.add_argument("--save", type=int, default=200, help="steps between checkpoints")
    parser.add_argument(
        "--smoke", action="store_true", help="three steps: only to show that it works"
    )


def spread_timesteps(number: int, steps: int, device: str) -> Tensor:
    """``number`` timesteps of 0 to ``steps`` - 1, evenly spread and shuffled: uniform, with less
    variance.
    """
    offset = (torch.arange(number, device=device) + torch.rand(1, device=device)) / number
    return (offset[torch.randperm(number, device=device)] * steps).long().clamp(max=steps - 1)


def fit(
    name: str,
    trained: nn.ParameterList,
    loss_of: Callable[[np.random.Generator], Tensor],
    options: argparse.Namespace,
) -> bool:
    """Train some parameters, resuming from ``WORK/NAME.pt``, and leave their average in place.

    The curve is ``WORK/NAME.jsonl``. Returns whether this process is the one to write results.
    """
    rank, size = start_processes()
    prefer_plain_attention()
    optimizer = torch.optim.AdamW(
        trained, lr=options.rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
    )
    ema, step, path = Ema(trained, 0.99), 0, options.work / f"{name}.pt"
    if (state := load_checkpoint(path)) is not None:
        trained.load_state_dict(state["trained"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        step = state["step"]
    total = 3 if options.smoke else options.steps
    millions = sum(p.numel() for p in trained) / 1e6
    log(f"{name}: {millions:.2f} M trained parameters, step {step} of {total}")
    torch.manual_seed(1000 * step + rank)
    rng = np.random.default_rng([step, rank])
    curve = Curve(options.work / f"{name}.jsonl")
    began, summed = time.time(), 0.0
    while step < total:
        factor = min(1.0, (step + 1) / 40) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / total)))
        for group in optimizer.param_groups:
            group["lr"] = options.rate * factor
        loss = loss_of(rng)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients([trained])
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        ema.update(trained)
        step, summed = step + 1, summed + float(loss.detach())
        if step % options.report == 0 or step == total:
            points = (step - 1) % options.report + 1
            speed = points * options.batch * size / (time.time() - began)
            curve.add(step=step, loss=summed / points, samples_per_s=speed)
            began, summed = time.time(), 0.0
        if step % options.save == 0 or step == total:
            saved = {"trained": trained.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint(path, saved | {"ema": ema.state_dict(), "step": step})
    ema.copy_to(trained)
    return rank == 0


def add_lora(
    network: UNet2DConditionModel | CLIPTextModel, sites: str, rank: int
) -> list[nn.Parameter]:
    """Put trainable factors of scale one (alpha = rank) on the sites; returns them."""
    network.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=sites)
    )
    return [p for p in network.parameters() if p.requires_grad]


def start_lora(folder: Path, unet: UNet2DConditionModel, text: CLIPTextModel | None) -> None:
    """Set the factors on the networks to those that :func:`save_lora` wrote into ``folder``."""
    factors = load_file(folder / PEFT_FILE)
    for prefix, network in (("unet.", unet), ("text_encoder.", text)):
        own = {k.removeprefix(prefix): v for k, v in factors.items() if k.startswith(prefix)}
        if network is not None:
            outcome = set_peft_model_state_dict(network, own)
            if not own or outcome.unexpected_keys:
                raise ValueError(f"the factors in {folder} are not for the same sites")


def save_lora(folder: Path, unet: UNet2DConditionModel, text: CLIPTextModel | None) -> None:
    """Write the factors twice, in half precision: in PEFT's names, and in kohya's.

    The PEFT file has no alpha, so readers take it to be the rank. The kohya file says alpha = rank
    / 2 and holds upper factors twice as large: the same product, and a reader that ignores alpha
    is found out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    factors = {"unet": _half(get_peft_model_state_dict(unet))}
    if text is not None:
        factors["text_encoder"] = _half(get_peft_model_state_dict(text))
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=factors["unet"],
        text_encoder_lora_layers=factors.get("text_encoder"),
        weight_name=PEFT_FILE,
    )
    save_file(kohya_names(factors), folder / KOHYA_FILE)
    for name in (PEFT_FILE, KOHYA_FILE):
        (folder / name).chmod(0o644)  # the writer makes them readable by their owner only


def write_card(name: str, folder: Path) -> None:
    """Put an add-on's card beside its weights, so that the attribution travels with them."""
    card = Path(__file__).parent / "cards" / f"{name}.md"
    shutil.copyfile(card, folder / "README.md")


def _half(factors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().half().contiguous() for name, value in factors.items()}


def kohya_names(factors: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """PEFT's names (``MODULE.lora_A.weight``) to kohya's (``lora_unet_MODULE.lora_down.weight``),
    with alphas.
    """
    named: dict[str, Tensor] = {}
    for network, tensors in factors.items():
        prefix = "lora_unet_" if network == "unet" else "lora_te_text_model_"
        for name, value in tensors.items():
            module, factor = name.removesuffix(".weight").rsplit(".", 1)
            key = prefix + module.removeprefix("text_model.").replace(".", "_")
            if factor == "lora_A":
                named[f"{key}.lora_down.weight"] = value
                named[f"{key}.alpha"] = torch.tensor(len(value) / 2, dtype=value.dtype)
            else:
                named[f"{key}.lora_up.weight"] = 2 * value
    return named
