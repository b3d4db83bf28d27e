"""Picture sizes: what a client may write, and the nearest that a model can draw."""

from __future__ import annotations

import math
from typing import TypeAlias

from server.config import LimitsConfig
from server.errors import UnprocessableError
from server.messages import ModelInfo

Size: TypeAlias = tuple[int, int]
"""(width, height) in pixels."""


def allowed_size(text: str | None, model: ModelInfo, limits: LimitsConfig) -> Size | None:
    """The size that ``text`` (``auto`` or WIDTHxHEIGHT) means; None for ``auto``.

    Raises:
        UnprocessableError: off the model's grid or out of its bounds; names the nearest allowed.
    """
    if text is None or text == "auto":
        return None
    width_px, height_px = (int(side) for side in text.split("x"))
    nearest = nearest_size((width_px, height_px), model, limits)
    if (width_px, height_px) != nearest:
        raise UnprocessableError(
            f"size {text} is not allowed for {model.id}: sides are multiples of"
            f" {model.size_multiple_px} from {model.min_px} to {_longest(model, limits)},"
            f" of at most {limits.max_area_px} pixels in all;"
            f" the nearest allowed is {text_of(nearest)}",
            field="size",
        )
    return width_px, height_px


def fitted_size(size: Size, model: ModelInfo, limits: LimitsConfig) -> Size:
    """The size on the grid for a picture of ``size``: its own, scaled only where bounds ask it."""
    width_px, height_px = size
    longest = _longest(model, limits)
    down = min(
        1.0,
        longest / max(size),
        math.sqrt(limits.max_area_px / (width_px * height_px)),
    )
    scale = max(down, min(model.min_px / min(size), longest / max(size)))
    return nearest_size((round(width_px * scale), round(height_px * scale)), model, limits)


def nearest_size(size: Size, model: ModelInfo, limits: LimitsConfig) -> Size:
    """The size on the model's grid, within all bounds, that is nearest to ``size``."""
    longest = _longest(model, limits)
    width_px, height_px = (_nearest(side, model, longest) for side in size)
    while width_px * height_px > limits.max_area_px and max(width_px, height_px) > model.min_px:
        # The longer side gives way, a grid step at a time: the shape stays as near as it can.
        if width_px >= height_px:
            width_px -= model.size_multiple_px
        else:
            height_px -= model.size_multiple_px
    return width_px, height_px


def text_of(size: Size) -> str:
    """``size`` as OpenAI writes it."""
    return f"{size[0]}x{size[1]}"


def _nearest(side_px: int, model: ModelInfo, longest_px: int) -> int:
    step = model.size_multiple_px
    rounded = (side_px + step // 2) // step * step
    return min(max(rounded, -(-model.min_px // step) * step), longest_px)


def _longest(model: ModelInfo, limits: LimitsConfig) -> int:
    step = model.size_multiple_px
    return min(model.max_px, limits.max_side_px) // step * step
