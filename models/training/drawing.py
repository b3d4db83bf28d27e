"""Draw the benchmark prompts with stock Diffusers, in chunks that survive an interruption.

    torchrun --nproc-per-node 2 -m models.training.drawing --work WORK --variant steps-20
    torchrun --nproc-per-node 2 -m models.training.drawing --work WORK --variant lcm-4

Prompts and seeds are those of ``models/prompts``; pictures go to ``WORK/pictures/VARIANT/``, which
has to be emptied when the model changes. ``models.training.evaluate`` measures them.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
)
from PIL import Image

from models.training import data
from models.training.adapters import REPOSITORY
from models.training.common import log, start_processes
from models.training.controlnet import outline_pictures
from models.training.styles import WideAtlas

CHUNK = 10  # prompts drawn in one batch and kept in one file
GUIDANCE = 3.0
"""The scale that every guided picture of the tables and sheets is drawn with."""

STYLE_PROMPTS = 60

Pictures = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Variant:
    """One way to draw: steps, and the adapter that goes with them."""

    steps: int = 20
    guidance: float = GUIDANCE
    adapter: str | None = None
    scale: float = 1.0
    sets: tuple[str, ...] = ("seen", "unseen")
    limit: int | None = None
    outlines: bool = False  # of the scenes' renderings, through the ControlNet
    words: bool = True  # without them, only the outlines say what to draw


VARIANTS = {
    "steps-20": Variant(),
    **{f"lcm-{steps}": Variant(steps, 1.0, "lora-lcm") for steps in (2, 4, 6)},
    **{
        f"{style}-{scale}": Variant(
            adapter=f"lora-{style}", scale=scale, sets=("seen",), limit=STYLE_PROMPTS
        )
        for style in ("twemoji", "silhouette", "night")
        for scale in (0.5, 1.0)
    },
    "outline": Variant(sets=("seen",), limit=STYLE_PROMPTS, outlines=True),
    "outline-wordless": Variant(sets=("seen",), limit=STYLE_PROMPTS, outlines=True, words=False),
}


@dataclass(frozen=True)
class Item:
    """A benchmark prompt, its seed, and the scene that a right picture shows."""

    prompt: str
    seed: int
    scene: data.Scene
    source: str


def benchmark(variant: Variant) -> list[Item]:
    """The prompts that a variant draws."""
    items: list[Item] = []
    for source in variant.sets:
        text = (REPOSITORY / "models" / "prompts" / f"{source}.json").read_text(encoding="utf-8")
        rows: list[dict[str, Any]] = json.loads(text)
        items += [
            Item(row["prompt"], row["seed"], data.scene_from_dict(row["scene"]), source)
            for row in rows
        ]
    return items[: variant.limit]


def open_pipeline(models: Path, variant: Variant, device: str) -> DiffusionPipeline:
    """The shipped folders in stock Diffusers, offline, in single precision."""
    pipe = DiffusionPipeline.from_pretrained(
        models / "tintype", dtype=torch.float32, local_files_only=True
    ).to(device)
    pipe.set_progress_bar_config(disable=True)
    if variant.outlines:
        control = ControlNetModel.from_pretrained(
            models / "controlnet-outline", dtype=torch.float32, local_files_only=True
        ).to(device)
        pipe = StableDiffusionControlNetPipeline(**pipe.components, controlnet=control)
        pipe.set_progress_bar_config(disable=True)
    if variant.adapter is not None:
        pipe.load_lora_weights(
            models / variant.adapter, adapter_name="style", local_files_only=True
        )
        pipe.set_adapters(["style"], [variant.scale])
    if variant.adapter == "lora-lcm":
        pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    return pipe


def rendered(items: list[Item], atlas: WideAtlas, seed: int = 0) -> Pictures:
    """The scenes that prompts describe, from the artwork; each ``seed`` places them anew."""
    scenes = [replace(item.scene, seed=seed * 100_000 + item.seed) for item in items]
    return np.stack([data.compose(scene, atlas) for scene in scenes])


def draw(
    pipe: DiffusionPipeline,
    items: list[Item],
    variant: Variant,
    outlines: Pictures | None = None,
    size_px: tuple[int, int] | None = None,
) -> Pictures:
    """Pictures of some prompts, uint8 ``(n, h, w, 3)``; each from its own seed.

    Args:
        size_px: (width, height); by default the model's own.
    """
    width_px, height_px = size_px or (None, None)
    control = {} if outlines is None else {"image": [Image.fromarray(o) for o in outlines]}
    pictures = pipe(
        [item.prompt if variant.words else "" for item in items],
        generator=[torch.Generator().manual_seed(item.seed) for item in items],
        num_inference_steps=variant.steps,
        guidance_scale=variant.guidance,
        output_type="np",
        width=width_px,
        height=height_px,
        **control,
    ).images
    return np.asarray(np.rint(pictures * 255), dtype=np.uint8)


def chunk_path(work: Path, name: str, start: int) -> Path:
    """The file of the chunk that begins at a prompt."""
    return work / "pictures" / name / f"{start:04d}.npy"


def load_pictures(work: Path, name: str) -> tuple[list[Item], Pictures]:
    """What has been drawn of a variant so far, in the order of its prompts."""
    items = benchmark(VARIANTS[name])
    kept: list[Item] = []
    pictures: list[Pictures] = []
    for start in range(0, len(items), CHUNK):
        path = chunk_path(work, name, start)
        if path.exists():
            pictures.append(np.load(path))
            kept += items[start : start + len(pictures[-1])]
    if not pictures:
        raise FileNotFoundError(f"no pictures of {name}: run models.training.drawing first")
    return kept, np.concatenate(pictures)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--models", type=Path, default=REPOSITORY / "models")
    parser.add_argument("--variant", required=True, nargs="+", choices=list(VARIANTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="two prompts in two steps")
    options = parser.parse_args()
    rank, size = start_processes()
    atlas = WideAtlas(options.work)
    for name in options.variant:
        variant = VARIANTS[name]
        if options.smoke:
            variant = replace(variant, steps=2, limit=2)
        pipe = open_pipeline(options.models, variant, options.device)
        items = benchmark(variant)
        starts = list(range(0, len(items), CHUNK))[rank::size]
        # A stride through the whole set, so that an interrupted run is a fair sample of it.
        for number, start in enumerate(sorted(starts, key=lambda s: (s // CHUNK * 7919) % 101)):
            path = chunk_path(options.work, name, start)
            if path.exists():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial.npy")
            part = items[start : start + CHUNK]
            outlines = outline_pictures(rendered(part, atlas)) if variant.outlines else None
            np.save(partial, draw(pipe, part, variant, outlines))
            partial.replace(path)
            if number % 5 == 0:
                log(f"{name}: {number + 1} of {len(starts)} chunks")


if __name__ == "__main__":
    main()
