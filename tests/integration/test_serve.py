"""The whole application as an operator meets it: one command, real processes, one picture.

Each start of Ray costs ten seconds and more, so what can be asked of one is asked of one.
"""

from __future__ import annotations

import base64
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import httpx
import psutil
import pytest
from PIL import Image

from tests.served import Served, darkroom_serve, wait_until


@pytest.fixture(scope="module")
def served(
    tiny_checkpoint: Callable[[str], Path], plans: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("serve")
    limits = {"max_steps": 1000}
    with darkroom_serve(tiny_checkpoint("text"), plans, folder, limits=limits) as served:
        yield served


def draw(served: Served, **body: object) -> httpx.Response:
    asked = {"prompt": "a red umbrella", "response_format": "b64_json", "seed": 1, **body}
    return httpx.post(f"{served.url}/v1/images/generations", json=asked, timeout=300.0)


def test_a_prompt_comes_back_as_a_picture(served: Served) -> None:
    reply = draw(served, steps=4)
    assert reply.status_code == 200, reply.text
    encoded = base64.b64decode(reply.json()["data"][0]["b64_json"])
    with Image.open(BytesIO(encoded)) as picture:
        assert picture.size == (32, 32)
    assert float(reply.headers["x-darkroom-denoise-ms"]) > 0


def test_every_process_is_on_the_metrics_page(served: Served) -> None:
    assert served.metric("darkroom_router_workers") == 1
    assert served.metric("darkroom_replica_up") == 3
    assert served.metric("darkroom_router_grants_total") >= 1


def test_serves_own_paths_are_answered_although_its_proxy_is_off(served: Served) -> None:
    assert httpx.get(f"{served.url}/-/healthz", timeout=30.0).text == "success"
    assert httpx.get(f"{served.url}/-/routes", timeout=30.0).json() == {"/": "darkroom"}


def test_a_job_is_drawn_told_of_and_counted(served: Served) -> None:
    before = served.metric("darkroom_jobs_ended_total")
    asked = {"prompt": "a red umbrella", "seed": 1, "steps": 4, "n": 2}
    key = {"idempotency-key": "once"}
    made = httpx.post(f"{served.url}/v1/jobs", json=asked, headers=key, timeout=30.0)
    assert made.status_code == 202, made.text
    id = made.json()["id"]
    again = httpx.post(f"{served.url}/v1/jobs", json=asked, headers=key, timeout=30.0)
    assert again.json()["id"] == id
    events = httpx.get(f"{served.url}/v1/jobs/{id}/events", timeout=120.0).text  # to the last one
    told = [line for line in events.splitlines() if line.startswith("event: ")]
    assert told[-1] == "event: done"
    assert told.count("event: picture") == 2
    done = httpx.get(f"{served.url}/v1/jobs/{id}", timeout=30.0).json()
    assert [item["darkroom"]["seed"] for item in done["data"]] == [1, 2]
    with Image.open(BytesIO(httpx.get(done["data"][0]["url"], timeout=30.0).content)) as picture:
        assert picture.size == (32, 32)
    assert served.metric("darkroom_jobs_ended_total") == before + 1


def test_a_job_that_is_cancelled_frees_the_worker(served: Served) -> None:
    asked = {"prompt": "a red umbrella", "steps": 1000, "n": 4}
    id = httpx.post(f"{served.url}/v1/jobs", json=asked, timeout=30.0).json()["id"]
    wait_until(lambda: served.metric("darkroom_live_tasks") > 0)
    httpx.delete(f"{served.url}/v1/jobs/{id}", timeout=30.0)
    wait_until(lambda: served.metric("darkroom_live_tasks") == 0)
    assert httpx.get(f"{served.url}/v1/jobs/{id}", timeout=30.0).json()["status"] == "cancelled"
    assert served.metric("darkroom_cancel_seconds_count") >= 1


def test_only_the_worker_has_the_heavy_libraries(served: Served) -> None:
    """Read from what the processes have mapped, not from what they say."""

    def maps(process: psutil.Process) -> str:
        return Path(f"/proc/{process.pid}/maps").read_text()

    assert "libtorch" in maps(served.replicas("Worker")[0])
    for role in ("Gateway", "Router"):
        [replica] = served.replicas(role)
        assert "libtorch" not in maps(replica)
        assert "onnxruntime" not in maps(replica)


def test_nobody_outside_is_called(served: Served) -> None:
    own = {address.address for many in psutil.net_if_addrs().values() for address in many}
    for process in served.family():
        for connection in process.net_connections("inet"):
            assert not connection.raddr or connection.raddr.ip.removeprefix("::ffff:") in own


def test_a_second_one_on_the_same_port_is_refused_in_one_line(served: Served) -> None:
    port = served.url.rpartition(":")[2]
    second = subprocess.run(
        [sys.executable, "-m", "server", "serve", "--port", port],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert second.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in second.stderr
    assert "Traceback" not in second.stderr


def test_sigterm_finishes_what_is_in_flight_and_ends_with_status_0(served: Served) -> None:
    replies: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: replies.append(draw(served, steps=1000)))
    asking.start()
    wait_until(lambda: served.metric("darkroom_router_running") == 1 or not asking.is_alive())
    assert asking.is_alive(), replies[0].text
    family = served.family()
    served.terminate()
    wait_until(lambda: not served.ready())
    late = draw(served, steps=4)
    assert late.status_code == 503
    assert int(late.headers["retry-after"]) >= 1
    asking.join()
    assert [reply.status_code for reply in replies] == [200]
    assert served.status() == 0
    _, alive = psutil.wait_procs(family, timeout=30.0)
    assert alive == []
