"""Train the outline ControlNet on the base model.

    torchrun --nproc-per-node 2 -m models.training.controlnet --work WORK

The condition is a picture of white outlines on black, drawn from the scene by :func:`outline`; it
says where edges are and nothing about colours. One caption in four is dropped, so that the
outlines have to be followed even without words. Writes a stock ``ControlNetModel`` folder,
``models/controlnet-outline/``, in half precision.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel
from torch import Tensor, nn

from models.training import data
from models.training.adapters import (
    REPOSITORY,
    Parts,
    add_arguments,
    fit,
    load_parts,
    spread_timesteps,
    write_card,
)
from models.training.base import Noiser
from models.training.latents import LatentStore
from models.training.styles import WideAtlas

EDGE = 28.0
"""Steps of 255 between neighbours, in any colour, that count as an edge."""

DROP_CAPTION = 0.25
EMBEDDING_WIDTHS = (16, 32, 64, 96)  # three halvings: from 8 px of outline to one cell of latent


def outline(pictures: Tensor) -> Tensor:
    """Outlines of uint8 pictures ``(n, 3, h, w)``: uint8 of the same shape, 255 on edges and 0
    elsewhere.

    The gradient of the lightly blurred picture, the largest of the three colours, thinned to where
    it peaks across or down.
    """
    kernel = torch.tensor([0.25, 0.5, 0.25])
    x = pictures.float()
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    soft = F.conv2d(padded, (kernel[:, None] * kernel).expand(3, 1, 3, 3).contiguous(), groups=3)
    wide = F.pad(soft, (1, 1, 1, 1), mode="replicate")
    across = (wide[..., 1:-1, 2:] - wide[..., 1:-1, :-2]).amax(1).abs()
    across = torch.maximum(across, (wide[..., 1:-1, :-2] - wide[..., 1:-1, 2:]).amax(1).abs())
    down = (wide[..., 2:, 1:-1] - wide[..., :-2, 1:-1]).abs().amax(1)
    peak_across = across >= F.max_pool2d(across, (1, 3), 1, (0, 1))
    peak_down = down >= F.max_pool2d(down, (3, 1), 1, (1, 0))
    edges = ((across > EDGE) & peak_across & (across >= down)) | (
        (down > EDGE) & peak_down & (down > across)
    )
    return (edges.unsqueeze(1).expand_as(x) * 255).to(torch.uint8)


def outline_pictures(pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """:func:`outline` of pictures with their colours last, ``(n, h, w, 3)``."""
    return outline(torch.from_numpy(pictures).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()


def build(parts: Parts) -> ControlNetModel:
    """A copy of the UNet's way down, and an embedding of outlines for an autoencoder of factor 8.

    ``from_unet`` forgets the number of heads of the prompt's pooled vector, so it is set
    afterwards.
    """
    copied = ControlNetModel.from_unet(
        parts.unet, conditioning_embedding_out_channels=EMBEDDING_WIDTHS
    )
    config = {key: value for key, value in copied.config.items() if not key.startswith("_")}
    config["addition_embed_type_num_heads"] = parts.unet.config.addition_embed_type_num_heads
    control = ControlNetModel.from_config(config)
    control.load_state_dict(copied.state_dict())
    return control


class OutlinedScenes:
    """The base model's own encoded scenes, and outlines of them drawn when they are asked for."""

    def __init__(self, work: Path, number: int) -> None:
        self._store = LatentStore(work / "latents", data.NATIVE)
        self._atlas = WideAtlas(work)
        folder = work / "latents" / f"{data.NATIVE[0]}x{data.NATIVE[1]}"
        lines = [
            line
            for shard in sorted(folder.glob("scenes-*.jsonl"))
            for line in shard.read_text(encoding="utf-8").splitlines()
        ]
        if len(lines) != len(self._store):
            raise ValueError(f"{len(lines)} scenes for {len(self._store)} latents in {folder}")
        self._scenes = [data.scene_from_dict(json.loads(line)) for line in lines[:number]]

    def batch(self, rng: np.random.Generator, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, tokens, and outlines in 0 to 1, float32 ``(number, 3, height, width)``."""
        rows = rng.integers(len(self._scenes), size=number)
        phrasing = rng.integers(self._store.tokens.shape[1], size=number)
        pictures = np.stack([data.compose(self._scenes[row], self._atlas) for row in rows])
        outlines = outline(torch.from_numpy(pictures).permute(0, 3, 1, 2)).float() / 255
        latents = torch.from_numpy(self._store.latents[rows].astype(np.float32))
        tokens = torch.from_numpy(self._store.tokens[rows, phrasing].astype(np.int64))
        return latents, tokens, outlines


def control_loss(
    parts: Parts,
    control: ControlNetModel,
    batch: tuple[Tensor, Tensor, Tensor],
    noiser: Noiser,
) -> Tensor:
    """The base model's loss with the ControlNet's residuals added."""
    device = next(parts.unet.parameters()).device.type
    latents, tokens, condition = batch
    tokens[torch.rand(len(tokens)) < DROP_CAPTION] = parts.tokens([""])[0]
    latents, condition = latents.to(device), condition.to(device)
    timesteps = spread_timesteps(len(latents), 1000, device)
    noisy, velocity, weight = noiser.noisy(latents, torch.randn_like(latents), timesteps)
    noisy = noisy.contiguous(memory_format=torch.channels_last)
    with torch.autocast(device, dtype=torch.bfloat16):
        words = parts.text(tokens.to(device)).last_hidden_state
        down, middle = control(noisy, timesteps, words, condition, return_dict=False)
        guess = parts.unet(
            noisy,
            timesteps,
            encoder_hidden_states=words,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample
    squared = F.mse_loss(guess.float(), velocity, reduction="none").mean(dim=(1, 2, 3))
    return (weight * squared).mean()


def train(options: argparse.Namespace) -> None:
    """Prepare scenes, train the ControlNet, and write it."""
    torch.manual_seed(4)
    parts = load_parts(options.base, options.device)
    if options.start_from is not None:
        control = ControlNetModel.from_pretrained(options.start_from, dtype=torch.float32)
    else:
        control = build(parts)
    control.requires_grad_(True).to(options.device, memory_format=torch.channels_last)
    scenes = OutlinedScenes(options.work, options.scenes)
    noiser = Noiser(options.device)

    def loss_of(rng: np.random.Generator) -> Tensor:
        return control_loss(parts, control, scenes.batch(rng, options.batch), noiser)

    if fit("controlnet", nn.ParameterList(control.parameters()), loss_of, options):
        folder = options.out or REPOSITORY / "models" / "controlnet-outline"
        control.half().save_pretrained(folder)
        write_card("controlnet-outline", folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=20_000)
    add_arguments(parser, steps=700, batch=16, rate=6e-4)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
