"""A world and a base model small enough to try every stage that derives from them in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

from models.training import base, data, text, vae
from models.training.icons import SIDE, STYLES

LATENT_CHANNELS = 4


def write_icons(work: Path) -> None:
    """Artwork in which a concept is a colour and a style is a size; the files are sparse."""
    folder = work / "icons"
    folder.mkdir(parents=True)
    number = len(data.concepts())
    for rank, name in enumerate(STYLES.values()):
        rows = np.lib.format.open_memmap(
            folder / f"{name}.npy", mode="w+", dtype=np.uint8, shape=(number, SIDE, SIDE, 4)
        )
        half = 40 + 8 * rank
        for index in range(number):
            colour = (index * 37 % 256, index * 91 % 256, index * 53 % 256, 255)
            rows[index, SIDE // 2 - half : SIDE // 2 + half, 100:156] = colour
        rows.flush()


def write_base(folder: Path) -> None:
    """A stock folder in tintype's shape, with random weights."""
    torch.manual_seed(0)
    tokenizer = text.train_tokenizer(folder.parent / "tokenizer", captions=300)
    encoder = text.build(tokenizer, width=32, layers=1)
    unet = base.build(LATENT_CHANNELS, (16, 32, 32), 32)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.05)
    StableDiffusionPipeline(
        vae=vae.build(LATENT_CHANNELS, (8, 8, 16, 16)),
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DPMSolverMultistepScheduler(**base.NOISE, timestep_spacing="trailing"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def write_latents(work: Path) -> None:
    """Two shards of scenes on the native canvas, with random latents and captions."""
    rng = np.random.default_rng(0)
    folder = work / "latents" / f"{data.NATIVE[0]}x{data.NATIVE[1]}"
    folder.mkdir(parents=True)
    for shard in range(2):
        latents = rng.normal(size=(6, LATENT_CHANNELS, 16, 16)).astype(np.float16)
        np.save(folder / f"latents-{shard}.npy", latents)
        scenes = [data.sample_scene(rng).as_dict() for _ in range(6)]
        lines = "".join(json.dumps(scene) + "\n" for scene in scenes)
        (folder / f"scenes-{shard}.jsonl").write_text(lines)
        np.save(folder / f"tokens-{shard}.npy", rng.integers(0, 300, (6, 4, 32)).astype(np.uint16))
