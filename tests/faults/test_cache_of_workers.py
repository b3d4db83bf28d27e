"""The noise cache in the memory of two worker processes, as an operator sees and clears it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults.clients import asking
from tests.served import Served, darkroom_serve, wait_until
from tests.serving import MODEL

pytestmark = pytest.mark.full

CLIENTS = 6
STEPS = 40


def test_what_two_workers_hold_is_summed_and_forgotten_by_both(
    tiny_checkpoint: Callable[[str], Path], plans: Path, tmp_path: Path
) -> None:
    with darkroom_serve(
        tiny_checkpoint("text"), plans, tmp_path / "home", workers={"replicas": 2}
    ) as served:
        with asking(served, CLIENTS, steps=STEPS, cache={"mode": "approximate"}) as got:
            wait_until(lambda: all(worker["states"] for worker in workers_of(served)))
        assert {reply.status for reply in got} == {200}
        held = settled(served)
        assert (held["backend"], held["missing"]) == ("memory", [])
        assert len(held["workers"]) == 2
        [share] = held["shares"]
        assert share["models"] == [MODEL]
        for name in ("entries", "states", "bytes"):
            assert share[name] == held[name] == sum(worker[name] for worker in held["workers"])
        assert share["limit_bytes"] == 2 * held["limit_bytes"]
        cleared = httpx.delete(f"{served.url}/v1/cache", params={"model": MODEL}, timeout=30.0)
        assert cleared.status_code == 200, cleared.text
        assert {name: cleared.json()[name] for name in ("entries", "states", "bytes")} == {
            name: held[name] for name in ("entries", "states", "bytes")
        }
        assert [worker["states"] for worker in workers_of(served)] == [0, 0]


def look(served: Served) -> dict[str, Any]:
    reply = httpx.get(f"{served.url}/v1/cache", timeout=30.0)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def workers_of(served: Served) -> list[dict[str, Any]]:
    found = look(served)["workers"]
    return found if len(found) == 2 else [{"states": 0}]


def settled(served: Served) -> dict[str, Any]:
    """What is held once nothing is written any more: no picture waits for its states' writing."""
    looks = [look(served)]

    def same_again() -> bool:
        looks.append(look(served))
        return bool(looks[-1] == looks[-2])

    wait_until(same_again)
    return looks[-1]
