"""Locust users of every interface, in Locust's own closed loop, with its page.

    locust -f loadtests/traffic/locustfile.py --host http://127.0.0.1:8000

Each user sends what :mod:`loadtests.traffic.plan` draws for its kind. For latencies to be quoted
use :mod:`loadtests.traffic.run`, whose arrivals do not wait for answers.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator

from locust import HttpUser, between, task

from loadtests.traffic.client import Outcome, send
from loadtests.traffic.plan import KINDS, Mix, Planned, plan

_KEY = os.environ.get("LOADTEST_API_KEY")
_seeds = itertools.count(1)


class DarkroomUser(HttpUser):  # type: ignore[misc]
    """A person who asks for a picture, looks at it, and asks again."""

    abstract = True
    wait_time = between(0.5, 3.0)
    kind = ""

    def on_start(self) -> None:
        """Draw this user's own requests."""
        weights = tuple(float(kind == self.kind) for kind in KINDS)
        self._planned: Iterator[Planned] = plan(
            itertools.repeat(0.0), Mix(kinds=weights), next(_seeds)
        )
        if _KEY:
            self.client.headers["Authorization"] = f"Bearer {_KEY}"

    @task  # type: ignore[untyped-decorator]
    def draw(self) -> None:
        """One request; its end, not its first byte, is what Locust counts."""
        planned = next(self._planned)
        began_s = time.time()
        outcome = send(self.client, self.host, planned, timeout_s=120)
        self._tell(outcome, began_s)

    def _tell(self, outcome: Outcome, began_s: float) -> None:
        failed = None if outcome.ok else RuntimeError(outcome.outcome)
        self.environment.events.request.fire(
            request_type=outcome.kind,
            name=f"{outcome.steps} steps, whole answer",
            response_time=outcome.total_s * 1000,
            response_length=0,
            exception=failed,
            context={},
            start_time=began_s,
        )


class GenerationUser(DarkroomUser):
    """OpenAI's images API, JSON answers."""

    weight = 7
    kind = "generation"


class StreamUser(DarkroomUser):
    """OpenAI's images API, streamed with previews."""

    weight = 1
    kind = "stream"


class JobUser(DarkroomUser):
    """Jobs: submit, follow the events, sometimes cancel."""

    weight = 2
    kind = "job"


class EditUser(DarkroomUser):
    """Image to image."""

    weight = 1
    kind = "edit"
