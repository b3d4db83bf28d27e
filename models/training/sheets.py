"""Draw the contact sheets of the model card with stock Diffusers, offline.

    python -m models.training.sheets --work WORK [--sheet concepts]

Writes ``models/tintype/sheets/*.png``. Prompts and seeds are fixed here; every sheet is the first
draw. ``--work`` is only needed for the ControlNet's sheet, whose outlines are drawn from the
artwork.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from models.training import data
from models.training.adapters import REPOSITORY
from models.training.captions import article
from models.training.common import log
from models.training.controlnet import outline_pictures
from models.training.drawing import VARIANTS, Item, Variant, draw, open_pipeline, rendered
from models.training.styles import WideAtlas

CAPTION_PX = 16
BATCH = 12
COMPOSITIONS = (
    "a dog next to an umbrella",
    "an umbrella next to a dog",
    "two cats on a blue background",
    "three red apples",
    "a rocket above a globe",
    "a small star at the top, purple background",
    "a small key on the left",
    "a penguin on an orange background, flat style",
    "a guitar and a drum on a yellow background",
    "a frog under a cloud",
    "two balloons on a pink background, glossy style",
    "a teapot next to a cookie, flat style",
    "a castle on a black background",
    "three mushrooms on a green background",
    "an owl above a book on a grey background",
    "a small crab in the centre on a red background",
    "a picture of a tractor",
    "a pizza beside a lemon, glossy style",
    "two robots",
    "a unicorn on a purple background",
    "a bicycle, flat style",
    "a cactus next to a sun on a blue background",
    "three fish on a blue background",
    "an octopus over a sailboat",
)
OUTLINED = ("elephant", "guitar", "castle", "rocket", "teapot", "butterfly")
LORA_PROMPTS = (
    "a cat",
    "a rocket",
    "a pizza",
    "a house on a blue background",
    "an owl",
    "a bicycle",
)
SIZES_PX = ((96, 96), (128, 192), (192, 128), (192, 192), (256, 256))
SIZE_PROMPTS = (
    "a cat",
    "a castle",
    "a bicycle, flat style",
    "a dog next to an umbrella",
    "three red apples",
    "a penguin on an orange background",
)
LCM_PROMPTS = (*LORA_PROMPTS, "a dog next to an umbrella", "two balloons on a pink background")


@dataclass(frozen=True)
class Cell:
    """One picture of a sheet and the words under it."""

    picture: Image.Image
    words: str


def assemble(cells: Sequence[Cell], columns: int) -> Image.Image:
    """Cells in rows, each with its words below."""
    width, height = cells[0].picture.size
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * (width + 4), rows * (height + CAPTION_PX + 4)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for number, cell in enumerate(cells):
        left, top = number % columns * (width + 4), number // columns * (height + CAPTION_PX + 4)
        sheet.paste(cell.picture, (left, top))
        words = cell.words
        while pen.textlength(words, font=font) > width:
            words = words[:-2]
        pen.text((left + 2, top + height + 1), words, fill="black", font=font)
    return sheet


def items_of(prompts: Sequence[str], seed: int) -> list[Item]:
    """Prompts with consecutive seeds."""
    blank = data.Scene(("cat",))
    return [Item(prompt, seed + n, blank, "sheet") for n, prompt in enumerate(prompts)]


def cells_of(
    models: Path, variant: Variant, items: list[Item], device: str, note: str = ""
) -> list[Cell]:
    """Drawn pictures with their prompts."""
    pipe = open_pipeline(models, variant, device)
    cells: list[Cell] = []
    for start in range(0, len(items), BATCH):
        part = items[start : start + BATCH]
        pictures = draw(pipe, part, variant)
        cells += [
            Cell(Image.fromarray(p), f"{note}{i.prompt}")
            for p, i in zip(pictures, part, strict=True)
        ]
    return cells


def concepts_sheet(models: Path, work: Path, device: str) -> Image.Image:  # noqa: ARG001
    """48 random concepts in the three styles."""
    rng = np.random.default_rng(48)
    names = [data.concepts()[n].name for n in rng.choice(len(data.concepts()), 48, replace=False)]
    prompts = []
    for start in range(0, 48, 12):
        for ending in ("", ", flat style", ", glossy style"):
            prompts += [article(name) + ending for name in names[start : start + 12]]
    return assemble(cells_of(models, VARIANTS["steps-20"], items_of(prompts, 300), device), 12)


def compositions_sheet(models: Path, work: Path, device: str) -> Image.Image:  # noqa: ARG001
    """Pairs, counts, places, backgrounds and styles."""
    return assemble(cells_of(models, VARIANTS["steps-20"], items_of(COMPOSITIONS, 700), device), 6)


def loras_sheet(models: Path, work: Path, device: str) -> Image.Image:  # noqa: ARG001
    """Every style LoRA at 0, 0.5 and 1: a column for each prompt."""
    cells: list[Cell] = []
    items = items_of(LORA_PROMPTS, 800)
    for style in ("twemoji", "silhouette", "night"):
        for scale in (0.0, 0.5, 1.0):
            variant = replace(VARIANTS[f"{style}-1.0"], scale=scale)
            cells += cells_of(models, variant, items, device, f"{style} {scale}: ")
    return assemble(cells, len(LORA_PROMPTS))


def lcm_sheet(models: Path, work: Path, device: str) -> Image.Image:  # noqa: ARG001
    """The LCM-LoRA at 2, 4 and 6 steps, above the base at 20."""
    cells: list[Cell] = []
    for name in ("lcm-2", "lcm-4", "lcm-6", "steps-20"):
        items = items_of(LCM_PROMPTS, 900)
        cells += cells_of(models, VARIANTS[name], items, device, f"{name}: ")
    return assemble(cells, len(LCM_PROMPTS))


def outlines_sheet(models: Path, work: Path, device: str) -> Image.Image:
    """Six outlines, and what the ControlNet makes of each: by name, restyled, and by no words."""
    variant = VARIANTS["outline"]
    pipe = open_pipeline(models, variant, device)
    scenes = [data.Scene((name,), style="flat") for name in OUTLINED]
    named = [Item(article(n), 950, s, "sheet") for n, s in zip(OUTLINED, scenes, strict=True)]
    outlines = outline_pictures(rendered(named, WideAtlas(work)))
    cells = [Cell(Image.fromarray(o), i.prompt) for o, i in zip(outlines, named, strict=True)]
    for prompt in ("{}", "{} on a purple background, glossy style", ""):
        items = [replace(item, prompt=prompt.format(item.prompt)) for item in named]
        drawn = draw(pipe, items, variant, outlines)
        cells += [
            Cell(Image.fromarray(p), i.prompt or "(no words)")
            for p, i in zip(drawn, items, strict=True)
        ]
    return assemble(cells, len(OUTLINED))


def sizes_sheet(models: Path, work: Path, device: str) -> Image.Image:  # noqa: ARG001
    """The same prompts at other sizes than the model's own, a row for each."""
    variant = VARIANTS["steps-20"]
    pipe = open_pipeline(models, variant, device)
    items = items_of(SIZE_PROMPTS, 1000)
    side_px = max(max(size) for size in SIZES_PX)
    cells: list[Cell] = []
    for width_px, height_px in SIZES_PX:
        drawn = draw(pipe, items, variant, size_px=(width_px, height_px))
        for pixels, item in zip(drawn, items, strict=True):
            cell = Image.new("RGB", (side_px, side_px), "lightgrey")
            cell.paste(Image.fromarray(pixels), (0, 0))
            cells.append(Cell(cell, f"{width_px}x{height_px} px: {item.prompt}"))
    return assemble(cells, len(SIZE_PROMPTS))


SHEETS = {
    "concepts": concepts_sheet,
    "compositions": compositions_sheet,
    "loras": loras_sheet,
    "lcm": lcm_sheet,
    "controlnet": outlines_sheet,
    "sizes": sizes_sheet,
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--models", type=Path, default=REPOSITORY / "models")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "models" / "tintype" / "sheets")
    parser.add_argument("--sheet", nargs="+", choices=list(SHEETS), default=list(SHEETS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.sheet:
        sheet = SHEETS[name](options.models, options.work, options.device)
        sheet.save(options.out / f"{name}.png", optimize=True)
        log(f"wrote {name}.png", width=sheet.width, height=sheet.height)


if __name__ == "__main__":
    main()
