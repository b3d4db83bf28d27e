"""What goes into the engine: one request for a picture, and the bounds that hold for it.

Everything here is also found in :mod:`engine.types`, which is where others import it from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from engine.errors import InvalidRequestError, LimitExceededError

Image = npt.NDArray[np.uint8]
"""A picture: (height, width, 3) for RGB, or (height, width) for a mask; 0 to 255."""

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds on one request. Every one has a default: nothing in Darkroom is unbounded."""

    max_steps: int = 150
    min_side_px: int = 16
    max_side_px: int = 2048
    max_area_px: int = 2048 * 2048
    max_prompt_chars: int = 4000
    max_guidance: float = 50.0


class CacheMode(StrEnum):
    """How a request may use the noise cache."""

    OFF = "off"
    EXACT = "exact"
    """Only a picture of the very same request, seed included: the identical picture."""
    APPROXIMATE = "approximate"
    """Start from the steps that a similar prompt already paid for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheDirective:
    """What one request lets the noise cache do. It narrows what the engine allows, never widens it.

    Attributes:
        min_similarity: floor on the cosine between both prompts' embeddings, -1 to 1.
        max_jump: largest share of the steps to skip, 0 to 1; at 0 nothing is reused.

    Raises:
        InvalidRequestError: at construction, naming the field.
    """

    mode: CacheMode
    min_similarity: float = -1.0
    max_jump: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in tuple(CacheMode):
            allowed = ", ".join(CacheMode)
            raise InvalidRequestError(
                f"cache is {self.mode!r}; allowed: {allowed}", field="cache.mode"
            )
        low, high = self.min_similarity, self.max_jump
        _require(-1.0 <= low <= 1.0, "cache.min_similarity", low, "-1 to 1")
        _require(0.0 <= high <= 1.0, "cache.max_jump", high, "0 to 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One picture to draw. ``None`` means "as the checkpoint says".

    Text to image by default; image to image with ``image``; inpainting with ``image`` and ``mask``
    (white is repainted, black is kept).

    Raises:
        InvalidRequestError: at construction, for a value that can never work.
    """

    prompt: str
    negative_prompt: str = ""
    width_px: int | None = None
    height_px: int | None = None
    steps: int = 20
    solver: str | None = None
    schedule: str | None = None
    timesteps: tuple[float, ...] | None = None
    """Custom timesteps, descending; they replace ``steps`` and ``schedule``."""
    guidance: float | None = None
    """Classifier-free guidance scale; 1 or less turns guidance off and halves the work."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Part of the steps, as fractions, in which guidance acts (Kynkäänniemi et al., 2024)."""
    guidance_rescale: float = 0.0
    """Part, 0 to 1, by which a guided prediction gets back the spread that it had unguided: less
    overexposure under zero-terminal-SNR schedules (Lin et al., 2023, section 3.4)."""
    clip_skip: int = 0
    """Last layers of the text encoders to leave out for the prompt (Automatic1111's number less
    one)."""
    eta: float | None = None
    """Stochasticity of solvers that have it (DDIM, TCD), 0 to 1."""
    seed: int | None = None
    """``None`` draws one; the picture names it."""
    image: Image | None = None
    mask: Image | None = None
    strength: float = 0.8
    preview_every: int = 0
    """Emit a preview every so many steps; 0 for none."""
    priority: int = 0
    """Higher goes first among requests with equal deadline slack."""
    deadline_s: float | None = None
    """Seconds from submission after which the result is worthless."""
    cache: CacheDirective | None = None
    """``None``: off for a request that names its seed, approximate for others (where the engine
    has a noise cache)."""

    def __post_init__(self) -> None:
        _require(self.steps >= 1, "steps", self.steps, "at least 1")
        _require(0.0 < self.strength <= 1.0, "strength", self.strength, "above 0, at most 1")
        if self.guidance is not None:
            _require(math.isfinite(self.guidance), "guidance", self.guidance, "a finite number")
        low, high = self.guidance_interval
        _require(
            0.0 <= low <= high <= 1.0,
            "guidance_interval",
            self.guidance_interval,
            "two fractions with 0 <= low <= high <= 1",
        )
        _require(
            0.0 <= self.guidance_rescale <= 1.0,
            "guidance_rescale",
            self.guidance_rescale,
            "between 0 and 1",
        )
        _require(self.clip_skip >= 0, "clip_skip", self.clip_skip, "0 or more")
        if self.eta is not None:
            _require(0.0 <= self.eta <= 1.0, "eta", self.eta, "between 0 and 1")
        if self.seed is not None:
            _require(0 <= self.seed <= MAX_SEED, "seed", self.seed, f"0 to {MAX_SEED}")
        _require(self.preview_every >= 0, "preview_every", self.preview_every, "0 or more")
        if self.deadline_s is not None:
            _require(self.deadline_s > 0, "deadline_s", self.deadline_s, "above 0")
        if self.mask is not None and self.image is None:
            raise InvalidRequestError("a mask needs an image to repaint", field="mask")
        if self.image is not None and (self.image.ndim != 3 or self.image.shape[2] != 3):
            raise InvalidRequestError(
                f"image must be (height, width, 3), not {self.image.shape}", field="image"
            )
        if self.mask is not None and self.mask.ndim != 2:
            raise InvalidRequestError(
                f"mask must be (height, width), not {self.mask.shape}", field="mask"
            )

    def check(self, limits: Limits) -> None:
        """Hold the request against ``limits``.

        Raises:
            LimitExceededError: naming the field and the bound that it passes.
        """
        _bound(self.steps, limits.max_steps, "steps")
        if self.timesteps is not None:
            _bound(len(self.timesteps), limits.max_steps, "timesteps")
        for name, prompt in (("prompt", self.prompt), ("negative_prompt", self.negative_prompt)):
            _bound(len(prompt), limits.max_prompt_chars, name, unit=" characters")
        for name, side in (("width_px", self.width_px), ("height_px", self.height_px)):
            if side is not None:
                _require(side >= limits.min_side_px, name, side, f"at least {limits.min_side_px}")
                _bound(side, limits.max_side_px, name)
        if self.width_px is not None and self.height_px is not None:
            _bound(self.width_px * self.height_px, limits.max_area_px, "width_px * height_px")
        if self.guidance is not None:
            _bound(self.guidance, limits.max_guidance, "guidance")


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise InvalidRequestError(f"{name} is {value}; allowed: {allowed}", field=name)


def _bound(value: float, limit: float, name: str, *, unit: str = "") -> None:
    if value > limit:
        raise LimitExceededError(
            f"{name} is {value}{unit}; at most {limit}{unit} is allowed", field=name, limit=limit
        )
