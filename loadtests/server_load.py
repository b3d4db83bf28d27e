"""Load on a server over HTTP: so many at once, or so many a second, and what came of it."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from loadtests.traffic.arrivals import Steady, arrival_times_s
from loadtests.traffic.stats import quantile

PNG = b"\x89PNG\r\n\x1a\n"
REQUEST_TIMEOUT_S = 600.0
_PROMPTS = Path(__file__).resolve().parent.parent / "models" / "prompts" / "unseen.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What every request asks for; prompts and seeds differ from one to the next.

    Attributes:
        deadline_s: that each names; None names none.
    """

    steps: int
    guidance: float
    first_seed: int = 0
    deadline_s: float | None = None

    def bodies(self) -> Iterator[dict[str, Any]]:
        """Requests without end: the prompts of unseen compositions in turn."""
        prompts = [str(item["prompt"]) for item in json.loads(_PROMPTS.read_text())]
        for i, prompt in enumerate(itertools.cycle(prompts)):
            seed = self.first_seed + i
            body = {
                "prompt": prompt,
                "steps": self.steps,
                "guidance": self.guidance,
                "seed": seed,
                "response_format": "b64_json",
            }
            if self.deadline_s is not None:
                body["deadline_s"] = self.deadline_s
            yield body


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What came back.

    Attributes:
        wall_s: from the first request to the last reply.
        latencies_s: of pictures, from when the request was due.
        failures: by what the server said, refusals among them.
        refusals: (from when the request was due, what ``Retry-After`` said) of each 429 with one.
        client_cpu_s: what this process spent on it, the load generator's own share.
    """

    wall_s: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    refusals: list[tuple[float, float]] = field(default_factory=list)
    client_cpu_s: float = 0.0

    @property
    def pictures_per_s(self) -> float:
        """Pictures, refusals and failures not counted, a second."""
        return len(self.latencies_s) / self.wall_s

    def quantile_s(self, part: float) -> float:
        """Latency that ``part`` of the pictures did not exceed; NaN without pictures."""
        return quantile(self.latencies_s, part)


def closed_loop(url: str, work: Work, *, at_once: int, pictures: int) -> Outcome:
    """Keep ``at_once`` requests in flight until ``pictures`` have been asked for."""

    async def play(client: httpx.AsyncClient, outcome: Outcome) -> None:
        bodies = itertools.islice(work.bodies(), pictures)

        async def one_after_another() -> None:
            for body in bodies:
                await _draw(client, body, time.perf_counter(), outcome)

        await asyncio.gather(*(one_after_another() for _ in range(at_once)))

    return asyncio.run(_measured(url, play))


def open_loop(url: str, work: Work, *, per_s: float, for_s: float, seed: int) -> Outcome:
    """Send requests at random times, ``per_s`` a second on average, whatever comes back.

    The times depend on ``seed`` and on the rate only: every server sees the same arrivals.
    """
    due_s = list(arrival_times_s(Steady(per_s), for_s, seed))

    async def play(client: httpx.AsyncClient, outcome: Outcome) -> None:
        began_s = time.perf_counter()

        async def one(after_s: float, body: dict[str, Any]) -> None:
            await asyncio.sleep(max(0.0, began_s + after_s - time.perf_counter()))
            await _draw(client, body, began_s + after_s, outcome)

        await asyncio.gather(*map(one, due_s, work.bodies()))

    return asyncio.run(_measured(url, play))


async def _measured(url: str, play: Any) -> Outcome:
    outcome = Outcome()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    async with httpx.AsyncClient(
        base_url=url, timeout=REQUEST_TIMEOUT_S, limits=limits, trust_env=False
    ) as client:
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        await play(client, outcome)
        outcome.wall_s = time.perf_counter() - wall_s
        outcome.client_cpu_s = time.process_time() - cpu_s
    return outcome


async def _draw(
    client: httpx.AsyncClient, body: dict[str, Any], due_s: float, outcome: Outcome
) -> None:
    try:
        reply = await client.post("/v1/images/generations", json=body)
    except httpx.HTTPError as error:
        outcome.failures[type(error).__name__] += 1
        return
    took_s = time.perf_counter() - due_s
    if reply.status_code != 200:
        outcome.failures[f"HTTP {reply.status_code}"] += 1
        if reply.status_code == 429 and "retry-after" in reply.headers:
            outcome.refusals.append((took_s, float(reply.headers["retry-after"])))
        return
    if not base64.b64decode(reply.json()["data"][0]["b64_json"]).startswith(PNG):
        outcome.failures["not a PNG"] += 1
        return
    outcome.latencies_s.append(took_s)
