"""Models that come, go and change under traffic. No request may notice anything but time."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from engine.errors import CheckpointError, InvalidRequestError
from engine.runtime import Runtime, choices
from server.config import ModelConfig, ServeConfig
from server.errors import ConflictError
from server.messages import Drawn, Failed, Stepped, WorkerEvent
from server.worker_core import WorkerCore
from tests.serving import a_task, collect, settings_for
from tests.tiny import write_checkpoint

Open = Callable[..., WorkerCore]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``one``, ``two`` and ``three``: the same family, other weights."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "two", "three")):
        write_checkpoint("text", root / name, seed=seed)
    return root


def model(folder: Path, **options: Any) -> ModelConfig:
    """On torch, which has nothing to compile."""
    return ModelConfig(id=folder.name, path=folder, backend="torch", **options)


@pytest.fixture
def opened(plans: Path, tmp_path: Path) -> Iterator[Open]:
    """Opens workers with models in folders, and closes them at the end."""
    workers: list[WorkerCore] = []

    def open_(*folders: Path, **worker: Any) -> WorkerCore:
        config = ServeConfig.model_validate(
            {"models": [model(folder) for folder in folders], "workers": worker}
        )
        workers.append(WorkerCore(config, settings_for(plans, tmp_path)))
        workers[-1].open()
        return workers[-1]

    yield open_
    for opened_worker in workers:
        opened_worker.close(0.0)


def count(worker: WorkerCore, name: str, model: str) -> float:
    line = f'{name}{{model="{model}"}} '
    text = worker.metrics_text().decode().splitlines()
    return next((float(found.removeprefix(line)) for found in text if found.startswith(line)), 0.0)


async def draw(worker: WorkerCore, model: str, **request: Any) -> Drawn:
    [*_, last] = await collect(worker.draw(a_task(model=model, **request)))
    assert isinstance(last, Drawn), last
    return last


async def stepping(worker: WorkerCore, model: str) -> AsyncGenerator[WorkerEvent, None]:
    """A long drawing whose first step is done."""
    events = worker.draw(a_task(model=model, steps=60, listening=True))
    async for event in events:
        if isinstance(event, Stepped):
            break
    return events


def test_models_that_do_not_fit_together_take_turns(opened: Open, checkpoints: Path) -> None:
    worker = opened(checkpoints / "one", checkpoints / "two", memory_budget_bytes=1)
    assert set(worker.report().rates) == {"one"}  # of those that were tried, the default stayed
    assert [info.id for info in worker.report().models] == ["one", "two"]
    assert count(worker, "darkroom_model_loads_total", "two") == 1

    async def scenario() -> list[Drawn]:
        names = ["one", "two", "one", "two", "two"]
        return await asyncio.gather(*(draw(worker, name) for name in names))

    pictures = asyncio.run(scenario())
    assert [picture.model for picture in pictures] == ["one", "two", "one", "two", "two"]
    assert pictures[0].data == pictures[2].data != pictures[1].data
    loads = count(worker, "darkroom_model_loads_total", "two")
    assert loads == 2  # three requests waited for one opening
    assert count(worker, "darkroom_model_unloads_total", "two") >= 1
    waited = [picture.timings.queue_s for picture in pictures]
    assert min(waited[1], waited[3], waited[4]) > max(waited[0], waited[2])


def test_models_that_fit_stay_open(opened: Open, checkpoints: Path) -> None:
    worker = opened(checkpoints / "one", checkpoints / "two")
    assert set(worker.report().rates) == {"one", "two"}
    assert count(worker, "darkroom_model_memory_bytes", "one") >= 1 << 20
    assert worker.missing == ()


def test_reloading_drops_nothing(opened: Open, checkpoints: Path, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    shutil.copytree(checkpoints / "one", folder)
    worker = opened(folder)

    async def scenario() -> None:
        before = await draw(worker, "one")
        unchanged = await asyncio.to_thread(worker.models.reload, "one")
        assert unchanged.plan_digest == before.plan_digest
        async with aclosing(await stepping(worker, "one")) as events:
            shutil.rmtree(folder)
            shutil.copytree(checkpoints / "two", folder)
            reloading = asyncio.create_task(asyncio.to_thread(worker.models.reload, "one"))
            while (after := await draw(worker, "one")).plan_digest == before.plan_digest:
                pass
            [*_, old] = [event async for event in events]
        assert isinstance(old, Drawn)
        assert old.plan_digest == before.plan_digest
        info = await reloading
        assert info.plan_digest == after.plan_digest
        assert after.data != before.data
        assert set(worker.report().rates) == {"one"}

    asyncio.run(scenario())


def test_a_reload_that_fails_changes_nothing(
    opened: Open, checkpoints: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "one"
    shutil.copytree(checkpoints / "one", folder)
    worker = opened(folder)
    before = asyncio.run(draw(worker, "one"))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"not weights")
    with pytest.raises(CheckpointError):
        worker.models.reload("one")
    assert asyncio.run(draw(worker, "one")).data == before.data


def test_models_are_added_and_removed_in_traffic(opened: Open, checkpoints: Path) -> None:
    worker = opened(checkpoints / "one")

    async def scenario() -> None:
        async with aclosing(await stepping(worker, "one")) as long:
            info = await asyncio.to_thread(worker.models.add, model(checkpoints / "two"))
            assert info.id == "two"
            assert (await draw(worker, "two")).plan_digest == info.plan_digest
            assert isinstance([event async for event in long][-1], Drawn)
        async with aclosing(await stepping(worker, "two")) as long:
            removing = asyncio.create_task(asyncio.to_thread(worker.models.remove, "two"))
            while len(worker.models.infos) == 2:
                await asyncio.sleep(0)
            [refused] = await collect(worker.draw(a_task(model="two")))
            assert isinstance(refused, Failed)
            assert isinstance(refused.error, InvalidRequestError)
            assert isinstance([event async for event in long][-1], Drawn)
            await removing
        assert set(worker.report().rates) == {"one"}
        await asyncio.to_thread(worker.models.add, model(checkpoints / "two"))
        await draw(worker, "two")

    asyncio.run(scenario())


def test_a_model_that_was_refused_changes_nothing_of_how_the_others_run(
    opened: Open, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = opened(checkpoints / "one", checkpoints / "two", memory_budget_bytes=1)
    again = ModelConfig(id="b", path=checkpoints / "one", backend="torch", compile=True)
    with pytest.raises(ConflictError, match="served as 'one'"):
        worker.models.add(again)

    def opens_another(name: str, **_: object) -> Runtime:
        raise AssertionError(f"another runtime: {name}")

    monkeypatch.setattr(choices, "open_runtime", opens_another)
    asyncio.run(draw(worker, "two"))  # closes the other
    assert set(worker.report().rates) == {"two"}
    asyncio.run(draw(worker, "one"))
    assert set(worker.report().rates) == {"one"}


def test_what_cannot_be_added_or_removed(opened: Open, checkpoints: Path, tmp_path: Path) -> None:
    worker = opened(checkpoints / "one")
    with pytest.raises(ConflictError):
        worker.models.add(model(checkpoints / "one"))
    with pytest.raises(ConflictError, match="served as 'one'"):
        worker.models.add(ModelConfig(id="again", path=checkpoints / "one", backend="torch"))
    with pytest.raises(InvalidRequestError, match="no model folder"):
        worker.models.add(model(tmp_path / "nothing"))
    with pytest.raises(InvalidRequestError, match="default"):
        worker.models.remove("one")
    with pytest.raises(InvalidRequestError, match="allowed: one"):
        worker.models.remove("two")
    assert [info.id for info in worker.models.infos] == ["one"]
