"""Changes of models on one worker and on all: what is made, caught up with, and undone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any, cast

import pytest

from engine.errors import BackendUnavailableError, CheckpointError, InvalidRequestError
from engine.types import CacheShare
from server.config import ModelConfig
from server.errors import ConflictError
from server.messages import CacheOrder, ModelChange, ModelInfo, PictureTask, WorkerEvent
from server.model_changes import TRY_AGAIN_S, ModelChanges
from server.model_rollout import change_everywhere
from server.remote import ReplicaLostError
from server.switched import NOTHING, Switched
from tests.fake_clock import FakeClock
from tests.unit.server.test_admission import model


class Models:
    """The models of a worker, without weights: ``broken`` ones cannot be opened."""

    def __init__(self) -> None:
        self._infos = {"m": model("m")}
        self.broken: set[str] = set()
        self.calls: list[str] = []

    @property
    def infos(self) -> tuple[ModelInfo, ...]:
        return tuple(self._infos.values())

    def add(self, configured: ModelConfig) -> ModelInfo:
        self.calls.append(f"add {configured.id}")
        if configured.id in self._infos:
            raise ConflictError("served already", field="id")
        if configured.id in self.broken:
            raise CheckpointError("model_index.json: not there")
        return self._infos.setdefault(configured.id, model(configured.id))

    def reload(self, name: str) -> ModelInfo:
        self.calls.append(f"reload {name}")
        if name not in self._infos:
            raise InvalidRequestError("unknown model")
        return self._infos[name]

    def remove(self, name: str) -> None:
        self.calls.append(f"remove {name}")
        if name not in self._infos:
            raise InvalidRequestError("unknown model")
        del self._infos[name]


class OneWorker:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.models = Models()
        self.changes = ModelChanges(cast(Any, self.models), ["m"], self.clock)
        self.dead = False

    def hear(self, *told: ModelChange) -> None:
        switched = NOTHING
        for one in told:
            switched = switched.merged(only(one), self.clock.now_s())
        if self.changes.hear(switched):
            self.changes.catch_up()

    def names(self) -> set[str]:
        return {info.id for info in self.models.infos}


class AllWorkers:
    """Implements :class:`server.remote.WorkersClient`, as far as models go."""

    def __init__(self, count: int) -> None:
        self.of = {f"w{i}": OneWorker() for i in range(count)}

    async def change_model(self, worker: str, change: ModelChange) -> ModelInfo | None:
        if self.of[worker].dead:
            raise ReplicaLostError("gone")
        return self.of[worker].changes.apply(change)

    def draw(self, worker: str, task: PictureTask) -> AsyncGenerator[WorkerEvent, None]:
        raise NotImplementedError

    async def ask_cache(self, worker: str, order: CacheOrder) -> tuple[CacheShare, ...]:
        raise NotImplementedError

    async def ping(self, worker: str) -> None:
        raise NotImplementedError

    async def metrics(self, workers: Sequence[str]) -> Sequence[tuple[str, bytes]]:
        raise NotImplementedError


def change(action: str, name: str = "new", after_s: float = 0.0) -> ModelChange:
    at_s = FakeClock().now_s() + after_s
    return ModelChange(action=action, model=ModelConfig(id=name), at_s=at_s)  # type: ignore[arg-type]


def only(one: ModelChange) -> Switched:
    return NOTHING.with_model(one)


# ---------------------------------------------------------------- one worker


def test_a_new_worker_makes_what_it_missed_once() -> None:
    worker = OneWorker()
    worker.hear(change("add"), change("reload", "m"), change("remove", "other"))
    worker.hear(change("add"))
    assert sorted(worker.models.calls) == ["add new", "reload m"]
    assert worker.changes.switched.added("new")


def test_what_a_worker_was_asked_for_itself_is_not_made_again() -> None:
    worker = OneWorker()
    worker.changes.apply(change("add"))
    worker.hear(change("add"))
    assert worker.models.calls == ["add new"]
    worker.hear(change("add", after_s=1.0))  # reloaded while it was cut off
    assert worker.models.calls == ["add new", "reload new"]
    worker.hear(change("remove", after_s=2.0))
    assert worker.names() == {"m"}


def test_what_cannot_be_caught_up_with_is_tried_again_later() -> None:
    worker = OneWorker()
    worker.models.broken.add("new")
    worker.hear(change("add"))
    worker.models.broken.clear()
    worker.hear(change("add"))
    assert worker.models.calls == ["add new"]
    worker.clock.tick(TRY_AGAIN_S)
    worker.hear(change("add"))
    assert worker.names() == {"m", "new"}


def test_a_configured_model_stays_whatever_was_removed_before() -> None:
    worker = OneWorker()
    worker.hear(change("remove", "m"))
    assert worker.names() == {"m"}


def test_an_addition_whose_gateway_died_does_not_stand_in_the_way_of_the_next() -> None:
    worker = OneWorker()
    worker.changes.apply(change("add"))
    worker.changes.apply(change("add", after_s=1.0))
    assert worker.models.calls == ["add new", "remove new", "add new"]
    worker.hear(change("add", after_s=1.0))
    with pytest.raises(ConflictError):  # now it counts
        worker.changes.apply(change("add", after_s=2.0))


# ---------------------------------------------------------------- all workers


def make(workers: AllWorkers, change: ModelChange) -> ModelInfo | None:
    return asyncio.run(change_everywhere(workers, tuple(workers.of), change))


def test_an_addition_that_fails_on_one_worker_is_undone_on_the_others_and_told() -> None:
    workers = AllWorkers(3)
    workers.of["w1"].models.broken.add("new")
    with pytest.raises(BackendUnavailableError, match=r"w1.*model_index\.json.*undone"):
        make(workers, change("add"))
    assert [worker.names() for worker in workers.of.values()] == [{"m"}] * 3


def test_what_no_worker_can_do_is_told_as_they_say_it() -> None:
    workers = AllWorkers(2)
    for worker in workers.of.values():
        worker.models.broken.add("new")
    with pytest.raises(CheckpointError):
        make(workers, change("add"))


def test_a_worker_that_dies_meanwhile_does_not_fail_a_change() -> None:
    workers = AllWorkers(2)
    workers.of["w0"].dead = True
    info = make(workers, change("add"))
    assert info is not None
    assert info.id == "new"
    workers.of["w1"].dead = True
    with pytest.raises(ReplicaLostError):
        make(workers, change("add", "newer"))


def test_a_removal_counts_where_one_worker_has_yet_to_take_the_model_on() -> None:
    workers = AllWorkers(2)
    make(workers, change("add"))
    late = workers.of["w1"] = OneWorker()
    late.changes.hear(only(change("add")))  # and has not caught up
    assert make(workers, change("remove", after_s=1.0)) is None
    late.hear(change("remove", after_s=1.0))
    assert [worker.names() for worker in workers.of.values()] == [{"m"}] * 2
