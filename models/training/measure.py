"""Compare what loupe sees with what is true of a scene; used for real and for generated pictures
alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.loupe import Attributes, Loupe
from models.loupe.network import LoupeConfig
from models.training import data
from models.training.evaluator_data import number_of_objects
from models.training.icons import BASE_STYLES
from models.training.styles import WideAtlas, caption_in_style

DUPLICATE_DISTANCE = 0.4
"""Distance of two 32 px icons, as a share of the fainter one's own distance from grey, below which
they look alike.

The closest two of the list are "sun" and "coin" at 0.46, which differ to any eye: nothing had to
be merged.
"""

DISTRACTORS = 256


def faces(atlas: WideAtlas) -> npt.NDArray[np.float32]:
    """Every concept in every base style at 32 px, less the grey behind it: ``(styles, concepts,
    3072)``.
    """
    rows = np.empty((len(BASE_STYLES), len(data.concepts()), 32, 32, 3), dtype=np.float32)
    rows[:] = 128
    for style, drawn in zip(BASE_STYLES, rows, strict=True):
        for index, canvas in enumerate(drawn):
            data.paste(canvas, data.scale(atlas.icon(style, index), 32), 0, 0)
    return rows.reshape(*rows.shape[:2], -1) - 128


def near_duplicates(drawn: npt.NDArray[np.float32], names: Sequence[str]) -> dict[str, str]:
    """Concepts that look like an earlier one in two styles or more, and which one each counts
    as.
    """
    alike = np.zeros((len(names), len(names)), dtype=np.int64)
    for rows in drawn:
        squares = (rows**2).sum(1)
        distance = np.maximum(squares[:, None] + squares - 2 * rows @ rows.T, 0)
        alike += np.sqrt(distance / np.minimum(squares[:, None], squares)) < DUPLICATE_DISTANCE
    merged: dict[str, str] = {}
    for later, name in enumerate(names):
        earlier = [n for n, a in zip(names[:later], alike[later], strict=False) if a >= 2]
        kept = [n for n in earlier if n not in merged]
        if kept:
            merged[name] = kept[0]
    return merged


def compare(seen: Attributes, scene: data.Scene, config: LoupeConfig) -> dict[str, bool]:
    """Which parts of a scene were seen; parts that the scene does not define are left out.

    ``concept`` asks for all objects whatever their order, ``order`` for the order of a pair, and
    ``parts`` for everything at once that a prompt says or means by saying nothing: objects in
    order, count, relation, background, style, and of a small object its size and place.
    """
    objects = tuple(config.merged.get(o, o) for o in scene.objects)
    right = {
        "concept": set(seen.objects) == set(objects),
        "style": seen.style == scene.style,
        "background": seen.background == scene.background,
        "count": seen.count == number_of_objects(scene),
    }
    if len(scene.objects) == 2:
        right["order"] = seen.objects == objects
        right["relation"] = seen.relation == scene.relation
    named = dict(right)
    if number_of_objects(scene) == 1:
        right["size"] = seen.size == scene.size
        right["place"] = seen.place == scene.place
        named = right if scene.size == "small" else named
    return right | {"parts": all(named.values())}


def share_right(rows: Sequence[dict[str, bool]]) -> dict[str, float]:
    """Mean of every part over the scenes that define it."""
    names = {name: None for row in rows for name in row}
    return {n: float(np.mean([row[n] for row in rows if n in row])) for n in names}


def retrieval(
    loupe: Loupe, pictures: Sequence[Image.Image | npt.NDArray[np.uint8]], prompts: Sequence[str]
) -> float:
    """Share of pictures whose own prompt scores highest among all different prompts given."""
    unique = list(dict.fromkeys(prompts))
    scores = loupe.embed_pictures(pictures) @ loupe.embed_prompts(unique).T
    own = np.asarray([unique.index(prompt) for prompt in prompts])
    return float((scores.argmax(1) == own).mean())


def frechet(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """Fréchet distance of two sets of features ``(n, d)``, as if each were Gaussian (Heusel et al.
    2017).
    """
    mean = a.mean(0) - b.mean(0)
    left, right = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # The trace of (left right)^(1/2) is the sum of the roots of the eigenvalues of root right root.
    values, vectors = np.linalg.eigh(left)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ right @ root), 0)).sum()
    return float(mean @ mean + np.trace(left) + np.trace(right) - 2 * cross)


def accuracies(loupe: Loupe, atlas: WideAtlas, number: int) -> dict[str, float]:
    """Per attribute, on real renderings of hidden compositions in the base styles; and retrieval
    by caption.
    """
    rng = np.random.default_rng(97)
    scenes = [data.sample_scene(rng, hidden=True) for _ in range(number)]
    pictures = [data.compose(scene, atlas) for scene in scenes]
    seen = loupe.attributes_of(pictures)
    rows = [compare(a, s, loupe.config) for a, s in zip(seen, scenes, strict=True)]
    captions = [caption_in_style(scene, rng) for scene in scenes[:DISTRACTORS]]
    return share_right(rows) | {
        "retrieval_of_256": retrieval(loupe, pictures[:DISTRACTORS], captions)
    }
