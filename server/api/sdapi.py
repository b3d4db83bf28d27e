"""``/sdapi/v1``: the routes of Automatic1111's web UI that its clients call."""

from __future__ import annotations

import time
from io import BytesIO
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from engine.png import SAMPLERS, Parameters, format_parameters, read_parameters
from server.auth import Tenant, tenant_of
from server.disconnect import until_gone
from server.messages import ModelInfo
from server.orders import Inputs, model_named, order_of
from server.replies import TIMING_HEADERS, timing_headers
from server.request_log import record_of
from server.schemas.base import responses
from server.schemas.sdapi import (
    DrawReply,
    Img2ImgBody,
    OptionsBody,
    PngInfoBody,
    PngInfoReply,
    ProgressReply,
    Sampler,
    Scheduler,
    SdModel,
    Txt2ImgBody,
)
from server.sdapi.running import Draw, Running
from server.sdapi.translate import (
    AUTOMATIC,
    draw_body,
    encoded,
    info_text,
    inputs_of,
    model_name,
    parameters_echo,
    plain_title,
    schedules,
)
from server.services import Services
from server.uploads import decode_picture, from_base64, off_loop

_PREVIEWS = 4
_ERRORS = responses(401, 403, 404, 422, 503, 504)
_LOOK = responses(401, 503)
# Things that the original may have and this server does not: clients fill menus from them.
_EMPTY: dict[str, Any] = {
    "upscalers": [],
    "latent-upscale-modes": [],
    "sd-vae": [],
    "sd-modules": [],
    "loras": [],
    "hypernetworks": [],
    "face-restorers": [],
    "realesrgan-models": [],
    "prompt-styles": [],
    "embeddings": {"loaded": {}, "skipped": {}},
    "scripts": {"txt2img": [], "img2img": []},
}

Caller = Annotated[Tenant, Depends(tenant_of)]


def routes(services: Services) -> APIRouter:
    """All of them, over state that lives as long as this gateway."""
    router = APIRouter(prefix="/sdapi/v1", tags=["sdapi"])
    desk = _Desk(services)
    _drawing(router, desk)
    _looking(router, desk)
    _settings(router, desk)
    return router


class _Desk:
    """What the routes share."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self.running = Running()
        self._chosen: dict[str, str] = {}  # by tenant, of which the configuration has so many

    async def model(self, tenant: Tenant, named: str | None) -> ModelInfo:
        """The model that is named, else the one that the tenant chose, else the default."""
        return await model_named(self.services, named or self._chosen.get(tenant.id))

    async def choose(self, tenant: Tenant, title: str) -> None:
        self._chosen[tenant.id] = (await model_named(self.services, plain_title(title))).id

    async def draw(
        self, body: Txt2ImgBody | Img2ImgBody, request: Request, tenant: Tenant
    ) -> Response:
        """Draw, while progress and interrupt work."""
        services, record = self.services, record_of(request.scope)
        model = await self.model(tenant, model_name(body))
        inner = draw_body(body, model)
        inputs: Inputs | None = None
        if isinstance(body, Img2ImgBody):
            limits, http = services.config.limits, services.config.http
            inputs = await off_loop(lambda: inputs_of(body, model, limits, http))
        order = order_of(inner, model, services, tenant, request_id=record.id, inputs=inputs)
        record.asked(tenant=tenant.id, model=model.id, prompt=body.prompt, user=None)
        draw = Draw(order.with_previews(_PREVIEWS), now_s=time.monotonic)
        pictures = await until_gone(
            request.receive, self.running.draw(tenant.id, draw, services.dispatcher)
        )
        record.drew(pictures)
        services.metrics.drew(pictures, tenant=tenant.id, request_id=record.id)
        reply = DrawReply(
            images=encoded(pictures) if body.send_images is not False else [],
            parameters=parameters_echo(body),
            info=info_text(
                body, pictures, clip_stop_at=inner.clip_skip + 1, interrupted=draw.interrupted
            ),
        )
        return Response(
            reply.model_dump_json(),
            headers=timing_headers(pictures),
            media_type="application/json",
        )


def _drawing(router: APIRouter, desk: _Desk) -> None:
    drawn: dict[int | str, dict[str, Any]] = {200: {"headers": TIMING_HEADERS}, **_ERRORS}

    @router.post(
        "/txt2img", summary="Draw from a prompt", response_model=DrawReply, responses=drawn
    )
    async def txt2img(body: Txt2ImgBody, request: Request, tenant: Caller) -> Response:
        """Each field says whether it is honoured, refused, or accepted without effect."""
        return await desk.draw(body, request, tenant)

    @router.post(
        "/img2img", summary="Draw from a picture", response_model=DrawReply, responses=drawn
    )
    async def img2img(body: Img2ImgBody, request: Request, tenant: Caller) -> Response:
        """Image to image, and inpainting with a mask."""
        return await desk.draw(body, request, tenant)

    @router.get("/progress", summary="How far is it", responses=_LOOK)
    async def progress(tenant: Caller, skip_current_image: bool = False) -> ProgressReply:
        """Of the caller's oldest running request on this gateway."""
        return desk.running.progress(tenant.id, with_image=not skip_current_image)

    @router.post("/interrupt", summary="End what runs", responses=_LOOK)
    async def interrupt(tenant: Caller) -> dict[str, str]:
        """Ends the caller's running requests on this gateway before their next step; they answer
        with the pictures that were finished."""
        desk.running.interrupt(tenant.id)
        return {}


def _looking(router: APIRouter, desk: _Desk) -> None:
    @router.get("/samplers", summary="Samplers", responses=_LOOK)
    async def samplers(_tenant: Caller) -> list[Sampler]:
        """Every solver, under this interface's names."""
        return [Sampler(name=label, aliases=[name], options={}) for name, label in SAMPLERS.items()]

    @router.get("/schedulers", summary="Schedulers", responses=_LOOK)
    async def schedulers(_tenant: Caller) -> list[Scheduler]:
        """Every schedule; which solver takes which, the refusal of a wrong pair says."""
        own = Scheduler(name=AUTOMATIC.lower(), label=AUTOMATIC)
        return [own, *(Scheduler(name=name, label=label) for label, name in schedules().items())]

    @router.get("/sd-models", summary="Models", responses=_LOOK)
    async def sd_models(_tenant: Caller) -> list[SdModel]:
        """Every model; its title is what `sd_model_checkpoint` takes."""
        return [
            SdModel(
                title=_title(model),
                model_name=model.id,
                hash=model.plan_digest[:10],
                filename=model.id,
            )
            for model in await desk.services.dispatcher.models()
        ]

    @router.post("/png-info", summary="Parameters in a file", responses=responses(401, 422))
    async def png_info(body: PngInfoBody, _tenant: Caller) -> PngInfoReply:
        """Reads what this server, the original, and others wrote into a PNG, JPEG or WebP."""
        config = desk.services.config

        def read() -> Parameters | None:
            data = from_base64(body.image, field="image", max_bytes=config.http.max_upload_bytes)
            decode_picture(data, config.limits, field="image")  # holds it against every bound
            return read_parameters(BytesIO(data))

        found = await off_loop(read)
        if found is None:
            return PngInfoReply(info="", items={}, parameters={})
        text = format_parameters(found)
        prompts = {"Prompt": found.prompt, "Negative prompt": found.negative_prompt}
        return PngInfoReply(
            info=text, items={"parameters": text}, parameters={**prompts, **found.settings}
        )

    @router.get("/cmd-flags", summary="How it was started", responses=_LOOK)
    async def cmd_flags(_tenant: Caller) -> dict[str, bool]:
        """Clients look for `api` only."""
        return {"api": True}

    for name, empty in _EMPTY.items():
        _nothing(router, name, empty)


def _nothing(router: APIRouter, name: str, empty: Any) -> None:
    @router.get(f"/{name}", name=name, summary=f"Always empty: {name}", responses=_LOOK)
    async def nothing(_tenant: Caller) -> Any:
        """Here so that clients which fill a menu from it find an empty one."""
        return empty


def _settings(router: APIRouter, desk: _Desk) -> None:
    @router.get("/options", summary="Settings", responses=_LOOK)
    async def options(tenant: Caller) -> dict[str, Any]:
        """The few that clients read. The rest of the original's has no meaning here."""
        model = await desk.model(tenant, None)
        return {
            "sd_model_checkpoint": _title(model),
            "sd_checkpoint_hash": model.plan_digest[:10],
            "samples_format": "png",
            "CLIP_stop_at_last_layers": 1,
        }

    @router.post("/options", summary="Change settings", responses=responses(401, 404, 503))
    async def set_options(body: OptionsBody, tenant: Caller) -> None:
        """Chooses the model of the caller's later requests on this gateway."""
        if body.sd_model_checkpoint:
            await desk.choose(tenant, body.sd_model_checkpoint)

    @router.post("/refresh-checkpoints", summary="Without effect", responses=_LOOK)
    async def refresh(_tenant: Caller) -> None:
        """The list of models is always fresh."""


def _title(model: ModelInfo) -> str:
    return f"{model.id} [{model.plan_digest[:10]}]"
