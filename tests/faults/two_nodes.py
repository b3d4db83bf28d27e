"""A cluster of two nodes under load, one of them cut off for a while: what clients notice.

    python -m tests.faults.two_nodes

Both nodes are network namespaces of this machine, each with a worker on one thread; gateway and
router are on the head, clients outside. Packets to and from the second node vanish: nothing is
refused and no connection is reset. Prints a table for ``loadtests/RESULTS.md``. Needs root.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import httpx
import numpy as np
import typer

from engine.types import Image
from server.settings import Settings
from tests.faults.cluster import Cluster, two_nodes
from tests.faults.netns import why_not
from tests.serving import pixels

SEEDS = 16
"""Pictures that are asked for again and again; each has to come out the same every time."""
REPLY_TIMEOUT_S = 120.0
RECOVERY_TIMEOUT_S = 180.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One request, by the clients' clock."""

    seed: int
    asked_s: float
    answered_s: float
    status: int
    attempts: int = 0
    picture: Image | None = None

    @property
    def seconds(self) -> float:
        """How long the client waited."""
        return self.answered_s - self.asked_s


@dataclass(slots=True)
class Run:
    """What happened when.

    Attributes:
        cut_s, mended_s, whole_s: the node was cut off; it could be reached again; its worker was
            back in the fleet and drew.
    """

    answers: list[Answer] = field(default_factory=list)
    cut_s: float = 0.0
    mended_s: float = 0.0
    whole_s: float = 0.0

    @property
    def failed(self) -> list[Answer]:
        """Answers without a picture."""
        return [answer for answer in self.answers if answer.picture is None]

    @property
    def before(self) -> list[Answer]:
        """Answered before the node was cut off."""
        return [answer for answer in self.answers if answer.answered_s <= self.cut_s]

    @property
    def during(self) -> list[Answer]:
        """At work or asked for while it was away."""
        return [
            answer
            for answer in self.answers
            if answer.answered_s > self.cut_s and answer.asked_s <= self.mended_s
        ]

    @property
    def meanwhile(self) -> list[Answer]:
        """Asked for and answered in the second half of the time that it was away."""
        half_s = (self.cut_s + self.mended_s) / 2
        return [
            answer
            for answer in self.answers
            if answer.asked_s >= half_s and answer.answered_s <= self.mended_s
        ]

    @property
    def after(self) -> list[Answer]:
        """Asked for once its worker drew again."""
        return [answer for answer in self.answers if answer.asked_s >= self.whole_s]

    @property
    def moved(self) -> list[Answer]:
        """Finished by another worker than the one that began."""
        return [answer for answer in self.answers if answer.attempts > 1]

    def differing(self) -> list[Answer]:
        """Pictures that are not, to the last bit, the first one of their seed."""
        first: dict[int, Image] = {}
        for answer in self.answers:
            if answer.picture is not None:
                first.setdefault(answer.seed, answer.picture)
        return [
            answer
            for answer in self.answers
            if answer.picture is not None and not np.array_equal(answer.picture, first[answer.seed])
        ]


class Clients:
    """So many at once, each asking again as soon as it is answered."""

    def __init__(self, url: str, run: Run, *, count: int, steps: int) -> None:
        self._url = url
        self._run = run
        self._steps = steps
        self._seeds = itertools.cycle(range(SEEDS))
        self._lock = threading.Lock()
        self._leaving = threading.Event()
        self._threads = [threading.Thread(target=self._ask_forever) for _ in range(count)]

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Ask until the block ends, and wait for the last answers."""
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._leaving.set()
            for thread in self._threads:
                thread.join()

    def _ask_forever(self) -> None:
        with httpx.Client(timeout=REPLY_TIMEOUT_S) as client:
            while not self._leaving.is_set():
                with self._lock:
                    seed = next(self._seeds)
                answer = self._ask(client, seed)
                with self._lock:
                    self._run.answers.append(answer)

    def _ask(self, client: httpx.Client, seed: int) -> Answer:
        asked_s = time.monotonic()
        body = {
            "prompt": "a red umbrella",
            "seed": seed,
            "steps": self._steps,
            "response_format": "b64_json",
        }
        try:
            reply = client.post(f"{self._url}/v1/images/generations", json=body)
        except httpx.HTTPError:
            return Answer(seed, asked_s, time.monotonic(), 0)
        answered_s = time.monotonic()
        if reply.status_code != 200:
            return Answer(seed, asked_s, answered_s, reply.status_code)
        [item] = reply.json()["data"]
        picture = pixels(base64.b64decode(item["b64_json"]))
        return Answer(seed, asked_s, answered_s, 200, item["darkroom"]["attempts"], picture)


def play(
    cluster: Cluster, *, clients: int, steps: int, calm_s: float, cut_s: float, after_s: float
) -> Run:
    """Load, cut the second node off for ``cut_s`` seconds, reconnect it, wait until it draws.

    Raises:
        RuntimeError: it did not come back.
    """
    run = Run()
    with Clients(cluster.url, run, count=clients, steps=steps).at_work():
        time.sleep(calm_s)
        before = set(_drew(cluster))
        _say(f"{len(run.answers)} answers; the second node is cut off")
        run.cut_s = time.monotonic()
        cluster.node.cut_off()
        time.sleep(cut_s)
        cluster.node.reconnect()
        run.mended_s = time.monotonic()
        _say(f"{len(run.answers)} answers; it can be reached again")
        run.whole_s = _wait_until_whole(cluster, before)
        _say(f"{len(run.answers)} answers; its worker draws again")
        time.sleep(after_s)
    return run


def table(run: Run) -> str:
    """Of a run, in Markdown."""
    rows = [
        "| | requests | failed | pictures/s | p50 | p95 | longest |",
        "|---|---|---|---|---|---|---|",
    ]
    spans = (
        ("before", run.before, run.cut_s - min(answer.asked_s for answer in run.answers)),
        ("one node cut off", run.during, max(a.answered_s for a in run.during) - run.cut_s),
        ("both again", run.after, max(a.answered_s for a in run.after) - run.whole_s),
    )
    for name, answers, span_s in spans:
        seconds = [answer.seconds for answer in answers]
        failed = sum(answer.picture is None for answer in answers)
        rows.append(
            f"| {name} | {len(answers)} | {failed} | {len(answers) / span_s:.2f} "
            f"| {statistics.median(seconds):.2f} s | {_p95(seconds):.2f} s | {max(seconds):.2f} s |"
        )
    moved = [answer.seconds for answer in run.moved]
    return "\n".join(
        [
            *rows,
            "",
            f"{len(run.answers)} requests, {len(run.failed)} failed;"
            f" {len(run.differing())} pictures differ from the first of their seed.",
            f"Cut off for {run.mended_s - run.cut_s:.0f} s. {len(moved)} pictures were finished by"
            f" another worker, the last {max(moved, default=0.0):.1f} s after it was asked for.",
            f"The worker of the second node drew again {run.whole_s - run.mended_s:.0f} s after it"
            " could be reached.",
        ]
    )


def main(
    clients: Annotated[int, typer.Option(help="Clients at once.")] = 8,
    steps: Annotated[int, typer.Option(help="Of each picture.")] = 20,
    calm_s: Annotated[float, typer.Option(help="Load before the node is cut off.")] = 20.0,
    cut_s: Annotated[float, typer.Option(help="For how long it is.")] = 40.0,
    after_s: Annotated[float, typer.Option(help="Load once it is whole again.")] = 20.0,
    logs: Annotated[Path | None, typer.Option(help="Folder to keep the logs in.")] = None,
) -> None:
    """Cut a node off under load, and print what clients noticed."""
    if (reason := why_not()) is not None:
        raise typer.BadParameter(reason)
    home = Settings.from_environment().home
    with tempfile.TemporaryDirectory() as scratch, two_nodes(logs or Path(scratch), home) as served:
        _say("both nodes are up")
        run = play(
            served, clients=clients, steps=steps, calm_s=calm_s, cut_s=cut_s, after_s=after_s
        )
        _say(f"ray start of the second node: {served.node_starts} times")
        _say(f"exit status at SIGTERM: {served.terminate()}")
    print(table(run))


def _wait_until_whole(cluster: Cluster, before: set[str]) -> float:
    """When both nodes' workers have drawn since; a worker that was started anew counts from 0."""
    until_s = time.monotonic() + RECOVERY_TIMEOUT_S
    drawn = _drew(cluster)
    while time.monotonic() < until_s:
        time.sleep(0.5)
        with contextlib.suppress(httpx.HTTPError):
            now = _drew(cluster)
            if sum(now[worker] > drawn.get(worker, 0.0) for worker in now) == len(before):
                return time.monotonic()
    raise RuntimeError(f"the second node is not back; workers: {sorted(_drew(cluster))}")


def _drew(cluster: Cluster) -> dict[str, float]:
    """Pictures by worker, of those that answer."""
    return cluster.samples("darkroom_pictures_total")


def _p95(seconds: Sequence[float]) -> float:
    return float(np.percentile(seconds, 95))


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    typer.run(main)
