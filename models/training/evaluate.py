"""Measure drawn pictures with loupe, against real renderings of the same prompts, and write the
card's tables.

    python -m models.training.evaluate --work WORK

reads what ``models.training.drawing`` drew and writes ``evaluation.json`` and the generated part
of ``EVALUATION.md`` in ``models/tintype/``. Nothing is selected here: prompts, seeds, guidance and
steps are fixed beforehand.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from models.loupe import Loupe
from models.loupe.reader import as_batch
from models.training import data
from models.training.adapters import REPOSITORY
from models.training.common import log
from models.training.controlnet import outline_pictures
from models.training.drawing import (
    GUIDANCE,
    VARIANTS,
    Item,
    Pictures,
    draw,
    load_pictures,
    open_pipeline,
    rendered,
)
from models.training.measure import compare, frechet, retrieval, share_right
from models.training.styles import WideAtlas
from models.training.tables import table, write_page

GROUPS = ("seen", "pair", "count", "background")
AUTOENCODER_STRIDE = 3  # every third prompt is enough to see what the autoencoder costs

Figures = dict[str, dict[str, float]]


def group_of(item: Item) -> str:
    """Which row of the table a prompt belongs to."""
    if item.source == "seen":
        return "seen"
    if len(item.scene.objects) == 2:
        return "pair"
    return "count" if item.scene.count > 1 else "background"


def figures_of(loupe: Loupe, items: list[Item], pictures: Pictures) -> Figures:
    """Share of right parts per group of prompts, and over all unseen ones."""
    seen = loupe.attributes_of(list(pictures))
    rows = [compare(a, i.scene, loupe.config) for a, i in zip(seen, items, strict=True)]
    groups = {
        name: [r for r, i in zip(rows, items, strict=True) if group_of(i) == name]
        for name in GROUPS
    }
    groups["unseen"] = [r for r, i in zip(rows, items, strict=True) if i.source == "unseen"]
    return {
        name: share_right(found) | {"prompts": float(len(found))}
        for name, found in groups.items()
        if found
    }


def concepts_right(loupe: Loupe, items: list[Item], pictures: Pictures) -> int:
    """Concepts that are recognised in every picture drawn of them alone."""
    seen = loupe.attributes_of(list(pictures))
    wrong, asked = set(), set()
    for item, attributes in zip(items, seen, strict=True):
        if item.source == "seen":
            asked.add(item.scene.objects)
            if not compare(attributes, item.scene, loupe.config)["concept"]:
                wrong.add(item.scene.objects)
    return len(asked - wrong)


@torch.no_grad()
def through_autoencoder(models: Path, pictures: Pictures) -> Pictures:
    """Real renderings after the model's encoder and decoder: the best that any UNet could draw."""
    vae = AutoencoderKL.from_pretrained(models / "tintype" / "vae", dtype=torch.float32)
    kept = []
    for start in range(0, len(pictures), 16):
        latents = vae.encode(as_batch(list(pictures[start : start + 16]))).latent_dist.mode()
        decoded = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        kept.append(np.asarray(np.rint(decoded * 255), dtype=np.uint8))
    return np.concatenate(kept)


def outline_agreement(drawn: Pictures, asked: Pictures) -> float:
    """F1 of edges ``(n, h, w, 3)``, where an edge may be 2 px off."""
    ours = torch.from_numpy(outline_pictures(drawn)[..., 0] > 0).float().unsqueeze(1)
    theirs = torch.from_numpy(asked[..., 0] > 0).float().unsqueeze(1)
    near_ours, near_theirs = (F.max_pool2d(e, 5, 1, 2) for e in (ours, theirs))
    precision = (ours * near_theirs).sum() / ours.sum().clamp_min(1)
    recall = (theirs * near_ours).sum() / theirs.sum().clamp_min(1)
    return float(2 * precision * recall / (precision + recall).clamp_min(1e-6))


@dataclass(frozen=True)
class Reference:
    """What loupe says of real renderings of some prompts."""

    figures: Figures
    retrieval: float
    features: npt.NDArray[np.float64]
    frechet: float
    concepts: int


def reference(loupe: Loupe, items: list[Item], atlas: WideAtlas) -> Reference:
    """Render some prompts' scenes, twice, and judge them."""
    real = rendered(items, atlas)
    features = loupe.features(list(real))
    again = loupe.features(list(rendered(items, atlas, seed=1)))
    return Reference(
        figures=figures_of(loupe, items, real),
        retrieval=retrieval(loupe, list(real), [item.prompt for item in items]),
        features=features,
        frechet=frechet(again, features),
        concepts=concepts_right(loupe, items, real),
    )


def measure(
    loupe: Loupe, work: Path, name: str, references: dict[tuple[Item, ...], Reference]
) -> dict[str, Any]:
    """All figures of one variant, and the same of real renderings of its prompts, which
    ``references`` keeps for the next variant.
    """
    items, pictures = load_pictures(work, name)
    if tuple(items) not in references:
        references[tuple(items)] = reference(loupe, items, WideAtlas(work))
    real = references[tuple(items)]
    drawn, prompts = list(pictures), [item.prompt for item in items]
    return {
        "pictures": len(items),
        "drawn": figures_of(loupe, items, pictures),
        "real": real.figures,
        "retrieval": retrieval(loupe, drawn, prompts),
        "retrieval_real": real.retrieval,
        "score": float((loupe.embed_pictures(drawn) * loupe.embed_prompts(prompts)).sum(1).mean()),
        "frechet": frechet(loupe.features(drawn), real.features),
        "frechet_real": real.frechet,
        "concepts_recognised_in_both_pictures": concepts_right(loupe, items, pictures),
        "concepts_of_real_renderings": real.concepts,
    }


def style_figures(loupe: Loupe, work: Path, name: str) -> dict[str, float]:
    """How often an adapter's pictures look like its style, and still show what was asked."""
    items, pictures = load_pictures(work, name)
    style = name.rpartition("-")[0]
    seen = loupe.attributes_of(list(pictures))
    right = [compare(a, i.scene, loupe.config)["concept"] for a, i in zip(seen, items, strict=True)]
    return {
        "style": float(np.mean([a.style == style for a in seen])),
        "concept": float(np.mean(right)),
        "pictures": float(len(items)),
    }


def outline_figures(work: Path) -> dict[str, float]:
    """How well edges follow the outlines that were asked for, with the ControlNet and without.

    The world draws a thing alone in one way, so that words say nearly as much as its outlines do.
    What the outlines do by themselves shows without words, beside another thing's outlines.
    """
    items, controlled = load_pictures(work, "outline")
    wordless_items, wordless = load_pictures(work, "outline-wordless")
    free_items, free = load_pictures(work, "steps-20")
    asked = outline_pictures(rendered(items, WideAtlas(work)))
    same = [free_items.index(item) for item in items]
    of_wordless = asked[[items.index(item) for item in wordless_items]]
    return {
        "wordless": outline_agreement(wordless, of_wordless),
        "wordless_others": outline_agreement(wordless, np.roll(of_wordless, 1, axis=0)),
        "with": outline_agreement(controlled, asked),
        "without": outline_agreement(free[same], asked),
        "pictures": float(len(items)),
    }


def seconds_per_picture(models: Path, name: str, runs: int) -> float:
    """Median processor time of one picture, batch 1, one thread, torch eager, single precision."""
    variant = VARIANTS[name]
    pipe = open_pipeline(models, variant, "cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    item = Item("a red apple", 0, data.Scene(("red apple",)), "seen")
    times = []
    for _ in range(runs + 1):
        start = time.process_time()  # the machine may have other work
        draw(pipe, [item], variant)
        times.append(time.process_time() - start)
    torch.set_num_threads(before)
    return statistics.median(times[1:])  # the first one warms up


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--models", type=Path, default=REPOSITORY / "models")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "models" / "tintype")
    parser.add_argument("--time-runs", type=int, default=7, help="pictures to time; 0 for none")
    options = parser.parse_args()
    loupe = Loupe.load(options.models / "loupe")
    drawn = [name for name in VARIANTS if (options.work / "pictures" / name).is_dir()]
    whole = [name for name in drawn if "unseen" in VARIANTS[name].sets]
    references: dict[tuple[Item, ...], Reference] = {}
    report: dict[str, Any] = {"guidance": GUIDANCE, "variants": {}, "styles": {}, "seconds": {}}
    for name in drawn:
        log(f"measuring {name}")
        if name in whole:
            report["variants"][name] = measure(loupe, options.work, name, references)
        elif name == "outline":
            report["outlines"] = outline_figures(options.work)
        elif VARIANTS[name].words:
            report["styles"][name] = style_figures(loupe, options.work, name)
    items = load_pictures(options.work, whole[0])[0][::AUTOENCODER_STRIDE]
    decoded = through_autoencoder(options.models, rendered(items, WideAtlas(options.work)))
    report["autoencoder"] = figures_of(loupe, items, decoded)
    for name in whole if options.time_runs else []:
        report["seconds"][name] = seconds_per_picture(options.models, name, options.time_runs)
    options.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, ensure_ascii=False)
    (options.out / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    write_page(options.out / "EVALUATION.md", table(report))


if __name__ == "__main__":
    main()
