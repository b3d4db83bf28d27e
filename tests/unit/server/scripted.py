"""A dispatcher that follows a script: the HTTP stack without an engine."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image as Pillow

from engine.errors import CheckpointError, DarkroomError
from engine.ports import NoiseCache
from engine.types import Timings
from server import request_log
from server.config import ServeConfig
from server.dispatch import Dispatcher
from server.messages import (
    CacheAnswer,
    CacheOrder,
    Drawn,
    Failed,
    Load,
    ModelChange,
    ModelInfo,
    PictureEvent,
    PictureTask,
    Queued,
    Readiness,
    Started,
    Stepped,
)
from server.request_log import Level
from server.services import Services, open_services
from server.worker_caches import carry_out

MODEL = ModelInfo(
    id="tintype",
    family="sd",
    native_px=64,
    size_multiple_px=8,
    min_px=32,
    max_px=128,
    guidance_default=4.0,
    guidable=True,
    solver_default="dpmpp_2m",
    schedule_default="trailing",
    precision="fp32",
    backend="onnxruntime",
    plan_digest="d" * 64,
    created_s=1_700_000_000,
    scheduler_class="DPMSolverMultistepScheduler",
    checkpoint="c" * 64,
    max_clip_skip=3,
)
TIMINGS = Timings(queue_s=0.001, encode_s=0.002, denoise_s=0.3, decode_s=0.04)


def picture_file(format: str = "PNG", size: tuple[int, int] = (64, 64)) -> bytes:
    buffer = io.BytesIO()
    Pillow.new("RGB", size, (200, 40, 40)).save(buffer, format)
    return buffer.getvalue()


@dataclass
class ScriptedDispatcher:
    """Draws grey pictures; told otherwise, refuses, fails, or waits for ever.

    Attributes:
        room_steps: pictures of so many steps are never refused.
        offered: the steps of everything that it was asked to draw.
        tasks: what it did not refuse.
        hangs_after: how many pictures it finishes before it waits for ever.
        caches: the noise caches of its workers by name; None: the worker is silent.
        closed: how many generators have been closed.
    """

    refusal: Exception | None = None
    room_steps: int = 0
    offered: list[int] = field(default_factory=list)
    failures: dict[int, DarkroomError] = field(default_factory=dict)
    hangs: bool = False
    hangs_after: int | None = None
    ready: Readiness = field(default_factory=lambda: Readiness(ready=True, workers=1))
    pages: Sequence[tuple[str, bytes]] = ()
    caches: dict[str, NoiseCache | None] = field(default_factory=dict)
    added: list[ModelInfo] = field(default_factory=list)
    tasks: list[PictureTask] = field(default_factory=list)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    hanging: asyncio.Event = field(default_factory=asyncio.Event)
    closed: int = 0

    def forget(self) -> None:
        """As new."""
        for name, value in vars(type(self)()).items():
            setattr(self, name, value)

    def draw(self, tasks: Sequence[PictureTask]) -> AsyncGenerator[PictureEvent, None]:
        return self._draw(tasks)

    async def _draw(self, tasks: Sequence[PictureTask]) -> AsyncGenerator[PictureEvent, None]:
        self.offered.append(tasks[0].request.steps)
        if self.refusal is not None and tasks[0].request.steps > self.room_steps:
            raise self.refusal
        self.tasks += tasks
        try:
            for task in tasks:
                yield Queued(task.index, 1, 40)
                self.started.set()
            if self.hangs:
                await asyncio.Event().wait()
            for task in tasks:
                if task.index == self.hangs_after:
                    self.hanging.set()
                    await asyncio.Event().wait()
                async for event in self._one(task):
                    yield event
        finally:
            self.closed += 1

    async def _one(self, task: PictureTask) -> AsyncGenerator[PictureEvent, None]:
        yield Started(task.index, "worker-0")
        if task.index in self.failures:
            yield Failed(task.index, self.failures[task.index])
            return
        request = task.request
        for step in range(1, request.steps):
            every = request.preview_every
            if task.listening:
                preview = picture_file(size=(8, 8)) if every and step % every == 0 else None
                yield Stepped(task.index, step, request.steps, preview)
        if request.image is not None:
            height_px, width_px = request.image.shape[:2]
        else:
            width_px, height_px = request.width_px or 64, request.height_px or 64
        assert request.seed is not None
        yield Drawn(
            index=task.index,
            data=picture_file(task.output.format.upper(), (width_px, height_px)),
            format=task.output.format,
            width_px=width_px,
            height_px=height_px,
            seed=request.seed,
            solver=request.solver or MODEL.solver_default,
            schedule=request.schedule or MODEL.schedule_default,
            steps=request.steps,
            guidance=MODEL.guidance_default if request.guidance is None else request.guidance,
            model=task.model,
            plan_digest=MODEL.plan_digest,
            worker="worker-0",
            approximations={"precision": "int8"},
            timings=TIMINGS,
        )

    async def models(self) -> Sequence[ModelInfo]:
        return (MODEL, *self.added)

    async def change_model(self, change: ModelChange) -> ModelInfo | None:
        name = change.model.id
        if change.action == "add":
            if change.model.path == Path("/broken"):
                raise CheckpointError("model_index.json: not there")
            self.added.append(replace(MODEL, id=name, plan_digest="e" * 64))
        if change.action == "remove":
            self.added = [model for model in self.added if model.id != name]
            return None
        return next(model for model in (MODEL, *self.added) if model.id == name)

    async def ask_caches(self, order: CacheOrder) -> Sequence[CacheAnswer]:
        return [
            CacheAnswer(worker=name, shares=None if cache is None else carry_out(order, cache))
            for name, cache in self.caches.items()
        ]

    async def set_log_level(self, level: Level) -> None:
        request_log.set_level(level)

    async def readiness(self) -> Readiness:
        return self.ready

    async def load(self) -> Load:
        return Load()

    async def metrics(self) -> Sequence[tuple[str, bytes]]:
        return self.pages

    async def close(self, timeout_s: float) -> None:
        pass


def services_of(
    dispatcher: Dispatcher | None = None, config: ServeConfig | None = None
) -> Services:
    return open_services(config or ServeConfig(), dispatcher or ScriptedDispatcher())
