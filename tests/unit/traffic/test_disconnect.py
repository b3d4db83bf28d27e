"""The measurement of clients that leave: what it reads, and what it takes for a step."""

from __future__ import annotations

import asyncio

import pytest

from loadtests.disconnect import PREVIEW, _until_step, totals

PAGE = """# TYPE darkroom_tick_seconds histogram
darkroom_tick_seconds_count{model="tintype",replica="a"} 40.0
darkroom_tick_seconds_count{model="tintype",replica="b"} 2.0
darkroom_cancel_seconds_count{replica="a"} 3.0
darkroom_replica_up 1
python_info 9
"""


def test_metrics_are_added_up_over_replicas() -> None:
    found = totals(PAGE)
    assert found["darkroom_tick_seconds_count"] == 42.0
    assert found["darkroom_cancel_seconds_count"] == 3.0
    assert found["darkroom_replica_up"] == 1.0
    assert found["darkroom_pictures_total"] == 0.0  # nothing was drawn yet


def stream(head: bytes, previews: int) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    reader.feed_data(head + b"\r\n\r\n")
    for _ in range(previews):
        event = PREVIEW + b'\r\ndata: {"type": "image_generation.partial_image"}\r\n\r\n'
        reader.feed_data(b"%x\r\n%s\r\n" % (len(event), event))
    reader.feed_eof()
    return reader


def test_steps_are_counted_in_a_chunked_stream() -> None:
    async def read(previews: int, head: bytes = b"HTTP/1.1 200 OK") -> None:
        await _until_step(stream(head, previews), 3)

    asyncio.run(read(3))
    with pytest.raises(RuntimeError, match="ended"):
        asyncio.run(read(2))
    with pytest.raises(RuntimeError, match="429"):
        asyncio.run(read(3, b"HTTP/1.1 429 Too Many Requests"))
