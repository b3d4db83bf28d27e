"""What tests of the server share: a tiny model configured, tasks, and pictures read back."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator
from contextlib import aclosing
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image as PilImage

from engine.types import GenerateRequest, Image
from server.config import ServeConfig
from server.messages import Drawn, Output, PictureTask
from server.settings import Settings

MODEL = "tiny"
_T = TypeVar("_T")
_ids = itertools.count()


def tiny_config(checkpoint: Path, **sections: Any) -> ServeConfig:
    """A configuration that serves ``checkpoint`` as :data:`MODEL`."""
    models = [{"id": MODEL, "path": checkpoint}]
    return ServeConfig.model_validate({"models": models, **sections})


def settings_for(plans: Path, home: Path) -> Settings:
    """Settings under ``home`` whose plans are those of the test session's store."""
    home.mkdir(exist_ok=True)
    if not (home / "plans").exists():
        (home / "plans").symlink_to(plans)
    return Settings.from_environment({"DARKROOM_HOME": str(home), "DARKROOM_THREADS": "1"})


def a_task(
    *,
    index: int = 0,
    model: str = MODEL,
    listening: bool = False,
    output: Output | None = None,
    deadline_at_s: float | None = None,
    snapshot: bytes | None = None,
    **request: Any,
) -> PictureTask:
    """A task with an id of its own; of ``request``, prompt, steps and seed have defaults."""
    values = {"prompt": "a red umbrella", "steps": 3, "seed": 1, **request}
    number = next(_ids)
    return PictureTask(
        id=f"task-{number}",
        request_id=f"request-{number}",
        tenant="tests",
        model=model,
        index=index,
        listening=listening,
        output=output or Output(),
        deadline_at_s=deadline_at_s,
        snapshot=snapshot,
        request=GenerateRequest(**values),
    )


async def collect(events: AsyncGenerator[_T, None]) -> list[_T]:
    """Everything that a generator yields."""
    async with aclosing(events):
        return [event async for event in events]


def pixels(data: bytes | Drawn) -> Image:
    """(height, width, 3) of an encoded picture."""
    encoded = data.data if isinstance(data, Drawn) else data
    with PilImage.open(BytesIO(encoded)) as opened:
        return np.asarray(opened.convert("RGB"), dtype=np.uint8)
