"""What every store of jobs does, in memory and on a real Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace

import pytest

from server.jobs.memory import MemoryJobStore
from server.jobs.records import (
    Change,
    JobEvent,
    JobPicture,
    JobPreview,
    JobState,
    Status,
    WebhookTarget,
)
from server.jobs.redis import RedisJobStore
from server.jobs.store import (
    Bounds,
    IdempotencyKey,
    JobGoneError,
    JobLostError,
    JobsFullError,
    JobStore,
    Known,
)
from tests.contracts.job_stores import job
from tests.redis_server import RedisServer

pytestmark = pytest.mark.anyio

A, B = "gateway-1", "gateway-2"
ALIVE_S = 60.0
MakeStore = Callable[[Bounds], JobStore]


class Now:
    """Unix time that a test moves."""

    def __init__(self) -> None:
        self.time_s = 1000.0

    def __call__(self) -> float:
        return self.time_s


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def now() -> Now:
    return Now()


@pytest.fixture(params=["memory", "redis"])
async def make(
    request: pytest.FixtureRequest, now: Now, anyio_backend: str
) -> AsyncIterator[MakeStore]:
    """A function from bounds to an empty store; stores of one test share what Redis holds."""
    opened: list[JobStore] = []
    if request.param == "redis":
        server = request.getfixturevalue("redis_server")
        client = RedisJobStore(server.url, Bounds(), timeout_s=10.0, now_s=now)
        await client._redis.flushall()
        opened.append(client)

    def make(bounds: Bounds) -> JobStore:
        if request.param == "memory":
            return MemoryJobStore(bounds, now_s=now)
        opened.append(RedisJobStore(server.url, bounds, timeout_s=10.0, now_s=now))
        return opened[-1]

    yield make
    for store in opened:
        await store.close()


@pytest.fixture
async def store(make: MakeStore) -> JobStore:
    made = make(Bounds(ttl_s=100.0, max_jobs=4, max_bytes=1000))
    await made.beat(A, ALIVE_S)
    return made


def ended(status: Status = "succeeded", at_s: float = 1000.0, pictures: int = 0) -> JobState:
    known = {str(index): {"seed": 7 + index} for index in range(pictures)}
    return JobState(status=status, finished_at_s=at_s, pictures=known)


def event(number: int, name: str = "progress") -> JobEvent:
    return JobEvent(number, name, {"step": number, "text": "ünïcode\n"})


async def finish(
    store: JobStore,
    job_id: str,
    *,
    size: int = 0,
    at_s: float = 1000.0,
    hook: WebhookTarget | None = None,
) -> None:
    pictures = (JobPicture(0, "png", b"x" * size),) if size else ()
    await store.write(job(job_id, webhook=hook), Change(state=ended(at_s=at_s), pictures=pictures))


async def test_a_job_comes_back_as_it_was(store: JobStore) -> None:
    hook = WebhookTarget(url="https://example.com/x", secret="s" * 20)
    made = job(pictures=3, webhook=hook, inline=True, base_url="http://h")
    assert await store.create(made) is None
    found = await store.job("j1")
    assert found == made
    tasks = found.spec.tasks(attempt=2, done={1})
    assert [(task.id, task.index, task.request.seed) for task in tasks] == [
        ("j1.2.0", 0, 7),
        ("j1.2.2", 2, 9),
    ]
    assert tasks[0].request.timesteps == (9.0, 5.0, 2.5, 1.0)
    assert "s" * 20 not in repr(found)
    assert "umbrella" not in repr(found)


async def test_nothing_is_known_of_a_job_that_is_not_there(store: JobStore) -> None:
    assert await store.job("no") is None
    assert await store.events("no", 0) == []
    assert await store.picture("no", 0) is None
    assert await store.preview("no", 0) is None
    await store.cancel("no")
    await store.forget("no")
    with pytest.raises(JobGoneError):
        await store.write(job("no"), Change(state=JobState()))


async def test_a_key_names_one_job_of_its_tenant(store: JobStore) -> None:
    key = IdempotencyKey("k", "digest-1")
    assert await store.create(job("j1"), key) is None
    assert await store.create(job("j2"), key) == Known("j1", "digest-1")
    assert await store.create(job("j2"), IdempotencyKey("k", "digest-2")) == Known("j1", "digest-1")
    assert await store.job("j2") is None
    assert await store.create(job("j3", tenant="other"), key) is None
    await finish(store, "j1")
    await store.forget("j1")
    assert await store.create(job("j4"), key) == Known("j1", "digest-1")


async def test_of_many_at_once_with_one_key_one_is_made(store: JobStore) -> None:
    key = IdempotencyKey("k", "d")
    said = await asyncio.gather(*(store.create(job(f"j{i}"), key) for i in range(20)))
    assert said.count(None) == 1
    assert len({known.job_id for known in said if known}) == 1


async def test_unfinished_jobs_are_bounded(store: JobStore) -> None:
    for i in range(4):
        await store.create(job(f"j{i}"))
    with pytest.raises(JobsFullError, match="4 jobs"):
        await store.create(job("j5"))
    await finish(store, "j0")
    assert await store.create(job("j5")) is None


async def test_a_tenant_lists_its_own_newest_first(store: JobStore) -> None:
    for i in range(3):
        await store.create(job(f"j{i}", created_at_s=1000.0 + i))
    await store.create(job("hidden", created_at_s=1005.0, listed=False))
    await finish(store, "hidden")
    await store.create(job("other", tenant="b", created_at_s=1006.0))

    async def ids(limit: int, before: str | None = None) -> list[str]:
        return [found.spec.id for found in await store.jobs("atelier", limit, before)]

    assert await ids(10) == ["j2", "j1", "j0"]
    assert await ids(2) == ["j2", "j1"]
    assert await ids(2, "j1") == ["j0"]
    assert await ids(2, "j0") == []
    await finish(store, "j1")
    await store.forget("j1")
    assert await ids(2) == ["j2", "j0"]


async def test_events_are_kept_in_order_and_read_from_anywhere(store: JobStore) -> None:
    await store.create(job())
    first = Change(state=JobState(), events=(event(1), event(2)))
    await store.write(job(), first)
    await store.write(job(), first)  # the answer was lost, so it was sent again
    await store.write(job(), Change(state=JobState(), events=(event(2), event(3))))
    assert await store.events("j1", 0) == [event(1), event(2), event(3)]
    assert await store.events("j1", 2) == [event(3)]
    assert await store.events("j1", 3) == []
    assert await store.events("j1", 0, limit=2) == [event(1), event(2)]


async def test_events_are_bounded_and_the_newest_stay(store: JobStore) -> None:
    await store.create(job())
    for start in range(1, 4200, 100):
        some = tuple(event(number) for number in range(start, start + 100))
        await store.write(job(), Change(state=JobState(), events=some))
    kept = await store.events("j1", 0, limit=10_000)
    assert [kept[0].number, kept[-1].number, len(kept)] == [105, 4200, 4096]


async def test_pictures_and_the_latest_preview(store: JobStore) -> None:
    made = job(pictures=2)
    await store.create(made)
    early = JobPicture(1, "webp", b"\x00\n\xffdata\n")
    previews = (JobPreview(0, 1, b"a"), JobPreview(0, 2, b"\nb"))
    await store.write(made, Change(state=JobState(), pictures=(early,), previews=previews))
    assert await store.picture("j1", 1) == early
    assert await store.picture("j1", 0) is None
    assert await store.preview("j1", 0) == JobPreview(0, 2, b"\nb")
    late = JobPicture(0, "png", b"late")
    await store.write(made, Change(state=ended(pictures=2), pictures=(late,)))
    assert await store.picture("j1", 0) == late
    assert await store.preview("j1", 0) is None  # the picture itself is there now


async def test_a_final_state_is_final_and_may_be_written_twice(store: JobStore) -> None:
    await store.create(job())
    last = Change(state=ended("failed"), events=(event(1),))
    await store.write(job(), last)
    with pytest.raises(JobLostError):
        await store.write(job(), Change(state=ended("succeeded")))
    found = await store.job("j1")
    assert found is not None
    assert found.state.status == "failed"


async def test_only_the_owner_writes(store: JobStore) -> None:
    await store.create(job())
    with pytest.raises(JobLostError):
        await store.write(job(owner=B), Change(state=ended(), events=(event(1),)))
    assert await store.events("j1", 0) == []


async def test_cancelling_is_heard_with_the_next_write(store: JobStore) -> None:
    await store.create(job())
    assert await store.write(job(), Change(state=JobState())) is False
    await store.cancel("j1")
    found = await store.job("j1")
    assert found is not None
    assert found.cancelling
    assert await store.write(job(), Change(state=JobState())) is True
    await finish(store, "j1")
    await store.cancel("j1")  # too late, and no harm


async def test_only_finished_jobs_are_forgotten(store: JobStore) -> None:
    await store.create(job())
    await store.forget("j1")
    assert await store.job("j1") is not None
    await finish(store, "j1", size=10)
    await store.forget("j1")
    assert await store.job("j1") is None
    assert await store.picture("j1", 0) is None
    assert await store.events("j1", 0) == []


async def test_an_owner_that_stops_beating_loses_its_jobs(store: JobStore) -> None:
    await store.beat(B, ALIVE_S)
    made = job("j1", pictures=2)
    await store.create(made)
    await store.write(made, Change(state=JobState(status="running"), events=(event(1),)))
    await store.create(job("j2", owner=B))
    await store.create(job("j3"))
    await finish(store, "j3")
    assert await store.adopt(B, limit=10) == []
    await store.leave(A)
    (mine,) = await store.adopt(B, limit=10)
    assert (mine.spec.id, mine.owner, mine.state.attempts) == ("j1", B, 2)
    assert await store.adopt(B, limit=10) == []
    with pytest.raises(JobLostError):  # it was only asleep
        await store.write(made, Change(state=ended()))
    await store.write(mine, Change(state=mine.state, events=(event(2),)))
    found = await store.job("j1")
    assert found is not None
    assert found.state.attempts == 2


async def test_what_an_owner_does_not_run_is_its_own_to_begin(store: JobStore) -> None:
    for i in range(3):
        await store.create(job(f"j{i}"))
    await finish(store, "j2")
    (mine,) = await store.adopt(A, limit=10, running={"j0"})
    assert (mine.spec.id, mine.owner, mine.state.attempts) == ("j1", A, 1)
    assert await store.adopt(A, limit=10, running={"j0", "j1"}) == []
    assert await store.adopt(B, limit=10, running=()) == []


async def test_of_two_gateways_one_adopts(store: JobStore) -> None:
    for i in range(4):
        await store.create(job(f"j{i}"))
    await store.leave(A)
    await store.beat(B, ALIVE_S)
    await store.beat("gateway-3", ALIVE_S)
    adopted = await asyncio.gather(
        *(store.adopt(name, limit=2) for name in (B, "gateway-3", B, "gateway-3"))
    )
    ids = [found.spec.id for part in adopted for found in part]
    assert sorted(ids) == ["j0", "j1", "j2", "j3"]


async def test_a_lost_job_is_restored_by_its_owner(make: MakeStore) -> None:
    store = make(Bounds())
    await store.beat(A, ALIVE_S)
    lost = replace(job(), state=JobState(status="running", attempts=2))
    await store.restore(lost)
    assert await store.job("j1") == lost
    await store.write(lost, Change(state=lost.state, events=(event(5),)))
    await store.restore(lost)  # it is there: nothing is overwritten
    assert await store.events("j1", 0) == [event(5)]


async def test_what_was_finished_first_goes_first_when_there_is_too_much(store: JobStore) -> None:
    for i in range(3):
        await store.create(job(f"j{i}"))
        await finish(store, f"j{i}", size=400, at_s=1000.0 + i)
    assert await store.job("j0") is None
    assert await store.job("j1") is not None
    assert await store.picture("j2", 0) is not None
    for i in range(3, 8):
        await store.create(job(f"j{i}"))
        await finish(store, f"j{i}", at_s=1000.0 + i)
    kept = [found.spec.id for found in await store.jobs("atelier", 10)]
    assert sorted(kept) == ["j4", "j5", "j6", "j7"]


async def test_time_runs_out(store: JobStore, now: Now) -> None:
    hook = WebhookTarget(url="https://h/", secret="s")
    await store.create(job(webhook=hook))
    await finish(store, "j1", size=10, hook=hook)
    now.time_s += 101.0
    await store.sweep()
    assert await store.job("j1") is None
    assert await store.picture("j1", 0) is None
    assert await store.due_webhook(60.0) is None


async def test_a_waiter_is_woken(store: JobStore) -> None:
    await store.create(job())
    await store.start()
    waiting = asyncio.create_task(store.heard("j1", 30.0))
    await asyncio.sleep(0)
    await store.write(job(), Change(state=JobState(), events=(event(1),)))
    await asyncio.wait_for(waiting, 10.0)
    await store.heard("j1", 0.01)  # nothing rings, and it returns all the same


async def test_webhooks_are_due_until_they_are_settled(store: JobStore, now: Now) -> None:
    hook = WebhookTarget(url="https://example.com/x", secret="s")
    await store.create(job("j1", webhook=hook))
    await store.create(job("j2"))
    assert await store.due_webhook(60.0) is None
    await finish(store, "j1", hook=hook)
    await finish(store, "j2")
    due = await store.due_webhook(60.0)
    assert due is not None
    assert (due[0].spec.id, due[0].spec.webhook, due[1]) == ("j1", hook, 0)
    assert await store.due_webhook(60.0) is None  # somebody is at it
    await store.put_off_webhook("j1", 5.0)
    assert await store.due_webhook(60.0) is None
    now.time_s += 5.0
    again = await store.due_webhook(60.0)
    assert again is not None
    assert again[1] == 1
    now.time_s += 60.0  # who was at it died
    third = await store.due_webhook(60.0)
    assert third is not None
    assert third[1] == 2
    await store.settle_webhook("j1")
    now.time_s += 60.0
    assert await store.due_webhook(60.0) is None


async def test_gateways_share_a_secret(make: MakeStore) -> None:
    store = make(Bounds())
    secret = await store.secret()
    assert len(secret) == 32
    assert await store.secret() == secret
    other = make(Bounds())
    assert (await other.secret() == secret) is isinstance(other, RedisJobStore)
