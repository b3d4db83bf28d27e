"""A plan with one segment of one small function, opened on the fake of TensorRT."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from engine.compile.manifest import PlanManifest, SegmentSpec, TensorSpec
from engine.compile.tensorrt_profile import Profile, Range
from engine.runtime.base import Graph
from engine.runtime.tensorrt import TensorRtRuntime
from tests.unit.tensorrt_fake import ICudaEngine, install, target

PROFILE = Profile(
    batch=Range.of(1, 2, 8),
    height=Range.of(2, 4, 8),
    width=Range.of(2, 4, 8),
    tokens=Range.of(1, 1, 1),
    rank=Range.of(0, 2, 4),
)


def spec(name: str, *shape: int | str, optional: bool = False, dtype: Any = "float32") -> Any:
    return TensorSpec(name=name, source=name, dtype=dtype, shape=shape, optional=optional)


SEGMENT = SegmentSpec(
    name="mid",
    file="engines/mid.engine",
    sha256="",
    inputs=(
        spec("x", "batch", 3, "height", "width"),
        spec("n", "batch", dtype="int64"),
        spec("tap.y", "batch", 3, "height", "width", optional=True),
    ),
    outputs=(spec("y", "batch", 3, "height", "width"), spec("sum", "batch")),
    adapters_file="engines/mid.adapters.engine",
    factors=tuple(
        spec(f"lora.{site}.{kind}", "batch", *shape, optional=True)
        for site in ("a", "b")
        for kind, shape in (("down", ("rank", 3)), ("up", (3, "rank")))
    ),
)


def compute(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the segment's engines do."""
    x = feeds["x"]
    y = 2 * x + feeds["n"].view(-1, 1, 1, 1)
    if "tap.y" in feeds:
        y = y + feeds["tap.y"]
    for site in ("a", "b"):
        if f"lora.{site}.down" in feeds:
            product = feeds[f"lora.{site}.up"] @ (feeds[f"lora.{site}.down"] @ x.flatten(2))
            y = y + product.view_as(y)
    return {"y": y, "sum": y.sum((1, 2, 3))}


def feeds_of(batch: int = 2, side: int = 4, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(batch, 3, side, side, generator=generator),
        "n": torch.randint(9, (batch,), generator=generator),
    }


def factors_of(site: str, batch: int = 2, rank: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(ord(site))
    return {
        f"lora.{site}.down": torch.randn(batch, rank, 3, generator=generator),
        f"lora.{site}.up": torch.randn(batch, 3, rank, generator=generator),
    }


class Bench:
    """A plan with one segment, opened on the fake."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        (folder / "engines").mkdir()
        (folder / SEGMENT.file).write_bytes(b"plain")
        (folder / "engines/mid.adapters.engine").write_bytes(b"adapters")
        self.errors: deque[str] = deque()
        self.engines: dict[bytes, ICudaEngine] = {
            b"plain": ICudaEngine(SEGMENT, compute, self.errors, profile=PROFILE),
            b"adapters": ICudaEngine(SEGMENT, compute, self.errors, profile=PROFILE, adapted=True),
        }
        install(monkeypatch, self.engines, self.errors)

    def runtime(self, recordings: int = 4) -> TensorRtRuntime:
        return TensorRtRuntime(recordings=recordings)

    def open(self, recordings: int = 4, segment: SegmentSpec = SEGMENT) -> Graph:
        return self.runtime(recordings).open(self.folder, manifest(), segment)


def manifest(**changes: Any) -> PlanManifest:
    fields = {"backend": "tensorrt", "target": target(PROFILE)}
    return cast(PlanManifest, SimpleNamespace(**{**fields, **changes}))
