"""Jobs that survive: gateways that die, stores that go away, dispatchers that refuse."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from engine.errors import ClosedError, OverloadedError
from server.config import JobsConfig
from server.errors import JobsUnavailableError
from server.jobs import drive
from server.jobs.drive import MAX_ATTEMPTS
from server.jobs.memory import MemoryJobStore
from server.jobs.records import Change, Job, JobSpec, JobState
from server.jobs.runner import JobRunner
from server.jobs.store import Bounds, IdempotencyKey
from tests.contracts.job_stores import job
from tests.unit.server.scripted import ScriptedDispatcher

pytestmark = pytest.mark.anyio


class Now:
    def __init__(self) -> None:
        self.time_s = 1000.0

    def __call__(self) -> float:
        return self.time_s


class Shaky(MemoryJobStore):
    """A store that can go away, come back empty, and counts what is written."""

    def __init__(self, now: Now) -> None:
        super().__init__(Bounds(ttl_s=100.0), now_s=now)
        self.away = False
        self.writes: list[Change] = []

    async def write(self, job: Job, change: Change) -> bool:
        self._check()
        self.writes.append(change)
        return await super().write(job, change)

    async def job(self, job_id: str) -> Job | None:
        self._check()
        return await super().job(job_id)

    async def events(self, job_id: str, after: int, limit: int = 256) -> Any:
        self._check()
        return await super().events(job_id, after, limit)

    async def beat(self, owner: str, alive_s: float) -> None:
        self._check()
        await super().beat(owner, alive_s)

    async def adopt(self, owner: str, limit: int, running: Collection[str] | None = None) -> Any:
        self._check()
        return await super().adopt(owner, limit, running)

    def lose_everything(self) -> None:
        self._jobs.clear()

    def _check(self) -> None:
        if self.away:
            raise JobsUnavailableError("away")


@pytest.fixture
def now() -> Now:
    return Now()


@pytest.fixture
def store(now: Now) -> Shaky:
    return Shaky(now)


@asynccontextmanager
async def gateway(
    store: Shaky, now: Now, dispatcher: ScriptedDispatcher, name: str = "gateway-1"
) -> AsyncIterator[JobRunner]:
    runner = JobRunner(
        dispatcher=dispatcher,
        store=store,
        config=JobsConfig(),
        owner=name,
        now_s=now,
        beat_s=0.01,
        alive_s=5.0,
    )
    await runner.start()
    yield runner
    await runner.close(0.0)


def spec(pictures: int = 1, **more: Any) -> JobSpec:
    return job(pictures=pictures, **more).spec


async def until(reached: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await reached():
            await asyncio.sleep(0.005)


async def ended(store: Shaky, job_id: str = "j1") -> JobState:
    async def reached() -> bool:
        store_job = None if store.away else await store.job(job_id)
        return store_job is not None and store_job.state.final

    await until(reached)
    found = await store.job(job_id)
    assert found is not None
    return found.state


async def names(store: Shaky) -> list[str]:
    return [event.name for event in await store.events("j1", 0)]


async def kill(runner: JobRunner) -> None:
    """As SIGKILL does: nothing is said to anybody."""
    for task in (*runner._background, *runner._runs):
        task.cancel()
    await asyncio.gather(*runner._background, *runner._runs, return_exceptions=True)
    runner._background.clear()


async def test_a_killed_gateways_job_is_drawn_on_by_another(store: Shaky, now: Now) -> None:
    stuck, well = ScriptedDispatcher(hangs_after=1), ScriptedDispatcher()
    async with gateway(store, now, stuck) as first, gateway(store, now, well, "gateway-2"):
        await first.submit(spec(pictures=3))
        await stuck.hanging.wait()

        async def one_is_there() -> bool:
            return await store.picture("j1", 0) is not None

        await until(one_is_there)
        drawn_first = await store.picture("j1", 0)
        await kill(first)
        await asyncio.sleep(0.05)
        assert well.tasks == []  # it might be alive: its last beat is young
        now.time_s += 6.0
        state = await ended(store)
    assert (state.status, state.attempts) == ("succeeded", 2)
    assert [task.index for task in well.tasks] == [1, 2]  # what is there is not drawn again
    assert [task.request.seed for task in well.tasks] == [8, 9]
    assert well.tasks[0].id not in {task.id for task in stuck.tasks}
    assert await store.picture("j1", 0) == drawn_first
    told = await store.events("j1", 0)
    assert [event.number for event in told] == list(range(1, len(told) + 1))
    assert "resumed" in [event.name for event in told]


async def test_a_gateway_that_ends_in_order_leaves_its_jobs_at_once(store: Shaky, now: Now) -> None:
    stuck, well = ScriptedDispatcher(hangs=True), ScriptedDispatcher()
    async with gateway(store, now, stuck) as first:
        await first.submit(spec())
        await stuck.started.wait()
    assert stuck.closed == 1
    async with gateway(store, now, well, "gateway-2"):
        assert (await ended(store)).status == "succeeded"  # and no time has passed


async def test_a_gateway_that_was_only_asleep_does_no_harm(store: Shaky, now: Now) -> None:
    stuck, well = ScriptedDispatcher(hangs_after=0), ScriptedDispatcher()
    async with gateway(store, now, stuck) as first:
        await first.submit(spec())
        await stuck.hanging.wait()
        await store.leave("gateway-1")
        for task in first._background:  # it does not beat
            task.cancel()
        async with gateway(store, now, well, "gateway-2"):
            state = await ended(store)
        first._drives["j1"].cancel()  # it wakes up, and has something to say

        async def noticed() -> bool:
            return first.running == 0

        await until(noticed)
    assert state.status == "succeeded"
    assert (await ended(store)).status == "succeeded"


async def test_a_job_that_kills_gateways_is_given_up(store: Shaky, now: Now) -> None:
    orphan = replace(job(owner="dead"), state=JobState(attempts=MAX_ATTEMPTS))
    await store.create(orphan)
    dispatcher = ScriptedDispatcher()
    async with gateway(store, now, dispatcher):
        state = await ended(store)
    assert state.error is not None
    assert (state.status, state.error["code"]) == ("failed", "worker_lost")
    assert dispatcher.tasks == []


async def test_a_job_that_was_cancelled_while_its_gateway_was_dead(store: Shaky, now: Now) -> None:
    await store.create(job(owner="dead"))
    await store.cancel("j1")
    dispatcher = ScriptedDispatcher()
    async with gateway(store, now, dispatcher):
        assert (await ended(store)).status == "cancelled"
    assert dispatcher.tasks == []


async def test_cancelling_through_another_gateway(store: Shaky, now: Now) -> None:
    stuck = ScriptedDispatcher(hangs=True)
    idle = ScriptedDispatcher()
    async with gateway(store, now, stuck) as first, gateway(store, now, idle, "gateway-2") as other:
        await first.submit(spec())
        await stuck.started.wait()
        await other.cancel("atelier", "j1")
        assert (await ended(store)).status == "cancelled"
    assert stuck.closed == 1


async def test_a_store_that_is_away_delays_and_loses_nothing(store: Shaky, now: Now) -> None:
    dispatcher = ScriptedDispatcher(hangs_after=1)
    async with gateway(store, now, dispatcher) as runner:
        await runner.submit(spec(pictures=2))
        await dispatcher.hanging.wait()
        store.away = True
        following = asyncio.create_task(_collect(runner))
        await asyncio.sleep(0.05)
        store.away = False
        await runner.cancel("atelier", "j1")
        assert (await ended(store)).status == "cancelled"
        assert await store.picture("j1", 0) is not None
        assert (await following)[-1] == "cancelled"  # its readers have waited, too


async def test_a_store_that_comes_back_empty_gets_the_job_again(store: Shaky, now: Now) -> None:
    dispatcher = ScriptedDispatcher(hangs_after=1)
    async with gateway(store, now, dispatcher) as runner:
        await runner.submit(spec(pictures=2))
        await dispatcher.hanging.wait()

        async def one_is_there() -> bool:
            return await store.picture("j1", 0) is not None

        await until(one_is_there)
        store.lose_everything()
        runner._drives["j1"].cancel()
        state = await ended(store)
        assert state.done() == {0}
        assert await store.picture("j1", 0) is not None


async def test_after_an_outage_nobody_adopts_what_lives(store: Shaky, now: Now) -> None:
    """A store that was away has no beats; the owner must get the time to beat again."""
    stuck, other = ScriptedDispatcher(hangs=True), ScriptedDispatcher()
    async with gateway(store, now, stuck) as first, gateway(store, now, other, "gateway-2"):
        await first.submit(spec())
        await stuck.started.wait()
        store.away = True
        now.time_s += 60.0
        await asyncio.sleep(0.05)
        store.away = False
        await asyncio.sleep(0.1)
        assert other.tasks == []
        await first.cancel("atelier", "j1")
        await ended(store)


@pytest.mark.parametrize(
    "refusal", [OverloadedError("full", retry_after_s=0.0), ClosedError("draining")]
)
async def test_a_refusal_puts_a_job_off(
    store: Shaky, now: Now, refusal: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drive, "_RETRY_S", (0.01, 0.02))
    dispatcher = ScriptedDispatcher(refusal=refusal)
    async with gateway(store, now, dispatcher) as runner:
        await runner.submit(spec())
        await asyncio.sleep(0.05)
        dispatcher.refusal = None
        assert (await ended(store)).status == "succeeded"


async def test_a_refusal_that_lasts_past_the_deadline_ends_the_job(store: Shaky, now: Now) -> None:
    dispatcher = ScriptedDispatcher(refusal=OverloadedError("full"))
    async with gateway(store, now, dispatcher) as runner:
        await runner.submit(spec(deadline_at_s=1000.5))
        state = await ended(store)
    assert state.error is not None
    assert (state.status, state.error["code"]) == ("failed", "deadline_exceeded")


async def test_nothing_is_left_behind(store: Shaky, now: Now) -> None:
    dispatcher = ScriptedDispatcher()
    async with gateway(store, now, dispatcher) as runner:
        before = len(asyncio.all_tasks())
        for i in range(20):
            await runner.submit(spec(job_id=f"j{i}"))
        for i in range(20):
            await ended(store, f"j{i}")

        async def quiet() -> bool:
            return runner.running == 0 and len(asyncio.all_tasks()) <= before

        await until(quiet)
        assert runner._drives == {}
        assert dispatcher.closed == 20


async def test_a_job_whose_making_was_not_confirmed_is_drawn_all_the_same(
    store: Shaky, now: Now, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store has it, and may tell a client that repeats the key: it must not wait for ever."""
    create = store.create

    async def unconfirmed(made: Job, key: IdempotencyKey | None = None) -> None:
        await create(made, key)
        raise JobsUnavailableError("the answer was lost")

    dispatcher = ScriptedDispatcher()
    async with gateway(store, now, dispatcher) as runner:
        monkeypatch.setattr(store, "create", unconfirmed)
        with pytest.raises(JobsUnavailableError):
            await runner.submit(spec(), IdempotencyKey("k", "d"))
        monkeypatch.undo()
        there, replayed = await runner.submit(spec(job_id="j2"), IdempotencyKey("k", "d"))
        assert (there.spec.id, replayed) == ("j1", True)
        state = await ended(store)
    assert (state.status, state.attempts) == ("succeeded", 1)
    assert len(dispatcher.tasks) == 1


async def test_a_jobs_events_are_few_writes(store: Shaky, now: Now) -> None:
    """Whatever happens while a write is under way goes into the next one."""
    async with gateway(store, now, ScriptedDispatcher()) as runner:
        await runner.submit(spec(pictures=4))
        await ended(store)
        assert (await names(store)).count("progress") == 12
    assert len(store.writes) < 12


async def _collect(runner: JobRunner) -> list[str]:
    return [event.name async for piece in runner.follow("j1", 0) for event in piece]
