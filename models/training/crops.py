"""Pictures for the autoencoder: crowded crops to train on, and scenes and icons to measure with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.training import data

CROP = 64
"""Pixels of a training crop's side."""

SIZES_PX = {"small": (52, 63), "normal": (92, 103)}  # a little around the scenes' own two sizes
LARGEST_PX = 102


class Crops:
    """Endless training pictures for the autoencoder."""

    def __init__(self, atlas: data.Atlas, seed: int) -> None:
        self._atlas = atlas
        self._extra = atlas.extra()
        self._rng = np.random.default_rng(seed)

    def _icon(self) -> npt.NDArray[np.uint8]:
        if self._rng.random() < 0.15:
            index = int(self._rng.integers(len(self._extra)))
            row: npt.NDArray[np.uint8] = self._extra[index - (index % 10 == 0)]
            return row  # never a tenth one: those are held out
        style = list(data.BASE_STYLES)[self._rng.integers(len(data.BASE_STYLES))]
        return self._atlas.icon(style, int(self._rng.integers(len(data.concepts()))))

    def crop(self, side: int = CROP) -> npt.NDArray[np.uint8]:
        """A piece of a crowded scene: uint8 ``(side, side, 3)``."""
        rng = self._rng
        margin = LARGEST_PX
        canvas = np.empty((side + 2 * margin, side + 2 * margin, 3), dtype=np.float32)
        palette = list(data.BACKGROUNDS.values())
        choice = rng.random()
        canvas[:] = (
            255
            if choice < 0.4
            else palette[rng.integers(len(palette))]
            if choice < 0.7
            else rng.integers(0, 256, 3)
        )
        for _ in range(int(rng.integers(1, 4))):
            small = rng.random() < 0.5
            size = int(rng.integers(*(SIZES_PX["small" if small else "normal"])))
            left, top = rng.integers(margin - size // 2, margin + side - size // 2, size=2)
            icon = data.scale(self._icon(), size)
            data.paste(canvas, icon, int(left), int(top))
        picture = canvas[margin : margin + side, margin : margin + side]
        if rng.random() < 0.1:
            picture = picture[..., rng.permutation(3)]
        if rng.random() < 0.5:
            picture = picture[:, ::-1]
        return np.asarray(np.clip(np.rint(picture), 0, 255), dtype=np.uint8)

    def batch(self, number: int, whole: bool) -> list[npt.NDArray[np.uint8]]:
        """Crops, or a quarter as many whole scenes of the same cost."""
        if not whole:
            return [self.crop() for _ in range(number)]
        draws = self._rng.random(max(1, number // 4))
        return [self.scene() if draw < 0.7 else self.crop(128) for draw in draws]

    def scene(self) -> npt.NDArray[np.uint8]:
        """A whole scene of the training distribution: uint8 ``(128, 128, 3)``."""
        return data.compose(data.sample_scene(self._rng), self._atlas)


def to_tensor(pictures: list[npt.NDArray[np.uint8]], device: str) -> Tensor:
    """uint8 ``(h, w, 3)`` pictures to float ``(n, 3, h, w)`` in -1 to 1, channels last."""
    stacked = torch.from_numpy(np.stack(pictures)).to(device).permute(0, 3, 1, 2)
    return (stacked.float() / 127.5 - 1.0).contiguous(memory_format=torch.channels_last)


def held_out(atlas: data.Atlas, number: int, device: str) -> dict[str, Tensor]:
    """Pictures for measuring: scenes of hidden compositions, and pictograms never trained on
    (single, 100 px, on white).
    """
    rng = np.random.default_rng(20)
    scenes = [data.compose(data.sample_scene(rng, hidden=True), atlas) for _ in range(number)]
    extra = atlas.extra()
    strange = []
    for index in rng.permutation(np.arange(0, len(extra), 10))[:number]:
        canvas = np.full((128, 128, 3), 255, dtype=np.float32)
        data.paste(canvas, data.scale(extra[index], 100), 14, 14)
        strange.append(np.asarray(np.clip(canvas, 0, 255), dtype=np.uint8))
    return {
        "hidden_scenes_db": to_tensor(scenes, device),
        "unknown_icons_db": to_tensor(strange, device),
    }
