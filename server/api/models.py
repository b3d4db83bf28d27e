"""``/v1/models``: what can be asked for, as OpenAI's clients list it."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, Depends

from server.auth import tenant_of
from server.messages import ModelInfo
from server.orders import model_named
from server.schemas.base import responses
from server.schemas.openai import ModelDetails, ModelList, ModelReply
from server.services import Services


def reply_of(model: ModelInfo, *, aliases: Sequence[str], default: bool) -> ModelReply:
    """A model as clients see it."""
    return ModelReply(
        id=model.id,
        created=model.created_s,
        darkroom=ModelDetails(
            aliases=list(aliases),
            family=model.family,
            native_px=model.native_px,
            size_multiple_px=model.size_multiple_px,
            min_px=model.min_px,
            max_px=model.max_px,
            guidance_default=model.guidance_default,
            guidable=model.guidable,
            solver_default=model.solver_default,
            schedule_default=model.schedule_default,
            scheduler_class=model.scheduler_class,
            scheduler_stand_in=model.scheduler_stand_in,
            scheduler_note=model.scheduler_note,
            precision=model.precision,
            backend=model.backend,
            plan_digest=model.plan_digest,
            max_clip_skip=model.max_clip_skip,
            inpainting_only=model.inpainting_only,
            default=default,
        ),
    )


def routes(services: Services) -> APIRouter:
    """The two routes."""
    router = APIRouter(prefix="/v1/models", tags=["models"], dependencies=[Depends(tenant_of)])
    aliases = {model.id: model.aliases for model in services.config.models}

    def reply(model: ModelInfo, *, default: bool) -> ModelReply:
        return reply_of(model, aliases=aliases.get(model.id, ()), default=default)

    @router.get("", summary="List the models", responses=responses(401, 503))
    async def models() -> ModelList:
        """Every model that is served; a request that names none gets the first."""
        found = await services.dispatcher.models()
        return ModelList(data=[reply(model, default=i == 0) for i, model in enumerate(found)])

    @router.get("/{model}", summary="One model", responses=responses(401, 404, 503))
    async def one_model(model: str) -> ModelReply:
        """A model by its id, or by an alias of it."""
        found = await model_named(services, model)
        first = (await services.dispatcher.models())[0]
        return reply(found, default=found.id == first.id)

    return router
