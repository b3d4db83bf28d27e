"""A worker with a real engine: what happens to a task between its arrival and its picture."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from engine.denoiser import Denoiser
from engine.errors import DeadlineExceededError, OutOfMemoryError
from engine.png import read_parameters
from server.content_check import CheckedPicture
from server.errors import ContentRefusedError
from server.messages import Checkpointed, Drawn, Failed, PictureTask, Started, Stepped
from server.worker_core import WorkerCore
from tests.serving import MODEL, a_task, collect, pixels, settings_for, tiny_config

NOW_S = 1_800_000_000.0
# Many steps, noise in every one, and two earlier predictions: nothing that may get lost.
HARD: dict[str, Any] = {"solver": "dpmpp_2m_sde", "steps": 12, "seed": 5, "guidance": 3.0}


def open_worker(
    checkpoint: Path, plans: Path, home: Path, name: str = "worker-0", **sections: Any
) -> WorkerCore:
    worker = WorkerCore(
        tiny_config(checkpoint, **sections),
        settings_for(plans, home),
        name=name,
        unix_s=lambda: NOW_S,
    )
    worker.open()
    return worker


Open = Callable[..., WorkerCore]


@pytest.fixture
def opened(tiny_checkpoint: Callable[[str], Path], plans: Path, tmp_path: Path) -> Iterator[Open]:
    """Opens workers, and closes them at the end."""
    workers: list[WorkerCore] = []

    def open_(name: str = "worker-0", **sections: Any) -> WorkerCore:
        workers.append(open_worker(tiny_checkpoint("text"), plans, tmp_path, name, **sections))
        return workers[-1]

    yield open_
    for worker in workers:
        worker.close(0.0)


def draw(worker: WorkerCore, *tasks: PictureTask) -> list[list[Any]]:
    """Events of tasks that run at once, by task."""

    async def all_of_them() -> list[list[Any]]:
        return await asyncio.gather(*(collect(worker.draw(task)) for task in tasks))

    return asyncio.run(all_of_them())


def picture_of(events: list[Any]) -> Drawn:
    assert isinstance(events[-1], Drawn), events[-1]
    return events[-1]


def test_another_worker_finishes_the_same_picture(opened: Open) -> None:
    """Bit-equal, from every snapshot on the way, though the solver draws noise at each step."""
    eager = {"snapshot_every_s": 1e-9}
    first, second = opened("first", workers=eager), opened("second", workers=eager)
    task = a_task(**HARD)
    [events] = draw(first, task)
    whole = picture_of(events)
    snapshots = [event for event in events if isinstance(event, Checkpointed)]
    assert len(snapshots) >= 2
    for snapshot in (snapshots[0], snapshots[-1]):
        [resumed] = draw(second, replace(task, snapshot=snapshot.snapshot, listening=True))
        picture = picture_of(resumed)
        assert picture.data == whole.data
        assert picture.worker == "second"
        steps = [event.step for event in resumed if isinstance(event, Stepped)]
        assert steps == list(range(snapshot.step + 1, 13))


def test_a_file_names_the_layer_and_the_rescale_that_drew_it(opened: Open) -> None:
    worker = opened()
    [info] = worker.models.infos
    assert info.max_clip_skip == 1  # its text encoder has two layers
    asked: dict[str, Any] = {"guidance": 3.0, "steps": 3}
    files = {}
    for clip_skip, rescale in ((0, 0.0), (1, 0.0), (0, 0.7), (1, 0.7)):
        task = a_task(clip_skip=clip_skip, guidance_rescale=rescale, **asked)
        [events] = draw(worker, task)
        picture = picture_of(events)
        written = read_parameters(BytesIO(picture.data))
        assert written is not None
        assert written.settings.get("Clip skip") == ("2" if clip_skip else None)
        assert written.settings.get("Guidance rescale") == ("0.7" if rescale else None)
        files[clip_skip, rescale] = pixels(picture.data).tobytes()
    assert len(set(files.values())) == 4


def test_a_snapshot_keeps_a_seed_that_the_worker_drew(opened: Open) -> None:
    worker = opened(workers={"snapshot_every_s": 1e-9})
    task = a_task(**{**HARD, "seed": None})
    [events] = draw(worker, task)
    snapshot = next(event for event in events if isinstance(event, Checkpointed))
    [resumed] = draw(worker, replace(task, snapshot=snapshot.snapshot))
    assert picture_of(resumed).seed == picture_of(events).seed
    assert picture_of(resumed).data == picture_of(events).data


def test_what_cannot_be_resumed_starts_over(opened: Open) -> None:
    """A snapshot that is broken, or of another table, costs time and no request."""
    worker = opened(workers={"snapshot_every_s": 1e-9})
    task = a_task(**HARD)
    [events], [other] = draw(worker, task), draw(worker, a_task(**{**HARD, "steps": 9}))
    foreign = next(event for event in other if isinstance(event, Checkpointed))
    for data in (b"not a snapshot", foreign.snapshot[:-1], foreign.snapshot):
        [again] = draw(worker, replace(task, snapshot=data, listening=True))
        assert picture_of(again).data == picture_of(events).data
        assert next(event.step for event in again if isinstance(event, Stepped)) == 1


def test_snapshots_come_as_often_as_their_compute_is_worth(opened: Open) -> None:
    worker = opened(workers={"snapshot_every_s": 3600.0})
    [events] = draw(worker, a_task(**HARD))
    assert [type(event) for event in events] == [Started, Drawn]


def test_a_cancelled_task_leaves_the_step_loop_and_is_measured(opened: Open) -> None:
    """A later task is taken in after the cancel: when it is drawn, the other one has left."""
    worker = opened()

    async def leave() -> None:
        async with aclosing(worker.draw(a_task(steps=150, listening=True))) as events:
            async for event in events:
                if isinstance(event, Stepped):
                    break

    asyncio.run(leave())
    [events] = draw(worker, a_task())
    picture_of(events)
    assert "darkroom_cancel_seconds_count 1.0" in worker.metrics_text().decode()
    assert worker.report().live == ()


def test_a_deadline_that_has_passed_draws_nothing(opened: Open) -> None:
    worker = opened()
    [events] = draw(worker, a_task(deadline_at_s=NOW_S - 1.0))
    assert [type(event) for event in events] == [Failed]
    assert isinstance(events[0].error, DeadlineExceededError)
    [events] = draw(worker, a_task(deadline_at_s=NOW_S + 600.0))
    picture_of(events)


def test_more_than_fit_wait_and_all_are_drawn(opened: Open) -> None:
    worker = opened(workers={"max_live": 2})
    tasks = [a_task(seed=i) for i in range(7)]
    assert [picture_of(events).seed for events in draw(worker, *tasks)] == list(range(7))
    [events] = draw(worker, a_task(steps=9999))
    assert isinstance(events[0], Failed)


def test_cancelled_while_it_waits_it_leaves_nothing(opened: Open) -> None:
    worker = opened(workers={"max_live": 1})

    async def scenario() -> None:
        async with aclosing(worker.draw(a_task(steps=150, listening=True))) as first:
            assert isinstance(await anext(first), Started)
            waiting = asyncio.create_task(collect(worker.draw(a_task())))
            await asyncio.sleep(0)
            assert len(worker.report().live) == 2
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            assert len(worker.report().live) == 1
        assert worker.report().live == ()
        picture_of(await collect(worker.draw(a_task())))

    asyncio.run(scenario())


def test_steps_left_fall_as_the_report_says(opened: Open) -> None:
    worker = opened()

    async def scenario() -> AsyncIterator[tuple[int, float]]:
        task = a_task(steps=10, guidance=2.0, listening=True)
        async with aclosing(worker.draw(task)) as events:
            async for event in events:
                if isinstance(event, Stepped) and event.step < 10:
                    [live] = worker.report().live
                    assert live.width == 2.0
                    yield event.step, live.steps_left

    async def read() -> list[tuple[int, float]]:
        return [pair async for pair in scenario()]

    seen = asyncio.run(read())
    # News comes after the fact: at least as much is done as the event says.
    assert all(left <= 2 * (10 - step) for step, left in seen)
    assert [left for _, left in seen] == sorted((left for _, left in seen), reverse=True)


def test_metrics_count_what_happened(opened: Open) -> None:
    worker = opened()
    draw(worker, a_task(steps=4), a_task(steps=4, solver="magic"), a_task(model="made-up"))
    worker.close(60.0)  # the last tick is counted after its picture has left
    text = worker.metrics_text().decode()

    def value(line: str) -> float:
        found = re.search(rf"^{re.escape(line)} (\S+)$", text, re.MULTILINE)
        assert found is not None, line
        return float(found[1])

    assert value(f'darkroom_pictures_total{{model="{MODEL}"}}') == 1
    assert value(f'darkroom_steps_total{{model="{MODEL}"}}') == 4
    assert value(f'darkroom_tick_seconds_count{{model="{MODEL}"}}') == 4
    assert value(f'darkroom_phase_seconds_count{{model="{MODEL}",phase="denoise"}}') == 1
    assert value(f'darkroom_failures_total{{code="invalid_value",model="{MODEL}"}}') == 1
    assert value('darkroom_failures_total{code="invalid_value",model="unknown"}') == 1
    assert value("darkroom_live_tasks") == value("darkroom_live_lanes") == 0
    assert value("darkroom_worker_resident_memory_bytes") > 1 << 20
    assert "darkroom_cache_lookups_total" in text
    assert "made-up" not in text


def test_what_does_not_fit_into_memory_is_split_and_counted(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody notices: the same pictures, in smaller batches; B* follows."""
    worker = opened()
    tasks = [a_task(seed=i, guidance=3.0) for i in range(3)]
    fitting = [pixels(picture_of(events)) for events in draw(worker, *tasks)]
    roomy = worker.report().rates[MODEL].saturation_steps
    walk = Denoiser.__call__

    def one_row_only(self: Denoiser, sample: Tensor, *rest: Any) -> Tensor:
        if len(sample) > 1:
            raise OutOfMemoryError("the device is full")
        return walk(self, sample, *rest)

    monkeypatch.setattr(Denoiser, "__call__", one_row_only)
    again = [replace(task, id=f"{task.id}-again") for task in tasks]
    split = [pixels(picture_of(events)) for events in draw(worker, *again)]
    for ours, whole in zip(split, fitting, strict=True):
        np.testing.assert_allclose(ours.astype(int), whole.astype(int), atol=1)
    assert 1 == worker.report().rates[MODEL].saturation_steps <= roomy
    text = worker.metrics_text().decode()
    assert re.search(rf'^darkroom_out_of_memory_splits_total{{model="{MODEL}"}} [1-9]', text, re.M)


# ---------------------------------------------------------------------- the content check

looked_at: list[CheckedPicture] = []


def refuse_umbrellas(picture: CheckedPicture) -> str | None:
    looked_at.append(picture)
    return "no umbrellas here" if "umbrella" in picture.prompt else None


def fall_over(picture: CheckedPicture) -> str | None:
    raise RuntimeError("the classifier is out of memory")


def test_a_content_check_sees_every_picture_before_anybody_else(opened: Open) -> None:
    looked_at.clear()
    worker = opened(content={"check": f"{__name__}:refuse_umbrellas"})
    asked: dict[str, Any] = {"listening": True, "preview_every": 1}
    refused, let_go = draw(worker, a_task(**asked), a_task(prompt="a cat", **asked))
    assert isinstance(refused[-1], Failed)
    assert isinstance(refused[-1].error, ContentRefusedError)
    assert "no umbrellas here" in str(refused[-1].error)
    picture = picture_of(let_go)
    assert not any(e.preview for e in refused + let_go if isinstance(e, Stepped))
    [seen] = [item for item in looked_at if item.prompt == "a cat"]
    assert np.array_equal(seen.image, pixels(picture))
    assert (seen.tenant, seen.model) == ("tests", MODEL)


def test_a_content_check_that_fails_holds_the_picture_back(opened: Open) -> None:
    worker = opened(content={"check": f"{__name__}:fall_over"})
    [events] = draw(worker, a_task())
    assert isinstance(events[-1], Failed)
    assert isinstance(events[-1].error, ContentRefusedError)
    assert "memory" not in str(events[-1].error)
