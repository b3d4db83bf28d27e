"""The HTTP application over uvicorn and a real engine: sockets, OpenAI's client, hanging up."""

from __future__ import annotations

import asyncio
import base64
import io
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import schemathesis
from PIL import Image as Pillow
from schemathesis.generation import GenerationMode

from engine.png import read_parameters
from engine.types import Image
from loadtests.server_processes import free_port
from tests.clients.local import listening
from tests.integration.test_http_openapi import explore
from tests.serving import settings_for, tiny_config

PATIENCE_S = 60.0
PROMPT = "a red umbrella"


@pytest.fixture(scope="module")
def url(
    tiny_checkpoint: Callable[[str], Path], plans: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A tiny model behind uvicorn, in this process."""
    config = tiny_config(
        tiny_checkpoint("text"),
        http={"port": free_port()},
        limits={"max_pictures": 2, "max_steps": 150, "max_side_px": 64},
    )
    with listening(config, settings_for(plans, tmp_path_factory.mktemp("live") / "home")) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def pixels(encoded: str | None) -> Image:
    assert encoded is not None
    with Pillow.open(io.BytesIO(base64.b64decode(encoded))) as picture:
        return np.asarray(picture.convert("RGB"), dtype=np.uint8)


def drawn(client: openai.OpenAI, *, seed: int) -> Image:
    reply = client.images.generate(prompt=PROMPT, extra_body={"steps": 4, "seed": seed})
    assert reply.data
    return pixels(reply.data[0].b64_json)


def test_a_seed_means_one_picture_in_every_interface(client: openai.OpenAI, url: str) -> None:
    pair = client.images.generate(prompt=PROMPT, n=2, extra_body={"steps": 4, "seed": 8})
    assert pair.data
    first, second = (pixels(item.b64_json) for item in pair.data)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(second, drawn(client, seed=9))
    body = {"prompt": PROMPT, "steps": 4, "seed": 9}
    other = httpx.post(f"{url}/sdapi/v1/txt2img", json=body, timeout=PATIENCE_S).json()
    np.testing.assert_array_equal(second, pixels(other["images"][0]))
    stream = client.images.generate(
        prompt=PROMPT, stream=True, partial_images=1, extra_body={"steps": 4, "seed": 9}
    )
    events = list(stream)
    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    np.testing.assert_array_equal(second, pixels(events[-1].b64_json))


def test_files_hold_what_drew_them(client: openai.OpenAI) -> None:
    reply = client.images.generate(
        prompt=PROMPT, output_format="webp", extra_body={"steps": 3, "seed": 4}
    )
    assert reply.data
    file = io.BytesIO(base64.b64decode(reply.data[0].b64_json or ""))
    parameters = read_parameters(file)
    assert parameters is not None
    assert (parameters.prompt, parameters.settings["Seed"]) == (PROMPT, "4")


def test_edits_and_the_async_client(client: openai.OpenAI, url: str) -> None:
    buffer = io.BytesIO()
    Pillow.fromarray(drawn(client, seed=1)).save(buffer, "PNG")
    fields = {"prompt": PROMPT, "extra_body": {"steps": 4, "seed": 1, "strength": 0.5}}

    async def draw() -> list[Image]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused") as other:
            image = ("a.png", buffer.getvalue())
            replies = await asyncio.gather(
                *(other.images.edit(image=image, **fields) for _ in range(2))  # type: ignore[call-overload]
            )
        return [pixels(reply.data[0].b64_json) for reply in replies]

    one, two = asyncio.run(draw())
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, pixels(base64.b64encode(buffer.getvalue()).decode()))


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.images.generate(prompt=PROMPT, extra_body={"stepz": 1})
    assert (raised.value.param, raised.value.code) == ("stepz", "invalid_value")
    with pytest.raises(openai.UnprocessableEntityError, match="nearest allowed is 64x32"):
        client.images.generate(prompt=PROMPT, size="70x33")
    # What only the engine knows comes back through the worker.
    with pytest.raises(openai.UnprocessableEntityError, match="schedule"):
        client.images.generate(prompt=PROMPT, extra_body={"solver": "ddim", "schedule": "karras"})


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_slot(url: str, stream: bool) -> None:
    host, port = url.removeprefix("http://").split(":")
    body = b'{"prompt": "x", "steps": 150, "n": 2, "stream": %s}' % str(stream).lower().encode()
    head = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        wait_for(url, lambda tasks: tasks == 2)
    wait_for(url, lambda tasks: tasks == 0)


def wait_for(url: str, holds: Callable[[float], bool]) -> None:
    """Until the worker's own count of its tasks is as it should be."""
    ends_at_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < ends_at_s:
        page = httpx.get(f"{url}/metrics", timeout=PATIENCE_S).text
        tasks = [line for line in page.splitlines() if line.startswith("darkroom_live_tasks{")]
        if holds(float(tasks[0].rpartition(" ")[2])):
            return
    raise AssertionError("the worker's tasks did not become what they should")


@pytest.fixture(scope="module")
def quick_url(
    tiny_checkpoint: Callable[[str], Path], plans: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The same with so few steps allowed that hundreds of made-up requests take minutes."""
    config = tiny_config(
        tiny_checkpoint("text"),
        http={"port": free_port()},
        limits={"max_pictures": 2, "max_steps": 3, "max_side_px": 64, "max_input_px": 256 * 256},
    )
    with listening(config, settings_for(plans, tmp_path_factory.mktemp("quick") / "home")) as url:
        yield url


@pytest.mark.full
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_made_up_requests_on_a_real_engine(quick_url: str, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{quick_url}/openapi.json")
    seen = set(explore(schema, mode, examples=15))
    assert {"POST /v1/images/generations", "POST /v1/jobs", "POST /sdapi/v1/img2img"} <= seen
