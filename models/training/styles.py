"""Artwork and captions of the styles that the base model never sees, beside its own.

Three styles are kept for adapters: ``twemoji`` and ``silhouette`` have icons of their own;
``night`` recolours the default artwork.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from models.training import data
from models.training.icons import ADAPTER_STYLES, BASE_STYLES, Pixels

NIGHT = "night"
ALL_STYLES = (*BASE_STYLES, *ADAPTER_STYLES, NIGHT)

_INK = np.asarray((26, 14, 66), dtype=np.float32)  # what dark parts become
_GLOW = np.asarray((90, 232, 255), dtype=np.float32)  # what bright parts without a colour become


def neon(icon: Pixels) -> Pixels:
    """Recolour a premultiplied RGBA icon: bright parts glow in their own hue, dark ones turn
    indigo.
    """
    alpha = icon[..., 3:].astype(np.float32)
    plain = icon[..., :3] * (255.0 / np.maximum(alpha, 1.0))
    low, high = plain.min(-1, keepdims=True), plain.max(-1, keepdims=True)
    vivid = (plain - low) / np.maximum(high - low, 1.0) * 255.0
    colour = np.clip((high - low) / np.maximum(high, 1.0) * 1.6, 0.0, 1.0)
    bright = ((plain @ np.asarray((0.299, 0.587, 0.114), np.float32))[..., None] / 255.0) ** 0.8
    shown = _INK + (colour * vivid + (1.0 - colour) * _GLOW - _INK) * bright
    mixed = np.concatenate([shown * (alpha / 255.0), alpha], axis=-1)
    return np.asarray(np.clip(np.rint(mixed), 0, 255), dtype=np.uint8)


class WideAtlas(data.Atlas):
    """The atlas with the night style added; recoloured icons are kept."""

    def __init__(self, work: Path) -> None:
        super().__init__(work)
        self._night: dict[int, Pixels] = {}

    def icon(self, style: str, concept: int) -> Pixels:
        """One icon of any of :data:`ALL_STYLES`: uint8 ``(256, 256, 4)``, premultiplied RGBA."""
        if style != NIGHT:
            return super().icon(style, concept)
        if concept not in self._night:
            self._night[concept] = neon(super().icon("default", concept))
        return self._night[concept]


def restyle(scene: data.Scene, style: str) -> data.Scene:
    """The scene in another style; at night an unspecified (white) background is black."""
    dark = style == NIGHT and scene.background == "white"
    return replace(scene, style=style, background="black" if dark else scene.background)


def caption_in_style(scene: data.Scene, rng: np.random.Generator) -> str:
    """A caption that names the style wherever the style is not the default one."""
    if scene.style != NIGHT:
        return data.caption(scene, rng)
    return data.caption(replace(scene, style="silhouette"), rng).replace("silhouette", NIGHT)


def caption_without_style(scene: data.Scene, rng: np.random.Generator) -> str:
    """A caption as for the default style on its default background: what a style adapter trains
    on.
    """
    background = (
        "white" if scene.style == NIGHT and scene.background == "black" else scene.background
    )
    while True:
        text = data.caption(replace(scene, style="default", background=background), rng)
        if "noto" not in text and "white" not in text:
            return text
