"""A model that is added at run time outlives workers and the router, with plain calls.

The same with real processes and kill -9 is in ``tests/faults``.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from server import request_log
from server.config import ModelConfig
from server.errors import ConflictError
from server.messages import Drawn, ModelChange
from server.ray_dispatch import RayDispatcher
from server.worker_core import WorkerCore
from tests.routed import REPORT_S, WorkerProcesses, routed
from tests.serving import MODEL, a_task, collect, settings_for, tiny_config

ADDED = "added"
PATIENCE_S = 60.0


@pytest.fixture
def other(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> ModelConfig:
    """A model like the configured one, with other weights."""
    folder = tmp_path / ADDED
    shutil.copytree(tiny_checkpoint("text"), folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: 0.9 * value for name, value in load_file(weights).items()}, weights)
    return ModelConfig(id=ADDED, path=folder)


async def workers_that_draw(dispatcher: RayDispatcher, count: int) -> set[str]:
    """Who draws so many pictures of the added model, asked for at once."""
    tasks = [a_task(index=i, seed=i, model=ADDED, steps=20) for i in range(count)]
    events = await collect(dispatcher.draw(tasks))
    pictures = [event for event in events if isinstance(event, Drawn)]
    assert len(pictures) == count
    return {picture.worker for picture in pictures}


async def until_served_by(workers: WorkerProcesses, *names: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        for name in names:
            while ADDED not in {info.id for info in workers.workers[name].models.infos}:
                await asyncio.sleep(REPORT_S)


def test_an_added_model_outlives_workers_and_the_router(
    tiny_checkpoint: Callable[[str], Path], plans: Path, tmp_path: Path, other: ModelConfig
) -> None:
    config = tiny_config(tiny_checkpoint("text"), workers={"max_live": 2})
    settings = settings_for(plans, tmp_path / "home")

    async def scenario() -> None:
        async with routed(config, settings, workers=2) as (dispatcher, router, workers):
            info = await dispatcher.change_model(ModelChange(action="add", model=other))
            assert info is not None
            assert [model.id for model in await dispatcher.models()] == [MODEL, ADDED]
            with pytest.raises(ConflictError):
                await dispatcher.change_model(ModelChange(action="add", model=other))
            assert await workers_that_draw(dispatcher, 8) == {"worker-0", "worker-1"}

            workers.kill("worker-0")
            await router.restart()
            replacement = WorkerCore(config, settings, name="worker-2")
            await asyncio.to_thread(replacement.open)
            workers.join(replacement)
            assert await workers_that_draw(dispatcher, 4) <= {"worker-1", "worker-2"}
            await until_served_by(workers, "worker-2")
            assert await workers_that_draw(dispatcher, 8) == {"worker-1", "worker-2"}

            await dispatcher.change_model(ModelChange(action="remove", model=other))
            assert [model.id for model in await dispatcher.models()] == [MODEL]

    asyncio.run(scenario())


def test_a_level_that_one_gateway_is_told_reaches_router_and_workers(
    tiny_checkpoint: Callable[[str], Path], plans: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_checkpoint("text"))
    before = request_log.level()

    async def scenario() -> None:
        async with routed(config, settings_for(plans, tmp_path / "home")) as (gateway, _, workers):
            await gateway.set_log_level("error")
            async with asyncio.timeout(PATIENCE_S):
                while (heard := workers.workers["worker-0"].changes.switched.log) is None:
                    await asyncio.sleep(REPORT_S)
            assert heard.level == "error"

    try:
        asyncio.run(scenario())
    finally:
        request_log.set_level(before)
