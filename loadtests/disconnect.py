"""How long a slot stays taken after its client has gone, on a whole server.

    python -m loadtests.disconnect [--clients 40] [--at-once 4] [--steps 50] [--json F]

Clients stream a picture's steps and close their socket at a random one, one at a time, while the
others keep the worker busy. From then on ``/metrics`` is read again and again, until the worker has
counted a trajectory out of its step loop (``darkroom_cancel_seconds``). A time ends with the page
that says so: what it takes to read a page, printed beside the times, is in them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx

from loadtests.common import conditions, model_folder, open_plan, settings_with_threads
from loadtests.server_processes import RunningServer, serving_darkroom
from loadtests.traffic.stats import quantile

PREVIEW = b"event: image_generation.partial_image"
_SAMPLE = re.compile(r"^(darkroom_\w+)(?:\{[^}]*\})? (\S+)", re.MULTILINE)
_MAX_LINE_BYTES = 4 << 20
_PATIENCE_S = 60.0
_LATE_S = 2.0
_PICTURES = "darkroom_pictures_total"


class TooLateError(Exception):
    """The picture was finished before its client could leave."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Departure:
    """One client that left.

    Attributes:
        step: after which it left.
        freed_s: from the close of its socket to the first page that counts its slot as free.
        ticks: that the worker finished in that time, at most.
    """

    step: int
    freed_s: float
    ticks: int


@dataclass(slots=True)
class Meter:
    """Reads the server's metrics, and remembers how long that takes."""

    client: httpx.AsyncClient
    reads_s: list[float] = field(default_factory=list)

    async def read(self) -> Mapping[str, float]:
        """Every metric, added up over its labels and replicas."""
        began_s = time.perf_counter()
        reply = await self.client.get("/metrics")
        reply.raise_for_status()
        self.reads_s.append(time.perf_counter() - began_s)
        return totals(reply.text)


def totals(page: str) -> Mapping[str, float]:
    """Samples of a page by name, those of different labels added up."""
    found: defaultdict[str, float] = defaultdict(float)
    for name, value in _SAMPLE.findall(page):
        found[name] += float(value)
    return found


class Crowd:
    """Keeps clients drawing, and lets them leave one at a time."""

    def __init__(self, url: httpx.URL, meter: Meter, *, steps: int, seed: int) -> None:
        self._url = url
        self._meter = meter
        self._steps = steps
        self._chance = random.Random(seed)
        self._leaving = asyncio.Lock()
        self._numbers = iter(range(1 << 30))
        self.departures: list[Departure] = []

    async def run(self, *, clients: int, at_once: int) -> None:
        """Until so many have left."""
        await asyncio.gather(*(self._one_after_another(clients) for _ in range(at_once)))

    async def _one_after_another(self, clients: int) -> None:
        while len(self.departures) < clients:
            # Not so late that the picture is finished while others leave.
            step = self._chance.randrange(1, self._steps - 10)
            with contextlib.suppress(TooLateError):
                await self._come_and_go(step, clients)

    async def _come_and_go(self, step: int, clients: int) -> None:
        reader, writer = await asyncio.open_connection(
            self._url.host, self._url.port, limit=_MAX_LINE_BYTES
        )
        try:
            writer.write(self._request(next(self._numbers)))
            await _until_step(reader, step)
            async with self._leaving:
                if len(self.departures) < clients:
                    self.departures.append(await self._leave(writer, step))
        finally:
            writer.close()

    async def _leave(self, writer: asyncio.StreamWriter, step: int) -> Departure:
        before = await self._meter.read()
        closed_at_s = time.perf_counter()
        writer.close()
        until_s = closed_at_s + _PATIENCE_S
        finished = False
        while time.perf_counter() < until_s:
            now = await self._meter.read()
            if _cancels(now) > _cancels(before):
                freed_s = time.perf_counter() - closed_at_s
                return Departure(step=step, freed_s=freed_s, ticks=_ticks(now) - _ticks(before))
            if not finished and now[_PICTURES] > before[_PICTURES]:
                finished = True  # this one, or another whose client waits for its turn to leave
                until_s = time.perf_counter() + _LATE_S
        if finished:
            raise TooLateError
        raise RuntimeError(f"a slot was not free {_PATIENCE_S:g} s after its client had left")

    def _request(self, seed: int) -> bytes:
        body = json.dumps(
            {
                "prompt": "a red umbrella",
                "steps": self._steps,
                "seed": seed,
                "stream": True,
                "partial_images": self._steps - 1,  # a preview after every step but the last
            }
        ).encode()
        head = (
            f"POST /v1/images/generations HTTP/1.1\r\nhost: {self._url.host}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


async def _until_step(reader: asyncio.StreamReader, step: int) -> None:
    """Read until the picture has done ``step`` steps.

    Raises:
        RuntimeError: the server refused, or ended the stream.
    """
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"the server answered {status!r}")
    while step:
        line = await reader.readline()
        if not line:
            raise RuntimeError("the stream ended before its picture")
        step -= line.strip() == PREVIEW


def _cancels(metrics: Mapping[str, float]) -> int:
    return int(metrics["darkroom_cancel_seconds_count"])


def _ticks(metrics: Mapping[str, float]) -> int:
    return int(metrics["darkroom_tick_seconds_count"])


@contextlib.contextmanager
def _started(options: argparse.Namespace) -> Iterator[RunningServer]:
    settings = settings_with_threads(options.threads)
    open_plan(settings, options.model, "onnxruntime", "fp32")
    folder = model_folder(settings, options.model)
    with serving_darkroom(folder, threads=options.threads) as server:
        yield server


async def _measured(url: str, options: argparse.Namespace) -> tuple[list[Departure], Meter, float]:
    """Departures, the meter, and how many pictures a tick held on average."""
    async with httpx.AsyncClient(base_url=url, timeout=_PATIENCE_S, trust_env=False) as client:
        meter = Meter(client)
        crowd = Crowd(httpx.URL(url), meter, steps=options.steps, seed=options.seed)
        before = await meter.read()
        await crowd.run(clients=options.clients, at_once=options.at_once)
        after = await meter.read()
    steps = after["darkroom_steps_total"] - before["darkroom_steps_total"]
    return crowd.departures, meter, steps / max(1, _ticks(after) - _ticks(before))


def _table(departures: Sequence[Departure]) -> str:
    freed_ms = [1000 * it.freed_s for it in departures]
    ticks = [float(it.ticks) for it in departures]
    rows = [("from the close to the free slot, ms", freed_ms), ("ticks in that time", ticks)]
    lines = ["| | median | p95 | most |", "|---|---|---|---|"]
    for name, values in rows:
        numbers = (statistics.median(values), quantile(values, 0.95), max(values))
        lines.append(f"| {name} | " + " | ".join(f"{number:.0f}" for number in numbers) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print a Markdown table, and write every departure as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tintype")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clients", type=int, default=40, help="that leave")
    parser.add_argument("--at-once", type=int, default=4, help="clients in the server")
    parser.add_argument("--steps", type=int, default=50, help="of each picture; more than 11")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.steps < 12:
        parser.error("--steps: at least 12")
    with _started(options) as server:
        departures, meter, occupancy = asyncio.run(_measured(server.url, options))
        metrics = totals(httpx.get(f"{server.url}/metrics", trust_env=False).text)
    in_worker_ms = 1000 * metrics["darkroom_cancel_seconds_sum"] / _cancels(metrics)
    tick_ms = 1000 * metrics["darkroom_tick_seconds_sum"] / _ticks(metrics)
    print(conditions(options, hide=("json",)), end="\n\n")
    print(_table(departures), end="\n\n")
    print(
        f"{len(departures)} departures; {occupancy:.1f} pictures in a tick of {tick_ms:.0f} ms"
        f" (mean); from the cancel in the worker to out of the loop {in_worker_ms:.0f} ms (mean);"
        f" a page of metrics takes {1000 * statistics.median(meter.reads_s):.0f} ms (median)"
    )
    if options.json is not None:
        found = {"departures": departures, "reads_s": meter.reads_s}
        options.json.write_text(json.dumps(found, default=asdict, indent=1))


if __name__ == "__main__":
    main()
