"""Labelled batches for the evaluator: scenes beside scenes that differ from them in one part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from models.loupe.network import LoupeConfig, encode_words
from models.loupe.reader import RELATIONS, SIZES
from models.training import data
from models.training.captions import countable
from models.training.icons import BASE_STYLES
from models.training.styles import ALL_STYLES, WideAtlas, caption_in_style, restyle

IGNORED = -100  # the label that cross-entropy skips
ADAPTER_SHARE = 0.3  # of scenes in a style that only adapters draw
UNKNOWN_WORDS = 0.03  # share of words replaced by the unknown word

Labels = dict[str, Tensor]


@dataclass(frozen=True)
class LabelledBatch:
    """Pictures ``(n, 3, h, w)`` in -1 to 1, prompts ``(n, words)``, labels ``(n,)`` of every head.

    ``same`` is the matrix ``(n, n)`` of targets for the contrastive loss: rows sum to one, and
    pictures of the same truth share their weight.
    """

    pictures: Tensor
    words: Tensor
    labels: Labels
    present: Tensor
    same: Tensor


def truth(scene: data.Scene) -> tuple[object, ...]:
    """Everything that a prompt can say of a scene."""
    alone = len(scene.objects) == 1 and scene.count == 1
    return (
        scene.objects,
        scene.style,
        scene.background,
        scene.count,
        scene.relation,
        scene.size if alone else None,
        scene.place if alone and scene.size == "small" else None,
    )


def number_of_objects(scene: data.Scene) -> int:
    """Objects of any kind in the picture."""
    return len(scene.objects) if len(scene.objects) > 1 else scene.count


def sibling(scene: data.Scene, rng: np.random.Generator) -> data.Scene:
    """The scene with one part changed, so that the score has to notice that part."""
    names = [c.name for c in data.concepts()]
    other = names[rng.integers(len(names))]
    changes: list[Callable[[], data.Scene]] = [
        lambda: replace(scene, background=str(rng.choice(list(data.BACKGROUNDS)))),
        lambda: replace(scene, style=str(rng.choice(ALL_STYLES))),
        lambda: replace(
            scene, style=str(rng.choice(tuple(BASE_STYLES)))
        ),  # the hardest part to tell
        lambda: replace(scene, objects=(other, *scene.objects[1:])),
    ]
    if len(scene.objects) == 2:
        changes.append(lambda: replace(scene, objects=scene.objects[::-1]))
        turned: data.Relation = "above" if scene.relation == "next to" else "next to"
        changes.append(lambda: replace(scene, relation=turned))
        changes.append(lambda: replace(scene, objects=scene.objects[:1], relation=None))
    elif countable(scene.objects[0]) and min(scene.width, scene.height) >= 112:
        changes.append(
            lambda: replace(scene, size="normal", place="centre", count=int(rng.integers(1, 4)))
        )
    if len(scene.objects) == 1 and scene.count == 1:
        place = list(data.PLACES)[rng.integers(len(data.PLACES))]
        changes.append(lambda: replace(scene, size="small", place=place))
    changed = replace(changes[rng.integers(len(changes))](), seed=int(rng.integers(2**31)))
    two_of_a_kind = len(changed.objects) == 2 and changed.objects[0] == changed.objects[1]
    counted = changed.count > 1 and not countable(changed.objects[0])
    return scene if two_of_a_kind or counted or data.is_hidden(changed) else changed


def training_scene(rng: np.random.Generator, canvas: tuple[int, int]) -> data.Scene:
    """A scene that is not hidden, now and then in an adapter's style."""
    scene = data.sample_scene(rng, canvas)
    if rng.random() >= ADAPTER_SHARE:
        return scene
    styled = restyle(scene, ALL_STYLES[rng.integers(len(BASE_STYLES), len(ALL_STYLES))])
    return scene if data.is_hidden(styled) else styled


def labels_of(scenes: list[data.Scene], config: LoupeConfig) -> tuple[Labels, Tensor]:
    """The class of every head, :data:`IGNORED` where a part is undefined, and the multi-hot
    objects.
    """
    index = {name: i for i, name in enumerate(config.concepts)}
    rows: list[dict[str, int]] = []
    present = torch.zeros(len(scenes), len(config.concepts))
    for row, scene in enumerate(scenes):
        objects = [index[config.merged.get(o, o)] for o in scene.objects]
        number = number_of_objects(scene)
        present[row, objects] = 1.0
        rows.append(
            {
                "style": config.styles.index(scene.style),
                "background": config.backgrounds.index(scene.background),
                "size": SIZES.index(scene.size) if number == 1 else IGNORED,
                "place": config.places.index(scene.place) if number == 1 else IGNORED,
                "count": number - 1,
                "relation": RELATIONS.index(scene.relation) if scene.relation else IGNORED,
                "first": objects[0],
                "second": objects[-1] if number > 1 else len(config.concepts),
            }
        )
    return {name: torch.tensor([r[name] for r in rows]) for name in rows[0]}, present


def augment(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    """Small turns, shifts and stretches, softening, noise and tints: what a sound drawing may
    differ by.

    ``pictures`` is ``(n, 3, h, w)`` in -1 to 1; every picture gets its own. The aim is fairness to
    pictures that a decoder drew, so nothing here changes a label.
    """
    n, _, height, width = pictures.shape

    def drawn(low: float, high: float, *shape: int) -> Tensor:
        values = rng.uniform(low, high, size=(n, *shape)).astype(np.float32)
        return torch.from_numpy(values).to(pictures.device)

    turn, stretch = drawn(-0.12, 0.12), drawn(0.94, 1.06, 2)
    lean = drawn(-0.06, 0.06, 2)
    theta = torch.zeros(n, 2, 3, device=pictures.device)
    theta[:, 0, 0], theta[:, 0, 1] = turn.cos() * stretch[:, 0], -turn.sin() + lean[:, 0]
    theta[:, 1, 0], theta[:, 1, 1] = turn.sin() + lean[:, 1], turn.cos() * stretch[:, 1]
    theta[:, :, 2] = drawn(-0.05, 0.05, 2)
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    moved = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    soft = F.interpolate(
        F.interpolate(moved, scale_factor=float(rng.uniform(0.4, 1.0)), mode="area"),
        size=(height, width),
        mode="bilinear",
    )
    mix = drawn(-1.0, 1.0, 1, 1, 1).clamp_min(0.0)  # half of the pictures stay sharp
    moved = moved + (soft - moved) * mix
    moved = moved * drawn(0.92, 1.06, 1, 1, 1) + drawn(-0.05, 0.05, 3, 1, 1)
    noise = torch.randn(pictures.shape, device=pictures.device)
    return (moved + noise * drawn(-0.08, 0.08, 1, 1, 1).clamp_min(0.0)).clamp(-1, 1)


class Batches:
    """Endless labelled batches, a function of the seed alone."""

    def __init__(self, atlas: WideAtlas, config: LoupeConfig, seed: int, device: str) -> None:
        self._atlas = atlas
        self._config = config
        self._rng = np.random.default_rng(seed)
        self._device = device

    def next(self, number: int) -> LabelledBatch:
        """``number`` pictures on one canvas: half of them scenes, half siblings of those."""
        rng = self._rng
        sizes, shares = list(data.CANVASES), np.asarray(list(data.CANVASES.values()))
        canvas = sizes[rng.choice(len(sizes), p=shares / shares.sum())]
        number = max(8, number * 128 * 128 // (canvas[0] * canvas[1]) // 2 * 2)
        scenes = [training_scene(rng, canvas) for _ in range(number // 2)]
        scenes += [sibling(scene, rng) for scene in scenes]
        texts = [self._with_unknown(caption_in_style(scene, rng)) for scene in scenes]
        pictures = [data.compose(scene, self._atlas) for scene in scenes]
        return self._batch(scenes, texts, pictures)

    def _with_unknown(self, text: str) -> str:
        words = text.split(" ")
        return " ".join("?0?" if self._rng.random() < UNKNOWN_WORDS else word for word in words)

    def _batch(
        self, scenes: list[data.Scene], texts: list[str], pictures: list[npt.NDArray[np.uint8]]
    ) -> LabelledBatch:
        stacked = torch.from_numpy(np.stack(pictures)).to(self._device)
        floats = stacked.permute(0, 3, 1, 2).float() / 127.5 - 1.0
        changed = augment(floats, self._rng).contiguous(memory_format=torch.channels_last)
        labels, present = labels_of(scenes, self._config)
        truths = [truth(scene) for scene in scenes]
        same = torch.tensor([[float(a == b) for b in truths] for a in truths])
        return LabelledBatch(
            changed,
            encode_words(self._config, texts).to(self._device),
            {name: values.to(self._device) for name, values in labels.items()},
            present.to(self._device),
            (same / same.sum(dim=1, keepdim=True)).to(self._device),
        )
