"""kill -9 of each kind of process under load: clients notice nothing but time.

One application for all: that it stands up again after each is part of what is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.faults.clients import LONG_STEPS, TIMEOUT_S, Reply, draw, draw_many, replies, same
from tests.redis_server import RedisServer
from tests.served import Served, darkroom_serve, wait_until
from tests.serving import pixels

pytestmark = pytest.mark.full

WORKERS = 2
CLIENTS = 8


@pytest.fixture(scope="module")
def served(
    tiny_checkpoint: Callable[[str], Path], plans: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("faults")
    with (
        RedisServer(folder / "redis") as redis,
        darkroom_serve(
            tiny_checkpoint("text"),
            plans,
            folder / "home",
            *("--workers", str(WORKERS)),
            redis={"url": redis.url},
            limits={"max_steps": LONG_STEPS},
            # Two may be alive on each: what is beyond waits, and dies with the router's memory.
            workers={"snapshot_every_s": 0.2, "max_live": 3},
        ) as served,
    ):
        yield served


@pytest.fixture(scope="module")
def calm(served: Served) -> list[Reply]:
    """What the clients get when nothing breaks."""
    got = replies(draw_many(served, CLIENTS))
    assert [reply.status for reply in got] == [200] * CLIENTS
    return got


@pytest.fixture(autouse=True)
def _whole(served: Served) -> None:
    """Start each test with everything in its place."""
    wait_until(lambda: served.ready() and served.metric("darkroom_router_workers") == WORKERS)


def test_a_worker_dies_while_eight_requests_run(served: Served, calm: list[Reply]) -> None:
    asked = draw_many(served, CLIENTS)
    wait_until(lambda: served.metric("darkroom_router_running") >= WORKERS)
    served.kill("Worker")
    shaken = replies(asked)
    assert [reply.status for reply in shaken] == [200] * CLIENTS
    assert same(calm, shaken)
    assert served.metric("darkroom_router_lost_workers_total") >= 1


def test_all_workers_die_and_others_finish_their_work(served: Served, calm: list[Reply]) -> None:
    asked = draw_many(served, CLIENTS)
    wait_until(lambda: served.metric("darkroom_router_running") >= WORKERS)
    for worker in served.replicas("Worker"):
        worker.kill()
    shaken = replies(asked)
    assert [reply.status for reply in shaken] == [200] * CLIENTS
    assert same(calm, shaken)


def test_the_router_dies_while_requests_run_and_wait(served: Served, calm: list[Reply]) -> None:
    asked = draw_many(served, CLIENTS)
    wait_until(lambda: served.metric("darkroom_router_queued") >= 1)
    served.kill("Router")
    assert draw(served, steps=4).status == 200  # admitted by the next one
    shaken = replies(asked)
    assert [reply.status for reply in shaken] == [200] * CLIENTS
    assert same(calm, shaken)


def test_a_gateway_dies_and_its_jobs_are_finished_by_the_next(
    served: Served, calm: list[Reply]
) -> None:
    jobs = [
        httpx.post(
            f"{served.url}/v1/jobs",
            json={"prompt": "a red umbrella", "seed": seed, "steps": LONG_STEPS},
            timeout=TIMEOUT_S,
        ).json()["id"]
        for seed in range(3)
    ]
    waiting = draw_many(served, 2)
    wait_until(lambda: served.metric("darkroom_router_running") >= 1)
    served.kill("Gateway")
    for future in waiting:
        assert isinstance(future.exception(), httpx.TransportError)
    wait_until(served.ready)

    def job(id: str) -> dict[str, Any]:
        reply: dict[str, Any] = httpx.get(f"{served.url}/v1/jobs/{id}", timeout=30.0).json()
        return reply

    wait_until(lambda: all(job(id)["status"] == "succeeded" for id in jobs), TIMEOUT_S)
    for id, reply in zip(jobs, calm, strict=False):
        picture = httpx.get(job(id)["data"][0]["url"], timeout=30.0)
        assert np.array_equal(pixels(picture.content), reply.pictures[0])
    # Nobody waits for the dead gateway's requests: their leases run out, and workers are told.
    wait_until(lambda: served.metric("darkroom_router_running") == 0)
    assert served.metric("darkroom_router_queued") == 0
