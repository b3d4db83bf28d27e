"""A second worker while much is outstanding, and none too many afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.clients import LONG_STEPS, draw_many, replies
from tests.served import darkroom_serve, wait_until

pytestmark = pytest.mark.full

CLIENTS = 80


def test_workers_follow_the_steps_that_are_outstanding(
    tiny_checkpoint: Callable[[str], Path], plans: Path, tmp_path: Path
) -> None:
    with darkroom_serve(
        tiny_checkpoint("text"),
        plans,
        tmp_path / "home",
        limits={"max_steps": LONG_STEPS},
        admission={"max_queued_steps": 2 * LONG_STEPS * CLIENTS, "max_wait_s": None},
        workers={"replicas": 1, "max_replicas": 2, "scale_down_after_s": 5.0},
    ) as served:
        asked = draw_many(served, CLIENTS)
        wait_until(lambda: served.metric("darkroom_router_workers") == 2)
        both = set(served.replicas("Worker"))
        assert len(both) == 2
        # One worker leaves while others may still draw: it finishes what it has.
        assert [reply.status for reply in replies(asked)] == [200] * CLIENTS
        wait_until(lambda: len(served.replicas("Worker")) == 1)
        wait_until(lambda: served.metric("darkroom_router_workers") == 1)
        assert set(served.replicas("Worker")) < both
        assert [reply.status for reply in replies(draw_many(served, 4, steps=4))] == [200] * 4
