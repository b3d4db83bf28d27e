"""The OpenAI Images interface over a dispatcher that follows a script."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image as Pillow
from starlette.testclient import TestClient

from engine.errors import (
    ClosedError,
    ExecutionError,
    OverloadedError,
)
from engine.types import MAX_SEED
from server.config import LimitsConfig, ModelConfig, ServeConfig
from server.errors import DeadlineTooShortError
from server.gateway import create_app
from tests.unit.server.scripted import MODEL, ScriptedDispatcher, picture_file, services_of

CONFIG = ServeConfig(
    models=(ModelConfig(id="tintype", aliases=("gpt-image-1",)),),
    limits=LimitsConfig(max_pictures=4, max_steps=60),
)


_DISPATCHER = ScriptedDispatcher()


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(create_app(services_of(_DISPATCHER, CONFIG))) as client:
        yield client


@pytest.fixture(autouse=True)
def dispatcher() -> ScriptedDispatcher:
    """The one behind ``client``, as new."""
    _DISPATCHER.forget()
    return _DISPATCHER


TOO_SHORT = DeadlineTooShortError("the picture takes 2 s even alone", retry_after_s=4.2)


def generate(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/images/generations", json={"prompt": "a red umbrella", **fields})


def error_of(reply: Any, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"type", "code", "message", "param"}
    assert "umbrella" not in reply.text
    return error


def test_a_prompt_becomes_a_picture_that_says_how_it_was_drawn(client: TestClient) -> None:
    reply = generate(client, seed=7, steps=5).json()
    (picture,) = reply["data"]
    opened = Pillow.open(io.BytesIO(base64.b64decode(picture["b64_json"])))
    assert (opened.format, opened.size) == ("PNG", (64, 64))
    assert (reply["size"], reply["output_format"]) == ("64x64", "png")
    assert picture["darkroom"]["seed"] == 7
    assert picture["darkroom"]["solver"] == "dpmpp_2m"
    assert picture["darkroom"]["approximations"] == {"precision": "int8"}
    assert picture["darkroom"]["timings_ms"]["denoise"] == 300.0
    # Five steps of two rows, since guidance is on.
    assert reply["usage"]["total_tokens"] == 10


def test_picture_i_is_drawn_with_seed_plus_i(
    client: TestClient, dispatcher: ScriptedDispatcher
) -> None:
    reply = generate(client, n=3, seed=41).json()
    assert [item["darkroom"]["seed"] for item in reply["data"]] == [41, 42, 43]
    assert [task.request.seed for task in dispatcher.tasks] == [41, 42, 43]
    assert len({task.id for task in dispatcher.tasks}) == 3
    drawn = generate(client, n=2).json()["data"]
    assert drawn[1]["darkroom"]["seed"] == drawn[0]["darkroom"]["seed"] + 1


def test_timings_travel_in_headers(client: TestClient) -> None:
    headers = generate(client).headers
    assert headers["x-darkroom-queue-ms"] == "1.00"
    assert headers["x-darkroom-denoise-ms"] == "300.00"
    assert "decode;dur=40.00" in headers["server-timing"]


def test_the_clients_request_id_comes_back_and_names_the_tasks(
    client: TestClient, dispatcher: ScriptedDispatcher
) -> None:
    given = client.post(
        "/v1/images/generations", json={"prompt": "x"}, headers={"x-request-id": "abc-1"}
    )
    assert given.headers["x-request-id"] == "abc-1"
    assert dispatcher.tasks[0].id.startswith("abc-1.")
    forged = client.get("/healthz", headers={"x-request-id": "a b\x7f"})
    assert len(forged.headers["x-request-id"]) == 32


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({}, 20),
        ({"quality": "low"}, 10),
        ({"quality": "hd"}, 30),
        ({"quality": "hd", "steps": 3}, 3),
        ({"quality": "high", "solver": "lcm"}, 6),
    ],
)
def test_quality_stands_for_steps(
    client: TestClient, dispatcher: ScriptedDispatcher, fields: dict[str, Any], steps: int
) -> None:
    assert generate(client, **fields).status_code == 200
    assert dispatcher.tasks[0].request.steps == steps


@pytest.mark.parametrize(("format", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_output_formats(
    client: TestClient, dispatcher: ScriptedDispatcher, format: str, kind: str
) -> None:
    reply = generate(client, output_format=format, output_compression=0, metadata=False).json()
    data = base64.b64decode(reply["data"][0]["b64_json"])
    assert Pillow.open(io.BytesIO(data)).format == kind
    output = dispatcher.tasks[0].output
    assert (output.format, output.quality, output.metadata) == (format, 1, False)


def test_the_text_encoders_layer_and_the_rescale_reach_the_engine(
    client: TestClient, dispatcher: ScriptedDispatcher
) -> None:
    assert generate(client, clip_skip=3, guidance_rescale=0.7).status_code == 200
    assert generate(client).status_code == 200
    form = {"clip_skip": "2", "guidance_rescale": "1"}
    assert edit(client, **form).status_code == 200
    asked = [(task.request.clip_skip, task.request.guidance_rescale) for task in dispatcher.tasks]
    assert asked == [(3, 0.7), (0, 0.0), (2, 1.0)]


def test_a_model_with_guidance_built_in_has_none_to_rescale(
    client: TestClient, dispatcher: ScriptedDispatcher
) -> None:
    dispatcher.added.append(replace(MODEL, id="distilled", guidable=False))
    refused = error_of(generate(client, model="distilled", guidance_rescale=0.5), 422)
    assert refused["param"] == "guidance_rescale"
    assert generate(client, model="distilled").status_code == 200


def test_every_field_of_openai_is_taken(client: TestClient) -> None:
    reply = generate(
        client,
        user="u",
        quality="auto",
        style="vivid",
        moderation="low",
        background="opaque",
        size="auto",
        model="gpt-image-1",
        n=None,
        response_format=None,
        safety_identifier="s",
    )
    assert reply.status_code == 200, reply.text


def test_links_work_without_a_key_until_they_expire(client: TestClient) -> None:
    reply = generate(client, n=2, response_format="url", output_format="webp").json()
    assert [item["b64_json"] for item in reply["data"]] == [None, None]
    for item in reply["data"]:
        assert item["url"].startswith("http://testserver/v1/files/")
        fetched = client.get(item["url"])
        assert fetched.headers["content-type"] == "image/webp"
        assert Pillow.open(io.BytesIO(fetched.content)).size == (64, 64)
        forged = client.get(item["url"][:-1] + ("A" if item["url"][-1] != "A" else "B"))
        assert error_of(forged, 403)["code"] == "forbidden"


@pytest.mark.parametrize(
    ("fields", "status", "param", "said"),
    [
        ({"size": "65x64"}, 422, "size", "the nearest allowed is 64x64"),
        ({"size": "1024x512"}, 422, "size", "the nearest allowed is 128x128"),
        ({"size": "64"}, 400, "size", "match pattern"),
        ({"background": "transparent"}, 422, "background", "no transparency"),
        ({"magic": 1}, 400, "magic", "unknown field magic"),
        ({"n": 5}, 400, "n", "at most 4"),
        ({"n": 0}, 400, "n", "greater than or equal to 1"),
        ({"steps": 61}, 400, "steps", "at most 60"),
        ({"seed": MAX_SEED, "n": 2}, 400, "seed", "at most"),
        ({"solver": "magic"}, 400, "solver", "'dpmpp_2m'"),
        ({"prompt": ""}, 400, "prompt", "at least 1 character"),
        ({"prompt": "umbrella" * 1000}, 400, "prompt", "at most 4000"),
        ({"model": "other"}, 404, "model", "gpt-image-1, tintype"),
        ({"guidance_interval": [0.9, 0.1]}, 400, "guidance_interval", "low <= high"),
        ({"guidance_rescale": 1.01}, 400, "guidance_rescale", "less than or equal to 1"),
        ({"guidance_rescale": -0.1}, 400, "guidance_rescale", "greater than or equal to 0"),
        ({"clip_skip": -1}, 400, "clip_skip", "greater than or equal to 0"),
        ({"clip_skip": 1.5}, 400, "clip_skip", "integer"),
        ({"clip_skip": 4}, 422, "clip_skip", "tintype allows 0 to 3"),
        ({"cache": {"mode": "off", "x": 1}}, 400, "cache.x", "unknown field"),
    ],
)
def test_what_is_refused_is_named(
    client: TestClient,
    dispatcher: ScriptedDispatcher,
    fields: dict[str, Any],
    status: int,
    param: str,
    said: str,
) -> None:
    error = error_of(generate(client, **fields), status)
    assert error["param"] == param
    assert said in error["message"]
    assert dispatcher.tasks == []


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"prompt": ', "not JSON"),
        (b"[]", "body"),
        (b'{"prompt": "\\ud800"}', "prompt"),
        (b'{"prompt": "x", "\\ud800": 1}', "unicode"),
        (b'{"prompt": "x", "guidance": NaN}', "guidance"),
        (b"[" * 100_000, "cannot be read"),
        (b"\xff\xfe", "body"),
        (b"", "body"),
    ],
)
def test_malformed_bodies_are_400(client: TestClient, body: bytes, said: str) -> None:
    reply = client.post(
        "/v1/images/generations", content=body, headers={"content-type": "application/json"}
    )
    error = error_of(reply, 400)
    assert said in error["message"] or said == error["param"]


def test_frameworks_errors_have_our_shape(client: TestClient) -> None:
    assert error_of(client.get("/nothing"), 404)["code"] == "not_found"
    wrong = client.get("/v1/images/generations")
    assert error_of(wrong, 405)["code"] == "method_not_allowed"
    assert wrong.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("refusal", "status", "wait_s"),
    [
        (OverloadedError("the queue is full", retry_after_s=12.2), 429, "13"),
        (TOO_SHORT, 429, "5"),
        (ClosedError("draining"), 503, "1"),
        (RuntimeError("umbrella: a secret"), 500, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_is_a_status_also_of_a_stream(
    client: TestClient,
    dispatcher: ScriptedDispatcher,
    refusal: Exception,
    status: int,
    wait_s: str | None,
    stream: bool,
) -> None:
    dispatcher.refusal = refusal
    reply = generate(client, stream=stream)
    error_of(reply, status)
    assert reply.headers.get("retry-after") == wait_s
    assert "x-request-id" in reply.headers
    assert reply.headers["x-content-type-options"] == "nosniff"


def test_a_failed_picture_fails_the_request(
    client: TestClient, dispatcher: ScriptedDispatcher
) -> None:
    dispatcher.failures[1] = ExecutionError("NaN at step 3")
    assert error_of(generate(client, n=3), 500)["code"] == "execution_failed"
    assert dispatcher.closed == 1


def test_who_names_a_deadline_has_said_how_long_he_waits(
    client: TestClient, dispatcher: ScriptedDispatcher
) -> None:
    generate(client)
    generate(client, deadline_s=20)
    assert [task.patient for task in dispatcher.tasks] == [False, True]


# ------------------------------------------------------------------------------------- ladder


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("refusal", [OverloadedError("full"), TOO_SHORT])
def test_who_allows_it_gets_fewer_steps_instead_of_a_refusal(
    client: TestClient, dispatcher: ScriptedDispatcher, refusal: Exception, stream: bool
) -> None:
    dispatcher.refusal, dispatcher.room_steps = refusal, 10
    reply = generate(client, degrade=True, steps=20, seed=3, n=2, stream=stream)
    assert reply.status_code == 200, reply.text
    assert dispatcher.offered == [20, 15, 10]
    if stream:
        drawn = [data["darkroom"] for _, data in events_of(reply.text)]
    else:
        drawn = [item["darkroom"] for item in reply.json()["data"]]
        assert reply.json()["usage"]["total_tokens"] == 2 * 10 * 2
    assert [item["steps"] for item in drawn] == [10, 10]
    assert sorted(item["seed"] for item in drawn) == [3, 4]
    assert all(item["approximations"]["degraded"] == "10 of 20 steps" for item in drawn)


def test_nobody_is_degraded_who_did_not_allow_it_or_need_not_be(
    client: TestClient, dispatcher: ScriptedDispatcher
) -> None:
    drawn = generate(client, degrade=True, steps=20).json()["data"][0]["darkroom"]
    assert (drawn["steps"], drawn["approximations"]) == (20, {"precision": "int8"})
    dispatcher.refusal, dispatcher.room_steps = OverloadedError("full"), 10
    assert error_of(generate(client, steps=20), 429)["code"] == "overloaded"
    assert dispatcher.offered == [20, 20]


@pytest.mark.parametrize(
    ("fields", "offered"),
    [
        ({"steps": 20}, [20, 15, 10, 5]),
        ({"steps": 6}, [6, 4]),
        ({"steps": 2}, [2]),
        ({"timesteps": [900, 500, 100]}, [20]),
    ],
)
def test_the_ladder_ends_and_the_first_refusal_counts(
    client: TestClient,
    dispatcher: ScriptedDispatcher,
    fields: dict[str, Any],
    offered: list[int],
) -> None:
    dispatcher.refusal = OverloadedError("the queue is full", retry_after_s=7)
    reply = generate(client, degrade=True, **fields)
    assert error_of(reply, 429)["message"] == "the queue is full"
    assert dispatcher.offered == offered


# ------------------------------------------------------------------------------------ streams


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for block in text.split("\n\n"):
        fields = dict(
            line.split(": ", 1) for line in block.splitlines() if not line.startswith(":")
        )
        if fields:
            found.append((fields["event"], json.loads(fields["data"])))
    return found


def test_a_stream_shows_previews_and_then_the_picture(client: TestClient) -> None:
    reply = generate(client, stream=True, partial_images=3, steps=8, seed=5, output_format="jpeg")
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = events_of(reply.text)
    assert [name for name, _ in events] == [
        *["image_generation.partial_image"] * 3,
        "image_generation.completed",
    ]
    assert [data["partial_image_index"] for _, data in events[:3]] == [0, 1, 2]
    assert [data["darkroom"]["step"] for _, data in events[:3]] == [2, 4, 6]
    preview, finished = events[0][1], events[-1][1]
    assert preview["output_format"] == "png"
    assert finished["output_format"] == "jpeg"
    assert finished["darkroom"]["seed"] == 5
    assert finished["usage"]["output_tokens"] == 16
    for _, data in events:
        assert data["type"].startswith("image_generation.")
        Pillow.open(io.BytesIO(base64.b64decode(data["b64_json"]))).verify()


@pytest.mark.parametrize(("count", "steps"), [(0, 20), (1, 1), (3, 5), (7, 20), (100, 4)])
def test_there_are_never_more_previews_than_asked_for(
    client: TestClient, count: int, steps: int
) -> None:
    reply = generate(client, stream=True, partial_images=count, steps=steps)
    previews = [name for name, _ in events_of(reply.text) if name.endswith("partial_image")]
    assert len(previews) <= count
    if count and steps > 1:
        assert previews


def test_nobody_listens_without_a_stream(
    client: TestClient, dispatcher: ScriptedDispatcher
) -> None:
    generate(client, partial_images=3)
    assert not dispatcher.tasks[0].listening
    assert dispatcher.tasks[0].request.preview_every == 0


def test_an_error_in_a_stream_is_its_last_event(
    client: TestClient, dispatcher: ScriptedDispatcher
) -> None:
    dispatcher.failures[1] = ExecutionError("NaN at step 3")
    events = events_of(generate(client, stream=True, n=3).text)
    assert [name for name, _ in events] == ["image_generation.completed", "error"]
    assert events[-1][1]["error"]["code"] == "execution_failed"
    assert dispatcher.closed == 1


# -------------------------------------------------------------------------------------- edits


def edit(client: TestClient, *, files: Any = None, **fields: Any) -> Any:
    files = files or {"image": ("a.png", picture_file(), "image/png")}
    data = {"prompt": "a red umbrella", **fields}
    return client.post("/v1/images/edits", data=data, files=files)


def test_a_picture_is_changed(client: TestClient, dispatcher: ScriptedDispatcher) -> None:
    reply = edit(client, strength="0.4", seed="3", n="2")
    assert reply.status_code == 200, reply.text
    assert [item["darkroom"]["seed"] for item in reply.json()["data"]] == [3, 4]
    request = dispatcher.tasks[0].request
    assert request.image is not None
    assert request.image.shape == (64, 64, 3)
    assert request.image[0, 0].tolist() == [200, 40, 40]
    assert (request.strength, request.mask) == (0.4, None)


def mask_file(*, transparent: bool, size: tuple[int, int] = (64, 64)) -> bytes:
    """The left half is to be repainted."""
    half = (size[0] // 2, size[1])
    if transparent:
        mask = Pillow.new("RGBA", size, (0, 0, 0, 255))
        mask.paste((0, 0, 0, 0), (0, 0, *half))
    else:
        mask = Pillow.new("L", size, 0)
        mask.paste(255, (0, 0, *half))
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("transparent", [True, False])
def test_a_mask_repaints_where_it_is_transparent_or_else_white(
    client: TestClient, dispatcher: ScriptedDispatcher, transparent: bool
) -> None:
    files = {"image[]": picture_file("JPEG"), "mask": mask_file(transparent=transparent)}
    assert edit(client, files=files, input_fidelity="high").status_code == 200
    request = dispatcher.tasks[0].request
    assert request.mask is not None
    assert request.mask[:, :30].min() == 255
    assert request.mask[:, 34:].max() == 0
    assert request.strength == 0.5


@pytest.mark.parametrize(
    ("sent", "size", "drawn"),
    [
        ((64, 64), "auto", (64, 64)),
        ((67, 61), "auto", (64, 64)),
        ((1000, 500), "auto", (128, 64)),
        ((16, 16), "auto", (32, 32)),
        ((100, 50), "32x64", (32, 64)),
    ],
)
def test_pictures_are_brought_onto_the_models_grid(
    client: TestClient,
    dispatcher: ScriptedDispatcher,
    sent: tuple[int, int],
    size: str,
    drawn: tuple[int, int],
) -> None:
    files = {"image": picture_file(size=sent), "mask": mask_file(transparent=False, size=sent)}
    reply = edit(client, files=files, size=size)
    assert reply.status_code == 200, reply.text
    request = dispatcher.tasks[0].request
    assert request.image is not None
    assert request.mask is not None
    assert request.image.shape[1::-1] == request.mask.shape[::-1] == drawn
    assert reply.json()["size"] == f"{drawn[0]}x{drawn[1]}"


def test_transparent_parts_of_a_picture_show_white(
    client: TestClient, dispatcher: ScriptedDispatcher
) -> None:
    buffer = io.BytesIO()
    Pillow.new("RGBA", (64, 64), (200, 0, 0, 0)).save(buffer, "PNG")
    assert edit(client, files={"image": buffer.getvalue()}).status_code == 200
    image = dispatcher.tasks[0].request.image
    assert image is not None
    assert image.min() == 255


@pytest.mark.parametrize(
    ("files", "fields", "status", "param"),
    [
        ({"mask": mask_file(transparent=True)}, {}, 400, "image"),
        ({"image": b"not a picture"}, {}, 422, "image"),
        ({"image": picture_file()[:60]}, {}, 400, "image"),
        ({"image": picture_file(), "mask": picture_file(size=(32, 32))}, {}, 400, "mask"),
        ({"image": picture_file(), "image[]": picture_file()}, {}, 422, "image"),
        ({"image": picture_file(), "other": b"x"}, {}, 400, "body"),
        (None, {"size": "65x65"}, 422, "size"),
        (None, {"magic": "1"}, 400, "magic"),
        (None, {"strength": "0"}, 400, "strength"),
        (None, {"cache": "{"}, 400, "cache"),
        (None, {"timesteps": "[5, -1]"}, 400, "timesteps.1"),
    ],
)
def test_what_is_refused_of_a_form_is_named(
    client: TestClient, files: Any, fields: dict[str, str], status: int, param: str
) -> None:
    assert error_of(edit(client, files=files, **fields), status)["param"] == param


def test_forms_write_structures_as_json(client: TestClient, dispatcher: ScriptedDispatcher) -> None:
    reply = edit(client, guidance_interval="[0.1, 0.9]", cache='{"mode": "exact"}', stream="true")
    assert [name for name, _ in events_of(reply.text)] == ["image_edit.completed"]
    request = dispatcher.tasks[0].request
    assert request.guidance_interval == (0.1, 0.9)
    assert request.cache is not None
    assert request.cache.mode == "exact"


def test_a_form_is_needed(client: TestClient) -> None:
    reply = client.post("/v1/images/edits", json={"prompt": "a red umbrella"})
    assert "multipart" in error_of(reply, 400)["message"]
