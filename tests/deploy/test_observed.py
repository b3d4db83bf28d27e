"""A real Prometheus scrapes the real server under a real load; every panel and alert is asked.

An expression that Prometheus refuses, or that gives nothing without a stated reason, fails: so does
a metric that somebody made up or renamed.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from PIL import Image

from deploy.grafana import check
from deploy.grafana.boards import BOARDS
from deploy.grafana.panels import Panel, Query
from tests.redis_server import free_port
from tests.served import Served, darkroom_serve, wait_until

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs Debian's prometheus"),
]

RULES = Path(check.__file__).parents[1] / "prometheus" / "rules"
LOAD_S = 45.0
ID = re.compile(r"load-\d+")


@pytest.fixture(scope="module")
def prometheus(
    tiny_checkpoint: Callable[[str], Path], plans: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The URL of a Prometheus that has watched a server under load."""
    folder = tmp_path_factory.mktemp("observed")
    with (
        darkroom_serve(tiny_checkpoint("text"), plans, folder / "server") as served,
        _Prometheus(served, folder / "prometheus") as url,
    ):
        _load(served)
        time.sleep(5.0)  # the last scrapes
        yield url


@pytest.mark.parametrize(
    ("board", "panel"),
    [
        pytest.param(board.title, panel, id=f"{board.uid}: {panel.title}")
        for board in BOARDS
        for row in board.rows
        for panel in row.panels
    ],
)
def test_a_panel_shows_something(prometheus: str, board: str, panel: Panel, tmp_path: Path) -> None:
    series = check.ask(prometheus, panel, LOAD_S + 30)

    assert series or panel.may_be_empty, f"{board} / {panel.title} is empty"
    if series:
        path = tmp_path / "panel.png"
        check.draw(panel, series, path)
        assert path.stat().st_size > 2000


def test_the_whole_sheet_is_drawn(prometheus: str, tmp_path: Path) -> None:
    shown = [
        (board, panel, check.ask(prometheus, panel, LOAD_S + 30))
        for board in BOARDS
        for row in board.rows
        for panel in row.panels
    ]
    # Whoever wants to look at it names a folder with --basetemp.
    path = tmp_path / "dashboards.png"

    check.sheet(shown, path)

    with Image.open(path) as picture:
        assert picture.height > 100 * len(shown) / check.PANELS_A_ROW
    assert path.stat().st_size < 600_000


@pytest.mark.parametrize("rule", ["darkroom-recording", "darkroom-objectives", "darkroom-causes"])
def test_every_rule_is_evaluated(prometheus: str, rule: str) -> None:
    groups = {group["name"]: group for group in _api(prometheus, "rules")["groups"]}

    for found in groups[rule]["rules"]:
        assert found["health"] == "ok", found
        assert not found.get("lastError"), found


def test_a_healthy_server_under_load_raises_no_alert(prometheus: str) -> None:
    firing = [alert for alert in _api(prometheus, "alerts")["alerts"] if alert["state"] == "firing"]

    assert firing == []


def test_the_objectives_are_computed(prometheus: str) -> None:
    for name in ("darkroom:request_errors:ratio_rate5m", "darkroom:request_late:ratio_rate5m"):
        (result,) = _api(prometheus, "query", query=name)["result"]

        assert 0.0 <= float(result["value"][1]) <= 1.0


@pytest.mark.parametrize(
    "query",
    [
        pytest.param(query, id=f"{board.uid}: {panel.title}")
        for board in BOARDS
        for row in board.rows
        for panel in row.panels
        for query in panel.queries
        if query.exemplars
    ],
)
def test_a_panel_of_latency_names_requests(prometheus: str, query: Query) -> None:
    now_s = time.time()
    found = _api(
        prometheus,
        "query_exemplars",
        query=query.expr,
        start=str(now_s - LOAD_S - 60),
        end=str(now_s),
    )

    ids = {exemplar["labels"]["request_id"] for series in found for exemplar in series["exemplars"]}
    assert any(ID.fullmatch(id_) for id_ in ids), "no exemplar of a request that was sent"


def _prometheus_config(served: Served) -> dict[str, Any]:
    """The committed one, in a hurry and with this server as its target."""
    committed = yaml.safe_load((RULES.parent / "prometheus.yml").read_text())
    target = urllib.parse.urlsplit(served.url).netloc
    return {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "storage": committed["storage"],
        "rule_files": [str(path) for path in RULES.glob("*.yml")],
        "scrape_configs": [{"job_name": "darkroom", "static_configs": [{"targets": [target]}]}],
    }


class _Prometheus:
    def __init__(self, served: Served, folder: Path) -> None:
        folder.mkdir(parents=True)
        config = folder / "prometheus.yml"
        config.write_text(yaml.safe_dump(_prometheus_config(served)))
        self._port = free_port()
        self._command = [
            "prometheus",
            f"--config.file={config}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{self._port}",
            *_features(),
        ]

    def __enter__(self) -> str:
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        url = f"http://127.0.0.1:{self._port}"
        wait_until(lambda: _answers(f"{url}/-/ready"))
        return url

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def _features() -> list[str]:
    """The features that compose switches on."""
    compose = yaml.safe_load((RULES.parents[2] / "docker-compose.yml").read_text())
    command = compose["services"]["prometheus"]["command"]
    return [flag for flag in command if flag.startswith("--enable-feature")]


def _load(served: Served) -> None:
    """Every kind of request, from four clients, for a while."""
    until_s = time.monotonic() + LOAD_S
    numbers = itertools.count()

    def client() -> None:
        while time.monotonic() < until_s:
            number = next(numbers)
            body: dict[str, Any] = {"prompt": f"a red umbrella {number % 3}", "steps": 4}
            if number % 4 == 1:
                body |= {"stream": True, "partial_images": 2}
            if number % 4 == 2:
                body |= {"cache": {"mode": "approximate"}}
            if number % 16 == 3:
                body |= {"size": "33x33"}  # refused
            reply = httpx.post(
                f"{served.url}/v1/images/generations",
                json=body,
                headers={"x-request-id": f"load-{number}"},
                timeout=120.0,
            )
            assert reply.status_code in (200, 422), reply.text

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(client) for _ in range(4)]:
            done.result()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2.0).status_code == 200
    except httpx.HTTPError:
        return False


def _api(prometheus: str, what: str, **asked: str) -> Any:
    url = f"{prometheus}/api/v1/{what}?{urllib.parse.urlencode(asked)}"
    with urllib.request.urlopen(url, timeout=30) as reply:
        return json.load(reply)["data"]
