"""Train loupe, the evaluator: a two-tower score and attribute heads, on renderings of tintype's
world.

    python -m models.training.evaluator --work WORK --steps 9000 [--device cuda]

It trains on scenes that are not hidden, drawn and then slightly turned, softened and tinted, and
is measured on hidden compositions. The checkpoint is ``WORK/loupe.pt``, the curve
``WORK/loupe.jsonl``; weights, labels, curve and measured accuracies go to ``--out`` (default
``models/loupe``). It is used to measure only: nothing is selected with it.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.loupe import Loupe
from models.loupe.network import LoupeConfig, LoupeNetwork, words_of
from models.training import data
from models.training.common import (
    Curve,
    Ema,
    load_checkpoint,
    log,
    save_checkpoint,
    start_processes,
)
from models.training.evaluator_data import IGNORED, Batches, LabelledBatch
from models.training.measure import accuracies, faces, near_duplicates
from models.training.styles import ALL_STYLES, WideAtlas, caption_in_style

REPOSITORY = Path(__file__).parents[2]
PRESENT_WEIGHT = 20.0  # binary cross-entropy is a mean over all concepts, most of them absent
STYLE_WEIGHT = 3.0  # vendors' styles of a small thing differ in little more than its shading
VOCABULARY_CAPTIONS = 40_000


def vocabulary(captions: int) -> tuple[str, ...]:
    """Every word of many captions, sorted."""
    rng = np.random.default_rng(11)
    found: set[str] = set()
    for number in range(captions):
        scene = data.sample_scene(rng)
        if number % 3 == 0:
            style = ALL_STYLES[number % len(ALL_STYLES)]
            scene = data.Scene(scene.objects, style, scene.background, scene.count, scene.relation)
        found.update(words_of(caption_in_style(scene, rng)))
    return tuple(sorted(found))


def configure(atlas: WideAtlas, captions: int) -> LoupeConfig:
    """The labels of this world, near-duplicates merged."""
    merged = near_duplicates(faces(atlas), [concept.name for concept in data.concepts()])
    return LoupeConfig(
        concepts=tuple(c.name for c in data.concepts() if c.name not in merged),
        styles=ALL_STYLES,
        backgrounds=tuple(data.BACKGROUNDS),
        places=tuple(data.PLACES),
        words=vocabulary(captions),
        merged=merged,
    )


def start(network: LoupeNetwork, folder: Path) -> None:
    """Set the weights to those of a finished evaluator; words that it did not know stay random.

    Raises ValueError where its labels are others than the network's.
    """
    loupe = Loupe.load(folder)
    before = loupe.config
    if replace(before, words=network.config.words) != network.config:
        raise ValueError(f"{folder} tells other things apart: its labels differ")
    state = loupe.state_dict()
    learned, rows = state["text.words.weight"], network.text.words.weight.detach().clone()
    known = {word: row for row, word in enumerate(before.words, start=2)}
    rows[:2] = learned[:2]
    for row, word in enumerate(network.config.words, start=2):
        if word in known:
            rows[row] = learned[known[word]]
    network.load_state_dict(state | {"text.words.weight": rows})


def loss_of(network: LoupeNetwork, batch: LabelledBatch) -> dict[str, Tensor]:
    """Every term of the loss: cross-entropy of the heads, and of the matching in both
    directions.
    """
    with torch.autocast(batch.pictures.device.type, dtype=torch.bfloat16):
        seen = network.look(batch.pictures)
        read = network.read(batch.words)
    losses = {
        name: F.cross_entropy(seen[name].float(), labels, ignore_index=IGNORED)
        for name, labels in batch.labels.items()
        if (labels != IGNORED).any()
    }
    losses["style"] = STYLE_WEIGHT * losses["style"]
    losses["present"] = PRESENT_WEIGHT * F.binary_cross_entropy_with_logits(
        seen["present"].float(), batch.present
    )
    similar = seen["embedding"] @ read.T * network.log_scale.clamp(max=4.6).exp()
    losses["match"] = F.cross_entropy(similar, batch.same) + F.cross_entropy(similar.T, batch.same)
    return losses


def train(options: argparse.Namespace) -> None:
    """Train for ``options.steps``, resuming from ``WORK/loupe.pt``."""
    start_processes()
    torch.manual_seed(0)
    atlas = WideAtlas(options.work)
    config = configure(atlas, 2_000 if options.smoke else VOCABULARY_CAPTIONS)
    network = LoupeNetwork(config)
    if options.start_from is not None:
        start(network, options.start_from)
    network.to(options.device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=options.rate, betas=(0.9, 0.98), weight_decay=0.02, fused=True
    )
    ema, step, path = Ema(network, 0.998), 0, options.work / "loupe.pt"
    if (state := load_checkpoint(path)) is not None:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        step = state["step"]
    total = 4 if options.smoke else options.steps
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    log(f"loupe: {millions:.2f} M parameters, step {step} of {total}", words=len(config.words))
    curve = Curve(options.work / "loupe.jsonl")
    batches = Batches(atlas, config, seed=1 + step, device=options.device)
    began, sums = time.time(), dict[str, float]()
    while step < total:
        warm = min(1.0, (step + 1) / 100)
        rate = options.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / total)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses = loss_of(network, batches.next(options.batch))
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 2.0)
        optimizer.step()
        ema.update(network)
        step += 1
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + float(loss.detach())
        if step % options.report == 0 or step == total:
            speed = options.report * options.batch / (time.time() - began)
            curve.add(step=step, per_s=speed, **{k: v / options.report for k, v in sums.items()})
            began, sums = time.time(), {}
        if step % options.save == 0 or step == total:
            saved = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint(path, saved | {"ema": ema.state_dict(), "step": step})
    finish(network, ema, atlas, curve, options)


def finish(
    network: LoupeNetwork, ema: Ema, atlas: WideAtlas, curve: Curve, options: argparse.Namespace
) -> None:
    """Write the averaged weights, read them back, and state their accuracy on held-out
    renderings.
    """
    ema.copy_to(network)
    Loupe(network).save(options.out)
    figures = accuracies(Loupe.load(options.out, options.device), atlas, options.held_out)
    curve.add(held_out=options.held_out, **figures)
    report = {"held_out_scenes": options.held_out, "accuracy": figures}
    (options.out / "accuracy.json").write_text(
        json.dumps(report, indent=1) + "\n", encoding="utf-8"
    )
    shutil.copyfile(options.work / "loupe.jsonl", options.out / "curve.jsonl")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "models" / "loupe")
    parser.add_argument("--start-from", type=Path, help="a folder written before, to begin with")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=9_000)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--report", type=int, default=100, help="steps between points of the curve")
    parser.add_argument("--save", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--held-out", type=int, default=3_000, help="hidden scenes to measure on")
    parser.add_argument(
        "--smoke", action="store_true", help="four steps: only to show that it works"
    )
    train(parser.parse_args())


if __name__ == "__main__":
    main()
