"""What both baselines share: a Diffusers pipeline, and pictures as base64 PNG."""

from __future__ import annotations

import argparse
import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from pydantic import BaseModel


class Body(BaseModel):
    """The part of OpenAI's request that the benchmark sends; everything else is ignored."""

    prompt: str
    steps: int = 20
    guidance: float = 3.0
    seed: int = 0


def options(summary: str) -> argparse.Namespace:
    """The command line that both take."""
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--model", type=Path, required=True, help="a folder in Diffusers layout")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--batch-timeout-s", type=float, default=0.05)
    return parser.parse_args()


def open_pipeline(folder: Path, threads: int) -> Any:
    """The pipeline in fp32, warm."""
    torch.set_num_threads(threads)
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    draw(pipeline, [Body(prompt="cat", steps=2)])
    return pipeline


def draw(pipeline: Any, bodies: Sequence[Body]) -> list[str]:
    """Pictures of requests with the same steps and guidance, as one batch, in base64 PNG."""
    pictures = pipeline(
        prompt=[body.prompt for body in bodies],
        num_inference_steps=bodies[0].steps,
        guidance_scale=bodies[0].guidance,
        generator=[torch.Generator().manual_seed(body.seed) for body in bodies],
    ).images
    return [_base64(picture) for picture in pictures]


def reply(picture: str) -> dict[str, Any]:
    """A picture in the shape of OpenAI's reply."""
    return {"data": [{"b64_json": picture}]}


def _base64(picture: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
