"""Automatic1111's interface over a dispatcher that follows a script."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image as Pillow
from starlette.testclient import TestClient

from engine.png import SAMPLERS, Parameters, encode_image
from engine.solvers import SCHEDULES, SOLVERS
from server.config import ModelConfig, ServeConfig
from server.gateway import create_app
from server.sdapi.translate import CLIP_STOP
from tests.unit.server.scripted import MODEL, ScriptedDispatcher, picture_file, services_of

API = "/sdapi/v1"
CONFIG = ServeConfig(models=(ModelConfig(id="tintype", aliases=("sd",)),))

# What a common client sends for a plain request: every field that it knows.
CHATTY: dict[str, Any] = {
    "enable_hr": False,
    "denoising_strength": 0.7,
    "hr_scale": 2,
    "hr_upscaler": "Latent",
    "hr_second_pass_steps": 0,
    "firstphase_width": 0,
    "firstphase_height": 0,
    "prompt": "a red umbrella",
    "styles": [],
    "seed": -1,
    "subseed": -1,
    "subseed_strength": 0.0,
    "seed_resize_from_h": 0,
    "seed_resize_from_w": 0,
    "sampler_name": "Euler a",
    "batch_size": 1,
    "n_iter": 1,
    "steps": 12,
    "cfg_scale": 7.0,
    "width": 64,
    "height": 64,
    "restore_faces": False,
    "tiling": False,
    "do_not_save_samples": False,
    "do_not_save_grid": False,
    "negative_prompt": "blurry",
    "eta": 1.0,
    "s_churn": 0,
    "s_tmax": 0,
    "s_tmin": 0,
    "s_noise": 1,
    "override_settings": {"CLIP_stop_at_last_layers": 2, "unheard_of": {"a": [1]}},
    "override_settings_restore_afterwards": True,
    "script_args": [],
    "script_name": None,
    "send_images": True,
    "save_images": False,
    "alwayson_scripts": {},
    "distilled_cfg_scale": 3.5,
    "use_deprecated_controlnet": False,
}


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


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def txt2img(client: TestClient, **fields: Any) -> Any:
    return client.post(f"{API}/txt2img", json={"prompt": "a red umbrella", **fields})


def test_what_clients_send_by_default_is_taken(
    client: TestClient, dispatcher: ScriptedDispatcher
) -> None:
    reply = client.post(f"{API}/txt2img", json=CHATTY)
    assert reply.status_code == 200, reply.text
    (picture,) = reply.json()["images"]
    assert Pillow.open(io.BytesIO(base64.b64decode(picture))).size == (64, 64)
    request = dispatcher.tasks[0].request
    assert (request.solver, request.steps, request.guidance) == ("euler_ancestral", 12, 7.0)
    assert request.negative_prompt == "blurry"
    assert request.clip_skip == 1  # 2 there: the layer before the last
    assert request.eta is None  # an ancestral sampler's eta is 1 here as there
    info = json.loads(reply.json()["info"])
    assert info["all_seeds"] == [request.seed]
    assert info["sampler_name"] == "Euler a"
    assert "Negative prompt: blurry" in info["infotexts"][0]
    assert info["clip_skip"] == 2
    assert "Clip skip: 2" in info["infotexts"][0]
    assert reply.json()["parameters"]["steps"] == 12
    assert reply.headers["x-darkroom-denoise-ms"] == "300.00"


def test_an_empty_request_draws_with_the_checkpoints_defaults(
    client: TestClient, dispatcher: ScriptedDispatcher
) -> None:
    assert client.post(f"{API}/txt2img", json={}).status_code == 200
    request = dispatcher.tasks[0].request
    assert (request.solver, request.guidance, request.width_px) == (None, None, None)


@pytest.mark.parametrize(("stop_at", "skipped"), [(1, 0), (2, 1), (2.0, 1), (4, 3)])
def test_clip_skip_counts_from_one_there(
    client: TestClient, dispatcher: ScriptedDispatcher, stop_at: float, skipped: int
) -> None:
    reply = txt2img(client, override_settings={CLIP_STOP: stop_at})
    assert reply.status_code == 200, reply.text
    assert dispatcher.tasks[0].request.clip_skip == skipped
    info = json.loads(reply.json()["info"])
    assert info["clip_skip"] == stop_at
    assert ("Clip skip" in info["infotexts"][0]) == (skipped > 0)


def test_sdxl_has_its_own_layer_whatever_the_setting_says(
    client: TestClient, dispatcher: ScriptedDispatcher
) -> None:
    dispatcher.added.append(replace(MODEL, id="xl", family="sdxl"))
    chosen = {"sd_model_checkpoint": "xl", CLIP_STOP: 12}
    assert txt2img(client, override_settings=chosen).status_code == 200
    assert dispatcher.tasks[0].request.clip_skip == 0


def test_infinity_is_no_layer(client: TestClient) -> None:
    body = f'{{"override_settings": {{"{CLIP_STOP}": 1e999}}}}'
    headers = {"content-type": "application/json"}
    assert client.post(f"{API}/txt2img", content=body, headers=headers).status_code == 400


def test_batches_count_seeds_up(client: TestClient, dispatcher: ScriptedDispatcher) -> None:
    reply = txt2img(client, seed=5, batch_size=2, n_iter=2).json()
    assert len(reply["images"]) == 4
    assert json.loads(reply["info"])["all_seeds"] == [5, 6, 7, 8]


@pytest.mark.parametrize(
    ("fields", "solver", "schedule"),
    [
        ({"sampler_name": "DPM++ 2M", "scheduler": "Karras"}, "dpmpp_2m", "karras"),
        ({"sampler_name": "dpm++ 2m karras"}, "dpmpp_2m", "karras"),
        ({"sampler_name": "Euler", "scheduler": "Automatic"}, "euler", None),
        ({"sampler_index": "DDIM"}, "ddim", None),
        ({"sampler_name": "Heun", "scheduler": "exponential"}, "heun", "exponential"),
        ({"scheduler": "Uniform"}, None, "linspace"),
    ],
)
def test_samplers_and_schedulers_by_their_names_there(
    client: TestClient,
    dispatcher: ScriptedDispatcher,
    fields: dict[str, str],
    solver: str | None,
    schedule: str | None,
) -> None:
    assert txt2img(client, **fields).status_code == 200
    request = dispatcher.tasks[0].request
    assert (request.solver, request.schedule) == (solver, schedule)


def test_every_sampler_and_scheduler_that_is_listed_is_taken(
    client: TestClient, dispatcher: ScriptedDispatcher
) -> None:
    samplers = client.get(f"{API}/samplers").json()
    assert [sampler["aliases"][0] for sampler in samplers] == list(SOLVERS)
    for sampler in samplers:
        assert txt2img(client, sampler_name=sampler["name"], steps=1).status_code == 200
    for scheduler in client.get(f"{API}/schedulers").json():
        for name in (scheduler["name"], scheduler["label"]):
            assert txt2img(client, scheduler=name, steps=1).status_code == 200
    asked = [task.request for task in dispatcher.tasks]
    assert {request.solver for request in asked} - {None} == set(SAMPLERS)
    assert {request.schedule for request in asked} - {None} <= set(SCHEDULES)


@pytest.mark.parametrize(
    ("fields", "status", "param", "said"),
    [
        ({"enable_hr": True}, 422, "enable_hr", "not served"),
        ({"tiling": True}, 422, "tiling", "not served"),
        ({"styles": ["film"]}, 422, "styles", "not served"),
        ({"subseed_strength": 0.1}, 422, "subseed_strength", "not served"),
        ({"alwayson_scripts": {"x": {}}}, 422, "alwayson_scripts", "not served"),
        ({"width": 65}, 422, "size", "the nearest allowed is 64x64"),
        ({"sampler_name": "magic"}, 400, "sampler_name", "Euler a"),
        ({"scheduler": "magic"}, 400, "scheduler", "Karras"),
        ({"steps": 0}, 400, "steps", "greater than"),
        ({"batch_size": 100, "n_iter": 100}, 400, "n", "128"),
        ({"override_settings": {"sd_model_checkpoint": "none"}}, 404, "model", "sd, tintype"),
        ({"override_settings": {"sd_model_checkpoint": 5}}, 400, "override_settings", "text"),
        ({"override_settings": {"samples_format": "gif"}}, 400, "override_settings", "png"),
        ({"override_settings": {CLIP_STOP: 0}}, 400, "override_settings", "from 1 to 12"),
        ({"override_settings": {CLIP_STOP: 1.5}}, 400, "override_settings", "whole number"),
        ({"override_settings": {CLIP_STOP: True}}, 400, "override_settings", "whole number"),
        ({"override_settings": {CLIP_STOP: "2"}}, 400, "override_settings", "whole number"),
        ({"override_settings": {CLIP_STOP: 5}}, 422, "override_settings", "tintype allows 1 to 4"),
    ],
)
def test_what_would_change_the_picture_and_is_not_served_is_refused(
    client: TestClient, fields: dict[str, Any], status: int, param: str, said: str
) -> None:
    reply = txt2img(client, **fields)
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["param"] == param
    assert said in reply.json()["error"]["message"]


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
def test_img2img(client: TestClient, dispatcher: ScriptedDispatcher, prefix: str) -> None:
    mask = Pillow.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    reply = client.post(
        f"{API}/img2img",
        json={
            "init_images": [prefix + b64(picture_file())],
            "mask": b64(buffer.getvalue()),
            "inpainting_mask_invert": 1,
            "denoising_strength": 0.3,
            "inpaint_full_res": True,
            "inpainting_fill": 1,
            "mask_blur": 4,
        },
    )
    assert reply.status_code == 200, reply.text
    request = dispatcher.tasks[0].request
    assert request.image is not None
    assert request.mask is not None
    assert request.strength == 0.3
    assert (request.mask[0, 0], request.mask[0, 63]) == (0, 255)
    assert reply.json()["parameters"]["init_images"] is None


@pytest.mark.parametrize(
    ("mode", "left"), [(0, [200, 40, 40]), (1, [0, 0, 255])], ids=["stretch", "crop"]
)
def test_resize_modes(
    client: TestClient, dispatcher: ScriptedDispatcher, mode: int, left: list[int]
) -> None:
    wide = Pillow.new("RGB", (128, 64), (0, 0, 255))
    wide.paste((200, 40, 40), (0, 0, 16, 64))
    buffer = io.BytesIO()
    wide.save(buffer, "PNG")
    body = {"init_images": [b64(buffer.getvalue())], "width": 64, "height": 64}
    assert client.post(f"{API}/img2img", json={**body, "resize_mode": mode}).status_code == 200
    image = dispatcher.tasks[0].request.image
    assert image is not None
    assert image[30, 2].tolist() == left


def test_models_and_options(client: TestClient, dispatcher: ScriptedDispatcher) -> None:
    (model,) = client.get(f"{API}/sd-models").json()
    assert (model["title"], model["hash"]) == ("tintype [dddddddddd]", "d" * 10)
    assert client.get(f"{API}/options").json()["sd_model_checkpoint"] == model["title"]
    chosen = client.post(f"{API}/options", json={"sd_model_checkpoint": "sd [abc]", "other": 1})
    assert chosen.json() is None
    missing = client.post(f"{API}/options", json={"sd_model_checkpoint": "none"})
    assert missing.status_code == 404
    named = {"override_settings": {"sd_model_checkpoint": model["title"]}}
    assert txt2img(client, **named).status_code == 200
    for menu in ("upscalers", "sd-vae", "loras", "embeddings", "cmd-flags"):
        assert client.get(f"{API}/{menu}").status_code == 200


def test_png_info_reads_what_was_written(client: TestClient) -> None:
    written = Parameters("a cat: red", "dog", {"Steps": "4", "Sampler": "Euler a", "Seed": "9"})
    file = encode_image(np.zeros((8, 8, 3), np.uint8), written)
    found = client.post(f"{API}/png-info", json={"image": b64(file)}).json()
    assert found["parameters"]["Prompt"] == "a cat: red"
    assert found["parameters"]["Seed"] == "9"
    assert found["info"] == found["items"]["parameters"]
    bare = client.post(f"{API}/png-info", json={"image": b64(picture_file())}).json()
    assert bare == {"info": "", "items": {}, "parameters": {}}
    assert client.post(f"{API}/png-info", json={"image": "x"}).status_code == 400
    assert client.post(f"{API}/png-info", json={"image": b64(b"hello")}).status_code == 422


def test_progress_and_interrupt() -> None:
    """Two pictures: one is finished, the other hangs; an interrupt answers with the first."""

    async def scene() -> None:
        dispatcher = ScriptedDispatcher(hangs_after=1)
        transport = httpx.ASGITransport(create_app(services_of(dispatcher, CONFIG)))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            idle = (await client.get(f"{API}/progress")).json()
            assert (idle["progress"], idle["state"]["job_count"]) == (0.0, 0)
            body = {"prompt": "x", "batch_size": 2, "steps": 10}
            drawing = asyncio.create_task(client.post(f"{API}/txt2img", json=body))
            await dispatcher.hanging.wait()
            half = (await client.get(f"{API}/progress")).json()
            assert 0.0 < half["progress"] < 1.0
            assert (half["state"]["job_no"], half["state"]["job_count"]) == (1, 2)
            assert base64.b64decode(half["current_image"]).startswith(b"\x89PNG")
            plain = await client.get(f"{API}/progress", params={"skip_current_image": True})
            assert plain.json()["current_image"] is None
            await client.post(f"{API}/interrupt")
            reply = await asyncio.wait_for(drawing, 10)
            assert reply.status_code == 200
            assert len(reply.json()["images"]) == 1
            assert json.loads(reply.json()["info"])["interrupted"] is True
            assert dispatcher.closed == 1
            assert (await client.get(f"{API}/progress")).json()["progress"] == 0.0

    asyncio.run(scene())
