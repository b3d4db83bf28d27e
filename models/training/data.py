"""The world of tintype: scenes, their pictures, their captions, and what is hidden from training.

The whole interface:

- ``Scene``: the machine-readable truth about one picture; a scene draws and captions itself from
  it alone.
- ``sample_scene(rng, canvas)``: a random scene of the training distribution, never a hidden one.
- ``is_hidden(scene)``: whether a scene belongs to the fixed split that no stage of the base model
  trains on.
- ``compose(scene, atlas)``: its picture, uint8 ``(height, width, 3)``.
- ``caption(scene, rng)``: one of its many phrasings (``models.training.captions``).
- ``Atlas(work)``, ``concepts()``, ``concept_index()``: the artwork and the labels
  (``models.training.icons``).

An object is 96 px large, or 56 px when small; on every canvas an object keeps its size in
pixels, and larger canvases hold more. Two or three objects on the native canvas of 128 px are small
ones.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.training.captions import caption, countable
from models.training.icons import BASE_STYLES, Atlas, Concept, concept_index, concepts

__all__ = [
    "BACKGROUNDS",
    "BASE_STYLES",
    "CANVASES",
    "NATIVE",
    "PLACES",
    "Atlas",
    "Concept",
    "Scene",
    "caption",
    "compose",
    "concept_index",
    "concepts",
    "is_hidden",
    "sample_scene",
    "scene_from_dict",
]

Size = Literal["normal", "small"]
Place = Literal["centre", "left", "right", "top", "bottom"]
Relation = Literal["next to", "above"]

NATIVE = (128, 128)
"""Width and height of the canvas that the model is made for."""

CANVASES: dict[tuple[int, int], float] = {
    NATIVE: 0.92,
    (96, 96): 0.015,
    (128, 192): 0.02,
    (192, 128): 0.02,
    (192, 192): 0.02,
    (256, 256): 0.005,
}
"""Width and height of every canvas in training, and its share."""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (32, 32, 36),
    "grey": (160, 162, 168),
    "red": (214, 66, 62),
    "orange": (246, 158, 66),
    "yellow": (250, 224, 104),
    "green": (112, 190, 110),
    "blue": (92, 156, 226),
    "purple": (150, 108, 204),
    "pink": (246, 170, 202),
}

PLACES: dict[Place, tuple[float, float]] = {
    "centre": (0.5, 0.5),
    "left": (0.0, 0.5),
    "right": (1.0, 0.5),
    "top": (0.5, 0.0),
    "bottom": (0.5, 1.0),
}
"""Where a small object lies in the room that the canvas leaves it: (across, down)."""

NORMAL_PX = 96
SMALL_PX = 56
CELL = 8
"""Pixels of a latent's cell. Objects have one of two sizes and lie on the grid of cells: the same
object then has the same latent wherever it is, and a small model learns many times faster. With
free positions and sizes, shapes were still blobs after 140,000 samples.
"""


@dataclass(frozen=True)
class Scene:
    """Everything that is true of one picture.

    ``objects`` holds one concept name, or two for a pair; ``count`` is how many of a single concept
    there are; ``relation`` holds between the first and the second of a pair ("next to": the first
    is on the left; "above": the first is on top). ``size`` and ``place`` speak of a single object.
    ``seed`` draws the small freedom of positions and the background's shade.
    """

    objects: tuple[str, ...]
    style: str = "default"
    background: str = "white"
    count: int = 1
    relation: Relation | None = None
    size: Size = "normal"
    place: Place = "centre"
    width: int = 128
    height: int = 128
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; :func:`scene_from_dict` reads them back."""
        return asdict(self) | {"objects": list(self.objects)}


def scene_from_dict(values: dict[str, Any]) -> Scene:
    """The scene that :meth:`Scene.as_dict` described."""
    return Scene(**(values | {"objects": tuple(values["objects"])}))


def _bucket(key: str, buckets: int) -> int:
    """A number below ``buckets`` that depends on the key alone, on every machine."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "big") % buckets


def is_hidden(scene: Scene) -> bool:
    """Whether the scene holds a composition that is kept from training.

    Hidden are one in eight pairs of concepts (in either order and relation), one in ten of concept
    and coloured background, and one in ten of concept and count above one. Each part of such a
    scene is trained on; their combination never is.
    """
    if len(scene.objects) == 2 and _bucket("pair:" + "|".join(sorted(scene.objects)), 8) == 0:
        return True
    if scene.background != "white" and any(
        _bucket(f"background:{o}:{scene.background}", 10) == 0 for o in scene.objects
    ):
        return True
    return scene.count > 1 and _bucket(f"count:{scene.objects[0]}:{scene.count}", 10) == 0


def sample_scene(
    rng: np.random.Generator, canvas: tuple[int, int] = NATIVE, *, hidden: bool = False
) -> Scene:
    """A random scene on a canvas: of the training distribution, or (``hidden``) of the split that
    is kept from it.
    """
    while True:
        scene = _draw_scene(rng, canvas)
        if is_hidden(scene) == hidden:
            return scene


def _draw_scene(rng: np.random.Generator, canvas: tuple[int, int]) -> Scene:
    names = [concept.name for concept in concepts()]
    first = names[rng.integers(len(names))]
    scene = Scene(
        objects=(first,),
        style=str(rng.choice(list(BASE_STYLES), p=[0.5, 0.25, 0.25])),
        background="white" if rng.random() < 0.45 else str(rng.choice(list(BACKGROUNDS))),
        width=canvas[0],
        height=canvas[1],
        seed=int(rng.integers(2**31)),
    )
    kind = rng.random()
    cramped = min(canvas) < 112  # room for one object only
    if kind < 0.45:
        return scene
    if kind < 0.60 or cramped:
        return replace(scene, size="small", place=list(PLACES)[rng.integers(len(PLACES))])
    if kind < 0.76 and countable(first):
        return replace(scene, count=int(rng.integers(2, 4)))
    second = names[rng.integers(len(names))]
    if second == first:
        return scene
    return replace(
        scene, objects=(first, second), relation="next to" if rng.random() < 0.6 else "above"
    )


def _boxes(scene: Scene, rng: np.random.Generator) -> list[tuple[int, int, int]]:
    """(left, top, side) in pixels of every object."""
    width, height = scene.width, scene.height
    number = len(scene.objects) if len(scene.objects) > 1 else scene.count
    if number == 1:
        side = SMALL_PX if scene.size == "small" else NORMAL_PX
        across, down = PLACES[scene.place] if scene.size == "small" else (0.5, 0.5)
        anchors = [(across, down)]
        cells = (1, 1)
    elif number == 2 and (scene.relation == "above" or (scene.relation is None and height > width)):
        anchors, cells = [(0.5, 0.25), (0.5, 0.75)], (1, 2)
    elif number == 2:
        anchors, cells = [(0.25, 0.5), (0.75, 0.5)], (2, 1)
    elif width > height:
        anchors, cells = [(1 / 6, 0.5), (0.5, 0.5), (5 / 6, 0.5)], (3, 1)
    elif height > width:
        anchors, cells = [(0.5, 1 / 6), (0.5, 0.5), (0.5, 5 / 6)], (1, 3)
    else:
        anchors, cells = [(0.25, 0.25), (0.75, 0.25), (0.5, 0.75)], (2, 2)
    if number > 1:
        roomy = min(width // cells[0], height // cells[1]) >= NORMAL_PX
        side = NORMAL_PX if roomy else SMALL_PX
    boxes = []
    for across, down in anchors:
        if number == 1:
            margin = 4 if scene.size == "small" else 0
            left = margin + across * (width - side - 2 * margin)
            top = margin + down * (height - side - 2 * margin)
        else:
            left, top = across * width - side / 2, down * height - side / 2
        left, top = CELL * np.rint((np.array([left, top]) + rng.integers(-3, 4, size=2)) / CELL)
        boxes.append(
            (int(np.clip(left, 0, width - side)), int(np.clip(top, 0, height - side)), side)
        )
    return boxes


@lru_cache(maxsize=20_000)
def _scaled(atlas: Atlas, style: str, concept: int, side: int) -> npt.NDArray[np.uint8]:
    return scale(atlas.icon(style, concept), side)


def scale(icon: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    """A premultiplied icon averaged down to uint8 ``(side, side, 4)``."""
    image = Image.frombytes("RGBa", icon.shape[1::-1], np.ascontiguousarray(icon).tobytes())
    small = image.resize((side, side), Image.Resampling.HAMMING, reducing_gap=1.0)
    return np.frombuffer(small.tobytes(), dtype=np.uint8).reshape(side, side, 4)


def paste(
    canvas: npt.NDArray[np.float32], icon: npt.NDArray[np.uint8], left: int, top: int
) -> None:
    """Lay a premultiplied icon over a float picture ``(height, width, 3)``, 0 to 255, in place."""
    side = icon.shape[0]
    region = canvas[top : top + side, left : left + side]
    region *= 1.0 - icon[..., 3:] / np.float32(255.0)
    region += icon[..., :3]


def compose(scene: Scene, atlas: Atlas) -> npt.NDArray[np.uint8]:
    """Draw a scene: uint8 ``(height, width, 3)``. The same scene gives the same picture."""
    rng = np.random.default_rng(scene.seed)
    shade = np.asarray(BACKGROUNDS[scene.background], dtype=np.float32)
    if scene.background != "white":
        shade = np.clip(shade + rng.integers(-8, 9, size=3), 0, 255).astype(np.float32)
    picture = np.empty((scene.height, scene.width, 3), dtype=np.float32)
    picture[:] = shade
    index = concept_index()
    names = scene.objects if len(scene.objects) > 1 else scene.objects * scene.count
    for name, (left, top, side) in zip(names, _boxes(scene, rng), strict=True):
        paste(picture, _scaled(atlas, scene.style, index[name], side), left, top)
    return np.asarray(np.clip(np.rint(picture), 0, 255), dtype=np.uint8)
