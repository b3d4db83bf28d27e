"""Finished pictures as OpenAI's reply, and their timings as headers."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from typing import Any

from engine.types import Timings
from server.messages import Drawn
from server.metrics import phases
from server.orders import Order
from server.request_log import slowest
from server.schemas.draw import DrawnReply
from server.schemas.openai import GenerationBody, ImageReply, ImagesReply, Usage
from server.sizes import text_of

TIMING_HEADERS: dict[str, Any] = {
    **{
        f"x-darkroom-{phase}-ms": {
            "schema": {"type": "number"},
            "description": f"Milliseconds of the {phase} phase; of several pictures, the longest.",
        }
        for phase, _ in phases(Timings())
    },
    "server-timing": {
        "schema": {"type": "string"},
        "description": "The same, where browsers show it.",
    },
}
"""What OpenAPI says of :func:`timing_headers`."""


def images_reply(
    body: GenerationBody, order: Order, pictures: Sequence[Drawn], urls: Sequence[str] = ()
) -> ImagesReply:
    """The pictures of ``order``, by link where there are ``urls``, else by value."""
    links: Sequence[str | None] = urls or [None] * len(pictures)
    return ImagesReply(
        created=int(time.time()),
        output_format=body.output_format or "png",
        quality=None if body.quality == "auto" else body.quality,
        size=text_of((order.width_px, order.height_px)),
        usage=usage_of(order.rows),
        data=[
            ImageReply(
                b64_json=base64.b64encode(picture.data).decode() if url is None else None,
                url=url,
                darkroom=DrawnReply.of(picture),
            )
            for picture, url in zip(pictures, links, strict=True)
        ],
    )


def usage_of(rows: int) -> Usage:
    """The cost of a request in UNet rows."""
    return Usage(output_tokens=rows, total_tokens=rows)


def timing_headers(pictures: Sequence[Drawn]) -> dict[str, str]:
    """``x-darkroom-…-ms`` and ``Server-Timing`` of a finished request."""
    timings = slowest([picture.timings for picture in pictures])
    times_ms = {phase: f"{seconds * 1000:.2f}" for phase, seconds in phases(timings)}
    headers = {f"x-darkroom-{phase}-ms": time_ms for phase, time_ms in times_ms.items()}
    headers["server-timing"] = ", ".join(
        f"{phase};dur={time_ms}" for phase, time_ms in times_ms.items()
    )
    return headers
