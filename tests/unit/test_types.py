"""Requests judge themselves at construction, and against limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.errors import InvalidRequestError, LimitExceededError
from engine.trajectory import guided_rows
from engine.types import GenerateRequest, Limits

PICTURE = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("steps", {"steps": 0}),
        ("strength", {"strength": 0.0}),
        ("strength", {"strength": 1.5}),
        ("guidance", {"guidance": float("nan")}),
        ("guidance_interval", {"guidance_interval": (0.8, 0.2)}),
        ("eta", {"eta": 2.0}),
        ("seed", {"seed": -1}),
        ("preview_every", {"preview_every": -1}),
        ("deadline_s", {"deadline_s": 0.0}),
        ("mask", {"mask": PICTURE[..., 0]}),
        ("mask", {"image": PICTURE, "mask": PICTURE}),
        ("image", {"image": PICTURE[..., 0]}),
    ],
)
def test_what_can_never_work_is_refused_by_field(field: str, values: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        GenerateRequest(prompt="a cat", **values)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "limit", "values"),
    [
        ("steps", 150, {"steps": 10_000}),
        ("prompt", 4000, {"prompt": "a" * 5000}),
        ("width_px", 2048, {"width_px": 4096}),
        ("guidance", 50.0, {"guidance": 51.0}),
        ("timesteps", 150, {"timesteps": tuple(range(200, 0, -1))}),
    ],
)
def test_bounds_are_named(field: str, limit: float, values: dict[str, Any]) -> None:
    request = GenerateRequest(**{"prompt": "a cat", **values})
    with pytest.raises(LimitExceededError, match=str(limit)) as caught:
        request.check(Limits())
    assert (caught.value.field, caught.value.limit) == (field, limit)


def test_guidance_acts_only_above_one_and_inside_its_interval() -> None:
    assert guided_rows(4, 7.5, (0.0, 1.0), can_guide=True) == (True,) * 4
    assert guided_rows(4, 1.0, (0.0, 1.0), can_guide=True) == (False,) * 4
    assert guided_rows(4, 7.5, (0.0, 1.0), can_guide=False) == (False,) * 4
    assert guided_rows(4, 7.5, (0.25, 0.75), can_guide=True) == (False, True, True, False)
