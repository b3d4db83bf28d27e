"""Clients of an application that is about to break."""

from __future__ import annotations

import base64
import contextlib
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from engine.types import Image
from tests.served import Served
from tests.serving import pixels

LONG_STEPS = 1000
TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Reply:
    """What a client got."""

    status: int
    retry_after_s: int | None
    pictures: tuple[Image, ...] = ()
    plan: str = ""
    """What drew them, by its digest."""


def draw(served: Served, *, seed: int = 0, steps: int = LONG_STEPS, **body: Any) -> Reply:
    """Ask for a picture and wait for it."""
    asked = {
        "prompt": "a red umbrella",
        "response_format": "b64_json",
        "seed": seed,
        "steps": steps,
    }
    url = f"{served.url}/v1/images/generations"
    reply = httpx.post(url, json={**asked, **body}, timeout=TIMEOUT_S)
    wait_s = reply.headers.get("retry-after")
    if reply.status_code != 200:
        return Reply(reply.status_code, None if wait_s is None else int(wait_s))
    data = reply.json()["data"]
    encoded = [base64.b64decode(item["b64_json"]) for item in data]
    pictures = tuple(pixels(picture) for picture in encoded)
    return Reply(200, None, pictures, data[0]["darkroom"]["plan_digest"])


def draw_many(served: Served, count: int, **body: Any) -> list[Future[Reply]]:
    """``count`` clients at once, each with a seed of its own."""
    pool = ThreadPoolExecutor(count)
    asked = [pool.submit(draw, served, seed=seed, **body) for seed in range(count)]
    pool.shutdown(wait=False)
    return asked


@contextlib.contextmanager
def asking(served: Served, clients: int, **body: Any) -> Iterator[list[Reply]]:
    """Clients that ask again as soon as they are answered, until the block ends; their replies."""
    got: list[Reply] = []
    leaving = threading.Event()
    seeds = itertools.count()

    def ask() -> None:
        while not leaving.is_set():
            got.append(draw(served, seed=next(seeds), **body))

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield got
    finally:
        leaving.set()
        for thread in threads:
            thread.join()


def replies(asked: list[Future[Reply]]) -> list[Reply]:
    """What they got."""
    return [future.result(TIMEOUT_S) for future in asked]


def same(one: list[Reply], other: list[Reply]) -> bool:
    """Whether both got the same pictures, to the last bit."""
    return all(
        len(a.pictures) == len(b.pictures) > 0
        and all(np.array_equal(x, y) for x, y in zip(a.pictures, b.pictures, strict=True))
        for a, b in zip(one, other, strict=True)
    )


def leave_after(served: Served, events: int, *, seed: int, steps: int) -> threading.Thread:
    """A client that reads so many lines of a stream of previews, and is gone."""

    def read() -> None:
        asked = {
            "prompt": "a red umbrella",
            "seed": seed,
            "steps": steps,
            "stream": True,
            "partial_images": 3,
        }
        url = f"{served.url}/v1/images/generations"
        with httpx.stream("POST", url, json=asked, timeout=TIMEOUT_S) as stream:
            for number, _ in enumerate(stream.iter_lines()):
                if number >= events:
                    return

    client = threading.Thread(target=read)
    client.start()
    return client
