"""Train a style LoRA on the base model.

    torchrun --nproc-per-node 2 -m models.training.lora --work WORK --style twemoji
    torchrun --nproc-per-node 2 -m models.training.lora --work WORK --style silhouette
    torchrun --nproc-per-node 2 -m models.training.lora --work WORK --style night --text

Captions do not name the style: it comes with the adapter, and its strength is the adapter's scale.
``--text`` puts factors on the text encoder too. Writes ``models/lora-STYLE/`` in PEFT's and in
kohya's layout. No hidden scene is used.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.training import data
from models.training.adapters import (
    REPOSITORY,
    TEXT_SITES,
    UNET_SITES,
    Parts,
    add_arguments,
    add_lora,
    encode_scenes,
    fit,
    load_parts,
    save_lora,
    spread_timesteps,
    start_lora,
    write_card,
)
from models.training.base import DROP_CAPTION, Noiser
from models.training.common import load_checkpoint, save_checkpoint
from models.training.icons import ADAPTER_STYLES
from models.training.styles import NIGHT, WideAtlas, caption_without_style, restyle


def styled_scenes(parts: Parts, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Latents and tokens of scenes in one style, with captions that do not say so.

    Kept in ``WORK/lora-STYLE-scenes.pt``; remove it when the autoencoder changes.
    """
    number = 8 if options.smoke else options.scenes
    path = options.work / f"lora-{options.style}-scenes.pt"
    if (kept := load_checkpoint(path)) is not None and kept["number"] == number:
        return kept["latents"], kept["tokens"]
    rng = np.random.default_rng(31)
    scenes = [restyle(data.sample_scene(rng), options.style) for _ in range(number)]
    scenes = [scene for scene in scenes if not data.is_hidden(scene)]
    tokens = parts.tokens([caption_without_style(scene, rng) for scene in scenes])
    latents = encode_scenes(parts, scenes, WideAtlas(options.work))
    save_checkpoint(path, {"number": number, "latents": latents, "tokens": tokens})
    return latents, tokens


def velocity_loss(parts: Parts, latents: Tensor, tokens: Tensor, noiser: Noiser) -> Tensor:
    """The base model's own loss on a batch, through whatever factors the networks carry."""
    device = next(parts.unet.parameters()).device.type
    latents, tokens = latents.to(device), tokens.clone()
    tokens[torch.rand(len(tokens)) < DROP_CAPTION] = parts.tokens([""])[0]
    timesteps = spread_timesteps(len(latents), 1000, device)
    noisy, velocity, weight = noiser.noisy(latents, torch.randn_like(latents), timesteps)
    with torch.autocast(device, dtype=torch.bfloat16):
        words = parts.text(tokens.to(device)).last_hidden_state
        channels_last = noisy.contiguous(memory_format=torch.channels_last)
        guess = parts.unet(channels_last, timesteps, encoder_hidden_states=words).sample
    squared = F.mse_loss(guess.float(), velocity, reduction="none").mean(dim=(1, 2, 3))
    return (weight * squared).mean()


def train(options: argparse.Namespace) -> None:
    """Prepare the style's scenes, train the factors, and write both files."""
    torch.manual_seed(3)  # the same factors in every process
    parts = load_parts(options.base, options.device)
    factors = add_lora(parts.unet, UNET_SITES, options.rank)
    if options.text:
        factors += add_lora(parts.text, TEXT_SITES, options.rank)
    if options.start_from is not None:
        start_lora(options.start_from, parts.unet, parts.text if options.text else None)
    latents, tokens = styled_scenes(parts, options)
    noiser = Noiser(options.device)

    def loss_of(rng: np.random.Generator) -> Tensor:
        rows = torch.from_numpy(rng.integers(len(latents), size=options.batch))
        return velocity_loss(parts, latents[rows], tokens[rows], noiser)

    name = f"lora-{options.style}"
    if fit(name, nn.ParameterList(factors), loss_of, options):
        folder = options.out or REPOSITORY / "models" / name
        save_lora(folder, parts.unet, parts.text if options.text else None)
        write_card(name, folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--style", required=True, choices=[*ADAPTER_STYLES, NIGHT])
    parser.add_argument("--text", action="store_true", help="factors on the text encoder too")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--scenes", type=int, default=1_500)
    add_arguments(parser, steps=400, batch=16, rate=1.5e-3)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
