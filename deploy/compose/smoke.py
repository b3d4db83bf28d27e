"""What the composed stack must do, asked from outside. Needs only Python.

    docker compose up -d --build --wait && COMPOSE="docker compose" python3 deploy/compose/smoke.py

Image sizes; a picture through the published port; the time to ready, from nothing and with plans
there; Prometheus has its target; the load generator's users are answered (where the profile
``load`` is up); Redis killed and back without a failed request; the server stopped under load
without a lost one. Status 1 when one of them fails.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from datetime import datetime
from typing import Any

SERVER = f"http://127.0.0.1:{os.environ.get('DARKROOM_PUBLISHED_PORT', '8000')}"
PROMETHEUS = f"http://127.0.0.1:{os.environ.get('PROMETHEUS_PUBLISHED_PORT', '9090')}"
LOAD_GENERATOR = f"http://127.0.0.1:{os.environ.get('LOADTEST_PUBLISHED_PORT', '8089')}"
NOT_TAKEN_S = 0.1
COMPOSE = os.environ.get("COMPOSE", "docker compose").split()


def main() -> int:
    """Run every check in turn."""
    sizes()
    checks = (
        picture,
        time_to_ready,
        prometheus_has_its_target,
        load_generator,
        redis_killed_and_back,
        stopped_under_load,
    )
    failed = 0
    for check in checks:
        began_s = time.monotonic()
        try:
            told = check()
        except Exception as error:
            failed += 1
            told = f"FAILED: {type(error).__name__}: {error}"
        print(f"{check.__name__}: {told} ({time.monotonic() - began_s:.1f} s)", flush=True)
    return 1 if failed else 0


def sizes() -> None:
    """Images and their sizes."""
    print(compose("images"), flush=True)


def picture() -> str:
    """One picture, from nothing."""
    wait_until_ready(600)
    status, body = draw("a red apple", steps=20)
    assert status == 200, f"{status}: {body}"
    data = base64.b64decode(body["data"][0]["b64_json"])
    assert data.startswith(b"\x89PNG"), data[:8]
    return f"{len(data)} bytes of PNG"


def time_to_ready() -> str:
    """How long the first start took, by its log, and how long one takes that finds its plans."""
    made = datetime.strptime(_state("darkroom")["CreatedAt"], "%Y-%m-%d %H:%M:%S %z %Z")
    log = compose("logs", "--timestamps", "--no-color", "--no-log-prefix", "darkroom")
    ready = next(line.split()[0] for line in log.splitlines() if " ready on " in line)
    # Nanoseconds, which Python's datetime does not have, are cut off.
    first_s = (datetime.fromisoformat(ready[:19] + "+00:00") - made).total_seconds()
    began_s = time.monotonic()
    compose("up", "-d", "--no-deps", "--no-build", "--force-recreate", "darkroom")
    wait_until_ready(600)
    again_s = time.monotonic() - began_s
    return f"{first_s:.0f} s at first; stopped, made anew and ready in {again_s:.0f} s"


def prometheus_has_its_target() -> str:
    """The scrape works, not only the process."""
    for _ in range(60):
        with urllib.request.urlopen(f"{PROMETHEUS}/api/v1/targets", timeout=5) as reply:
            targets = json.load(reply)["data"]["activeTargets"]
        states = {target["labels"]["job"]: target["health"] for target in targets}
        if states.get("darkroom") == "up":
            return str(states)
        time.sleep(1)
    raise AssertionError(f"targets: {states}")


def load_generator() -> str:
    """Two of Locust's users for half a minute: all are answered."""
    if "loadgen" not in compose("ps", "--services").split():
        return "not up: `docker compose --profile load up`"
    wanted = urllib.parse.urlencode({"user_count": 2, "spawn_rate": 2}).encode()
    urllib.request.urlopen(f"{LOAD_GENERATOR}/swarm", wanted, timeout=10).close()
    time.sleep(30)
    with urllib.request.urlopen(f"{LOAD_GENERATOR}/stats/requests", timeout=10) as reply:
        counted = json.load(reply)
    urllib.request.urlopen(f"{LOAD_GENERATOR}/stop", b"", timeout=30).close()
    total = next(row for row in counted["stats"] if row["name"] == "Aggregated")
    assert total["num_requests"] > 0, "no request has ended"
    assert not total["num_failures"], f"failed: {counted['errors'][:3]}"
    return f"{total['num_requests']} requests of Locust's users, none failed"


def redis_killed_and_back() -> str:
    """Pictures go on without Redis, and with it again."""
    with Load(clients=2) as load:
        time.sleep(3)
        compose("kill", "-s", "SIGKILL", "redis")
        time.sleep(8)
        compose("up", "-d", "--no-deps", "--no-build", "redis")
        time.sleep(8)
    assert load.statuses, "no request was answered"
    assert set(load.statuses) == {200}, f"statuses {sorted(set(load.statuses))}: {load.bad[:3]}"
    return f"{len(load.statuses)} requests, all 200"


def stopped_under_load() -> str:
    """Every request that was taken is answered; later ones are refused, not dropped."""
    with Load(clients=4) as load:
        time.sleep(4)
        compose("stop", "darkroom")
    taken = [status for status in load.statuses if status != 0]
    lost = [what for what in load.bad if what.startswith("lost")]
    assert taken, "no request was answered"
    assert set(taken) <= {200, 503}, f"statuses {sorted(set(taken))}"
    assert not lost, f"{len(lost)} requests were cut off: {lost[:3]}"
    state = _state("darkroom")
    assert state["ExitCode"] == 0, f"exit status {state['ExitCode']}"
    return f"{taken.count(200)} answered, {taken.count(503)} refused, exit status 0"


class Load:
    """Clients that ask for pictures one after the other until the block ends."""

    def __init__(self, clients: int) -> None:
        self.statuses: list[int] = []
        self.bad: list[str] = []
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._work) for _ in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while not self._ended.is_set():
            began_s = time.monotonic()
            try:
                status, body = draw("a cat on a blue background", steps=20)
            except (OSError, ValueError) as error:
                # Docker's proxy takes connections for a port that nobody listens on any more, and
                # resets them at once: such a request was never taken. One that waited was.
                if time.monotonic() - began_s < NOT_TAKEN_S:
                    self.statuses.append(0)
                else:
                    self.bad.append(f"lost: {type(error).__name__}: {error}")
                return
            self.statuses.append(status)
            if status != 200:
                self.bad.append(f"{status}: {body}")
                time.sleep(0.5)


def draw(prompt: str, *, steps: int) -> tuple[int, Any]:
    """(status, body) of one request."""
    request = urllib.request.Request(
        f"{SERVER}/v1/images/generations",
        json.dumps({"prompt": prompt, "steps": steps}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def wait_until_ready(seconds: float) -> None:
    """Until /readyz says so."""
    began_s = time.monotonic()
    while True:
        try:
            with urllib.request.urlopen(f"{SERVER}/readyz", timeout=5):
                return
        except OSError as error:
            if time.monotonic() - began_s > seconds:
                raise AssertionError(f"not ready after {seconds:g} s: {error}") from error
            time.sleep(1)


def compose(*arguments: str) -> str:
    """What a compose command says, which has to work."""
    command = [*COMPOSE, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _state(service: str) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(
        compose("ps", "-a", "--format", "json", service).splitlines()[0]
    )
    return state


if __name__ == "__main__":
    sys.exit(main())
