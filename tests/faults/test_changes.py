"""What changes around an application while it draws: its model, its gateways, its Redis."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file, save_file

from tests.faults.clients import asking, draw
from tests.redis_server import RedisServer
from tests.served import Served, darkroom_serve, wait_until
from tests.serving import MODEL

pytestmark = pytest.mark.full

GATEWAYS = 2
CLIENTS = 6
STEPS = 60


@dataclass(frozen=True, slots=True)
class Stage:
    served: Served
    redis: RedisServer
    checkpoint: Path


@pytest.fixture(scope="module")
def stage(
    tiny_checkpoint: Callable[[str], Path], plans: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("changes")
    checkpoint = folder / "checkpoint"
    shutil.copytree(tiny_checkpoint("text"), checkpoint)
    with (
        RedisServer(folder / "redis") as redis,
        darkroom_serve(
            checkpoint,
            plans,
            folder / "home",
            redis={"url": redis.url},
            http={"gateways": GATEWAYS},
        ) as served,
    ):
        yield Stage(served, redis, checkpoint)


def test_a_model_is_reloaded_with_other_weights_and_no_request_is_dropped(stage: Stage) -> None:
    with asking(stage.served, CLIENTS, steps=STEPS) as got:
        wait_until(lambda: len(got) >= CLIENTS)
        weights = stage.checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
        save_file({name: 0.9 * value for name, value in load_file(weights).items()}, weights)
        reply = httpx.post(
            f"{stage.served.url}/v1/admin/models/{MODEL}/reload", json={}, timeout=300.0
        )
        assert reply.status_code == 200, reply.text
        begun_before = len(got) + CLIENTS
        wait_until(lambda: len(got) >= begun_before + CLIENTS)
    assert {reply.status for reply in got} == {200}
    new = reply.json()["darkroom"]["plan_digest"]
    assert got[0].plan != new
    assert {reply.plan for reply in got} == {got[0].plan, new}
    assert {reply.plan for reply in got[begun_before:]} == {new}


def test_redis_stops_and_starts_and_no_request_fails(stage: Stage) -> None:
    with asking(stage.served, CLIENTS, steps=STEPS, cache={"mode": "approximate"}) as got:
        wait_until(lambda: len(got) >= CLIENTS)
        stage.redis.kill()
        while_away = len(got) + CLIENTS
        wait_until(lambda: len(got) >= while_away + CLIENTS)
        stage.redis.start()
        since_back = len(got) + CLIENTS
        wait_until(lambda: len(got) >= since_back + CLIENTS)
    assert {reply.status for reply in got} == {200}


def test_whichever_gateway_is_asked_counts_what_all_have_done(stage: Stage) -> None:
    wait_until(lambda: len(answering(stage.served)) == GATEWAYS)
    assert [draw(stage.served, steps=4).status for _ in range(20)] == [200] * 20
    pages = [samples(stage.served, "darkroom_gateway_pictures_total") for _ in range(16)]
    assert pages == [pages[0]] * 16
    assert len(pages[0]) == GATEWAYS
    assert sum(pages[0].values()) >= 20


def test_one_of_two_gateways_dies_and_the_port_answers_as_before(stage: Stage) -> None:
    wait_until(lambda: len(answering(stage.served)) == GATEWAYS)
    [killed, left] = stage.served.replicas("Gateway")
    killed.kill()
    killed.wait()
    # The other one has had it on its pages, and says that it is missing.
    wait_until(lambda: 0.0 in samples(stage.served, "darkroom_replica_up").values())
    # What was on its way to the dead one is lost; whoever comes now meets the other.
    assert [draw(stage.served, steps=4).status for _ in range(10)] == [200] * 10
    wait_until(lambda: len(stage.served.replicas("Gateway")) == GATEWAYS)
    wait_until(lambda: len(answering(stage.served)) == GATEWAYS)
    assert left.is_running()
    assert [draw(stage.served, steps=4).status for _ in range(40)] == [200] * 40


def test_a_model_that_was_added_is_drawn_by_a_worker_that_came_after_it(
    tiny_checkpoint: Callable[[str], Path], plans: Path, tmp_path: Path
) -> None:
    added = tmp_path / "added"
    shutil.copytree(tiny_checkpoint("text"), added)
    weights = added / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: 0.8 * value for name, value in load_file(weights).items()}, weights)
    with darkroom_serve(
        tiny_checkpoint("text"), plans, tmp_path / "home", workers={"replicas": 2}
    ) as served:
        body = {"id": "added", "path": str(added)}
        reply = httpx.post(f"{served.url}/v1/admin/models", json=body, timeout=300.0)
        assert reply.status_code == 200, reply.text
        plan = reply.json()["darkroom"]["plan_digest"]
        level = httpx.put(f"{served.url}/v1/admin/log-level", json={"level": "warning"})
        assert level.status_code == 200, level.text
        with asking(served, CLIENTS, model="added", steps=STEPS) as got:
            wait_until(lambda: len(drawn_by(served, "added")) == 2)
            before = drawn_by(served, "added")
            [killed, left] = served.replicas("Worker")
            killed.kill()
            killed.wait()
            since_killed = len(got) + CLIENTS
            # The one that comes instead has it too, and the router sends it pictures of it.
            wait_until(lambda: bool(drawn_by(served, "added") - before), timeout_s=240.0)
            wait_until(lambda: len(got) >= since_killed + CLIENTS)
            listed = httpx.get(f"{served.url}/v1/models").json()["data"]
        assert left.is_running()
        assert {reply.status for reply in got} == {200}
        assert {reply.plan for reply in got} == {plan}
        assert [model["id"] for model in listed] == [MODEL, "added"]


def drawn_by(served: Served, model: str) -> set[str]:
    """The workers that are up and have drawn with a model."""
    text = httpx.get(f"{served.url}/metrics", timeout=30.0).text
    lines = [line for line in text.splitlines() if line.startswith("darkroom_pictures_total{")]
    return {
        line.partition('replica="')[2].partition('"')[0]
        for line in lines
        if f'model="{model}"' in line
    }


def answering(served: Served) -> set[str]:
    """The gateways that take connections to the one port: each is busy with the page it writes."""
    found: set[str] = set()
    for _ in range(16):
        busy = samples(served, "darkroom_http_requests_in_flight")
        found.update(replica for replica, requests in busy.items() if requests)
    return found


def samples(served: Served, name: str) -> dict[str, float]:
    """A metric's values by their replicas, from whichever gateway answers."""
    text = httpx.get(f"{served.url}/metrics", timeout=30.0).text
    lines = [line for line in text.splitlines() if line.startswith(f"{name}{{")]
    return {
        line.partition('replica="')[2].partition('"')[0]: float(line.rpartition(" ")[2])
        for line in lines
    }
