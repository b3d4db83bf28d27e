"""Stock Diffusers, offline, loads everything that ships beside the model, and each has effect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import (
    ControlNetModel,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from PIL import Image, ImageDraw

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore")]

MODELS = Path(__file__).parents[2] / "models"
LAYOUTS = ("pytorch_lora_weights.safetensors", "kohya.safetensors")
LORAS = sorted(folder.name for folder in MODELS.glob("lora-*"))
VISIBLE = 0.004
"""Mean difference of a picture in 0 to 1: one level of 256 everywhere; rounding is far below."""

Picture = npt.NDArray[np.float32]
Stock = Callable[[], StableDiffusionPipeline]


@pytest.fixture
def stock() -> Stock:
    """A fresh pipeline each time: an adapter stays in the one that loaded it."""

    def load() -> StableDiffusionPipeline:
        pipe: StableDiffusionPipeline = StableDiffusionPipeline.from_pretrained(
            MODELS / "tintype", local_files_only=True, torch_dtype=torch.float32
        )
        return pipe

    return load


def draw(pipe: StableDiffusionPipeline, **options: object) -> Picture:
    """One picture of 64 px in four steps."""
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 4, "guidance_scale": 2.0, "height": 64, "width": 64}
    generator = torch.Generator().manual_seed(0)
    picture: Picture = pipe(
        "a red apple", generator=generator, output_type="np", **{**settings, **options}
    ).images[0]
    assert np.isfinite(picture).all()
    return picture


@pytest.mark.parametrize("adapter", LORAS)
def test_a_lora_changes_the_picture_and_alike_in_both_layouts(adapter: str, stock: Stock) -> None:
    plain = draw(stock())
    changed = []
    for layout in LAYOUTS:
        pipe = stock()
        pipe.load_lora_weights(MODELS / adapter, weight_name=layout, local_files_only=True)
        changed.append(draw(pipe))
    assert np.abs(changed[0] - plain).mean() > VISIBLE
    assert np.abs(changed[0] - changed[1]).max() < 0.02


def test_the_lcm_lora_draws_in_four_steps_without_guidance(stock: Stock) -> None:
    pipe = stock()
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    plain = draw(pipe, guidance_scale=1.0)
    pipe.load_lora_weights(MODELS / "lora-lcm", local_files_only=True)
    assert np.abs(draw(pipe, guidance_scale=1.0) - plain).mean() > VISIBLE


def test_the_controlnet_follows_its_outline(stock: Stock) -> None:
    control = ControlNetModel.from_pretrained(
        MODELS / "controlnet-outline", local_files_only=True, torch_dtype=torch.float32
    )
    pipe = StableDiffusionControlNetPipeline(**stock().components, controlnet=control)
    outline = Image.new("RGB", (64, 64))
    ImageDraw.Draw(outline).ellipse((16, 16, 48, 48), outline="white")
    without = draw(pipe, image=outline, controlnet_conditioning_scale=0.0)
    assert np.abs(without - draw(stock())).max() < 1e-3
    assert np.abs(draw(pipe, image=outline) - without).mean() > VISIBLE
