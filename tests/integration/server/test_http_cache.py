"""What replies say of the noise cache, over a real engine: by value, streamed, and of jobs."""

from __future__ import annotations

import base64
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cache.profiles import FILE_NAME, write_profile
from engine.ports import JumpTable, ReuseProfile, StateKind
from tests.clients.local import listening
from tests.redis_server import free_port
from tests.serving import settings_for, tiny_config

STEPS = 8
HALF = ReuseProfile(
    jumps=JumpTable(((-1.0, 0.5),)), kind=StateKind.CLEAN, fractions=(1.0,), checkpoint=None
)
"""Any prompt may skip half of the steps, from any finished picture."""
PATIENCE_S = 60.0
APPROXIMATE = {"mode": "approximate"}
EXACT = {"mode": "exact"}


@pytest.fixture(scope="module")
def server(
    tiny_checkpoint: Callable[[str], Path], plans: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("cached")
    checkpoint = folder / "tiny-text"
    shutil.copytree(tiny_checkpoint("text"), checkpoint)
    write_profile(checkpoint / FILE_NAME, HALF, {})
    config = tiny_config(checkpoint, http={"port": free_port()}, cache={"budget_s": 10.0})
    with (
        listening(config, settings_for(plans, folder / "home")) as url,
        httpx.Client(base_url=url, timeout=PATIENCE_S) as client,
    ):
        yield client


def ask(
    server: httpx.Client, path: str = "/v1/images/generations", **fields: Any
) -> httpx.Response:
    reply = server.post(path, json={"steps": STEPS} | fields)
    assert reply.is_success, reply.text
    return reply


def told(server: httpx.Client, **fields: Any) -> dict[str, Any]:
    """What the reply of one picture says of it."""
    darkroom: dict[str, Any] = ask(server, **fields).json()["data"][0]["darkroom"]
    return darkroom


def hit(server: httpx.Client, **fields: Any) -> dict[str, Any]:
    """The same once the cache has written, which no request waits for."""
    until_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < until_s:
        known = told(server, **fields)
        if known["cache"]["outcome"] == "hit":
            return known
    raise AssertionError(known["cache"])


def test_an_approximate_hit_names_what_it_reused(server: httpx.Client) -> None:
    # Negative prompts are part of the key: each test has entries of its own.
    one = {"negative_prompt": "one", "cache": APPROXIMATE, "guidance": 4.0}
    missed = told(server, prompt="a red cat", **one)["cache"]
    assert missed == {
        "outcome": "miss",
        "mode": "approximate",
        "source": None,
        "similarity": None,
        "steps_skipped": 0,
        "note": "",
    }
    known = hit(server, prompt="a blue cat", **one)
    reuse = known["cache"]
    assert reuse["mode"] == "approximate"
    assert reuse["source"]
    assert 0.0 < reuse["similarity"] <= 1.0
    assert reuse["steps_skipped"] == STEPS // 2
    assert known["approximations"]["noise_cache"] == f"{STEPS // 2} of {STEPS} steps"
    assert "cat" not in json.dumps(known)


def test_a_miss_tells_how_close_the_closest_was(server: httpx.Client) -> None:
    two = {"negative_prompt": "two", "guidance": 4.0}
    told(server, prompt="a red cat", cache=APPROXIMATE, **two)
    hit(server, prompt="a red cat", cache=APPROXIMATE, **two)
    strict = APPROXIMATE | {"min_similarity": 1.0}
    missed = told(server, prompt="the green house by the sea", cache=strict, **two)["cache"]
    assert (missed["outcome"], missed["steps_skipped"], missed["source"]) == ("miss", 0, None)
    assert missed["similarity"] < 1.0


def test_an_exact_hit_says_so_and_is_the_same_picture(server: httpx.Client) -> None:
    asked: dict[str, Any] = {"prompt": "a red cat", "seed": 7, "cache": EXACT}
    first = ask(server, **asked).json()["data"][0]
    assert first["darkroom"]["cache"]["outcome"] == "miss"
    assert first["darkroom"]["cache"]["mode"] == "exact"
    known = hit(server, **asked)
    reuse = known["cache"]
    assert (reuse["mode"], reuse["similarity"], reuse["steps_skipped"]) == ("exact", 1.0, STEPS)
    assert reuse["source"]
    assert known["approximations"] == {}
    again = ask(server, **asked).json()["data"][0]
    assert again["b64_json"] == first["b64_json"]


def test_editing_bypasses_the_cache_and_says_so(server: httpx.Client) -> None:
    drawn = ask(server, prompt="a red cat", seed=1).json()["data"][0]
    reply = server.post(
        "/v1/images/edits",
        data={"prompt": "a blue cat", "steps": STEPS, "cache": json.dumps(APPROXIMATE)},
        files={"image": ("a.png", base64.b64decode(drawn["b64_json"]))},
    )
    assert reply.is_success, reply.text
    reuse = reply.json()["data"][0]["darkroom"]["cache"]
    assert (reuse["outcome"], reuse["mode"]) == ("bypassed", "approximate")
    assert reuse["note"] == "only text to image uses the noise cache"


@pytest.mark.parametrize("fields", [{}, {"seed": 5}, {"cache": {"mode": "off"}}])
def test_whoever_asks_for_nothing_is_told_that_it_was_off(
    server: httpx.Client, fields: dict[str, Any]
) -> None:
    reuse = told(server, prompt="a red cat", **fields)["cache"]
    assert (reuse["outcome"], reuse["mode"], reuse["source"]) == ("off", "off", None)


def test_streams_and_jobs_say_the_same(server: httpx.Client) -> None:
    three: dict[str, Any] = {
        "prompt": "a red cat",
        "negative_prompt": "three",
        "guidance": 4.0,
        "cache": APPROXIMATE,
    }
    told(server, **three)
    expected = hit(server, **three)["cache"]
    lines = ask(server, stream=True, **three).text.splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data:")]
    streamed = events[-1]["darkroom"]["cache"]
    assert streamed.keys() == expected.keys()
    assert (streamed["outcome"], streamed["steps_skipped"]) == ("hit", STEPS // 2)

    job = ask(server, "/v1/jobs", **three).json()["id"]
    events_text = server.get(f"/v1/jobs/{job}/events").text  # ends with the job
    assert '"steps_skipped":4' in events_text.replace(" ", "")
    [stored] = server.get(f"/v1/jobs/{job}").json()["data"]
    assert stored["darkroom"]["cache"]["outcome"] == "hit"
    assert stored["darkroom"]["cache"]["steps_skipped"] == STEPS // 2


def test_without_a_cache_there_is_nothing_to_tell(
    tiny_checkpoint: Callable[[str], Path], plans: Path, tmp_path: Path
) -> None:
    config = tiny_config(
        tiny_checkpoint("text"), http={"port": free_port()}, cache={"enabled": False}
    )
    with (
        listening(config, settings_for(plans, tmp_path / "home")) as url,
        httpx.Client(base_url=url, timeout=PATIENCE_S) as client,
    ):
        assert told(client, prompt="a red cat", cache=APPROXIMATE)["cache"] is None
