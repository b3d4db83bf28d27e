"""OpenAI's own Python client, unmodified, against ``darkroom serve``."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image as Pillow

from engine.types import Image

pytestmark = pytest.mark.full
PROMPT = "three red apples"
FAST = {"steps": 6, "seed": 11}


@pytest.fixture
def client(served: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served}/v1", api_key="unused", max_retries=0) as client:
        yield client


def pixels(encoded: str | None) -> Image:
    assert encoded is not None
    with Pillow.open(io.BytesIO(base64.b64decode(encoded))) as picture:
        return np.asarray(picture.convert("RGB"), dtype=np.uint8)


def drawn(client: openai.OpenAI, **fields: Any) -> list[Image]:
    reply = client.images.generate(prompt=PROMPT, extra_body=FAST, **fields)
    return [pixels(item.b64_json) for item in reply.data or ()]


def test_generate(client: openai.OpenAI) -> None:
    pictures = drawn(client, n=2, size="128x96")
    assert [picture.shape for picture in pictures] == [(96, 128, 3)] * 2
    assert (pictures[0] != pictures[1]).any(), "the second has the next seed"


def test_the_async_client_draws_the_same(client: openai.OpenAI, served: str) -> None:
    async def draw() -> list[Image]:
        async with openai.AsyncOpenAI(base_url=f"{served}/v1", api_key="unused") as other:
            replies = await asyncio.gather(
                *(
                    other.images.generate(prompt=PROMPT, extra_body={**FAST, "seed": seed})
                    for seed in (11, 12)
                )
            )
        return [pixels(reply.data[0].b64_json) for reply in replies if reply.data]

    np.testing.assert_array_equal(asyncio.run(draw()), drawn(client, n=2))


def test_streaming_shows_previews_and_ends_with_the_picture(client: openai.OpenAI) -> None:
    stream = client.images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body=FAST)
    kinds, last = [], None
    for event in stream:
        kinds.append(event.type)
        last = event.b64_json
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    np.testing.assert_array_equal(pixels(last), drawn(client)[0])


def test_edit_begins_from_the_picture(client: openai.OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "apples.png"
    first = drawn(client)[0]
    Pillow.fromarray(first).save(path)
    with path.open("rb") as file:
        reply = client.images.edit(image=file, prompt=PROMPT, extra_body={**FAST, "strength": 0.2})
    edited = pixels(reply.data[0].b64_json) if reply.data else np.zeros_like(first)
    away = np.abs(edited.astype(int) - first).mean()
    other = drawn(client, n=2)[1]
    assert 0 < away < np.abs(other.astype(int) - first).mean()


def test_links_are_fetched_with_any_client(client: openai.OpenAI) -> None:
    reply = client.images.generate(prompt=PROMPT, response_format="url", extra_body=FAST)
    assert reply.data
    assert reply.data[0].url is not None
    fetched = httpx.get(reply.data[0].url, trust_env=False)
    assert fetched.headers["content-type"] == "image/png"
    encoded = base64.b64encode(fetched.content).decode()
    np.testing.assert_array_equal(pixels(encoded), drawn(client)[0])


def test_models_list_the_default_first(client: openai.OpenAI) -> None:
    assert next(iter(client.models.list())).id == "tintype"
    assert client.models.retrieve("tintype").owned_by == "darkroom"


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"extra_body": {"steps": 1000}}, openai.BadRequestError, "steps"),
        ({"size": "100x100"}, openai.UnprocessableEntityError, "size"),
        ({"model": "dall-e-4"}, openai.NotFoundError, "model"),
        ({"extra_body": {"stepz": 4}}, openai.BadRequestError, "stepz"),
    ],
)
def test_refusals_become_the_clients_own_errors(
    client: openai.OpenAI, fields: dict[str, Any], error: type[openai.APIStatusError], param: str
) -> None:
    with pytest.raises(error) as raised:
        client.images.generate(prompt=PROMPT, **fields)
    assert raised.value.body is not None
    assert raised.value.param == param
    assert PROMPT not in str(raised.value)
