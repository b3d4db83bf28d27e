"""Operator routes: what is switched while the server runs."""

from __future__ import annotations

from fastapi import APIRouter, Depends
from fastapi.responses import Response

from server import request_log
from server.api.models import reply_of
from server.auth import operator_of
from server.config import ModelConfig
from server.errors import ConflictError
from server.messages import ModelChange, ModelInfo
from server.orders import model_named
from server.schemas.admin import LogLevel, NewModel
from server.schemas.base import responses
from server.schemas.openai import ModelReply
from server.services import Services


def routes(services: Services) -> APIRouter:
    """All of them need an operator's key, where keys are needed."""
    router = APIRouter(prefix="/v1/admin", tags=["operation"], dependencies=[Depends(operator_of)])
    _logging(router, services)
    _models(router, services)
    return router


def _logging(router: APIRouter, services: Services) -> None:
    @router.get("/log-level", summary="The log level", responses=responses(401, 403))
    async def level() -> LogLevel:
        """Of the gateway that answers."""
        return LogLevel(level=request_log.level())

    @router.put("/log-level", summary="Switch the log level", responses=responses(401, 403))
    async def set_level(body: LogLevel) -> LogLevel:
        """Of all processes, within seconds. The configuration file is not changed."""
        await services.dispatcher.set_log_level(body.level)
        return body


def _models(router: APIRouter, services: Services) -> None:
    dispatcher = services.dispatcher
    configured = {model.id: model for model in services.config.models}
    aliases = {alias for model in services.config.models for alias in model.aliases}

    @router.post("/models", summary="Add a model", responses=responses(401, 403, 409, 422, 503))
    async def add_model(body: NewModel) -> ModelReply:
        """Compiles a folder, on every worker, and serves it. That may take minutes.

        A worker that starts later adds it too. When the whole application starts again it serves
        what is configured: to keep the model, configure it too. What one worker cannot serve is
        undone on the others, and told with a 503.
        """
        if body.id in aliases:
            raise ConflictError(f"{body.id} is an alias of a configured model", field="id")
        added = await dispatcher.change_model(ModelChange(action="add", model=body.config()))
        return _reply(added)

    @router.post(
        "/models/{model}/reload",
        summary="Reload a model",
        responses=responses(401, 403, 404, 422, 503),
    )
    async def reload_model(model: str) -> ModelReply:
        """Compiles its folder as it is now. What has begun is finished with what it began with."""
        change = ModelChange(action="reload", model=await _known(model))
        return _reply(await dispatcher.change_model(change))

    @router.delete(
        "/models/{model}",
        summary="Remove a model",
        status_code=204,
        responses=responses(401, 403, 404, 409, 503),
    )
    async def remove_model(model: str) -> Response:
        """Only one that was added: a configured one would be back with the next worker."""
        found = await _known(model)
        if found.id in configured:
            raise ConflictError(
                f"{found.id} stands in the configuration: take it out there", field="model"
            )
        await dispatcher.change_model(ModelChange(action="remove", model=found))
        return Response(status_code=204)

    async def _known(name: str) -> ModelConfig:
        return ModelConfig(id=(await model_named(services, name)).id)

    def _reply(info: ModelInfo | None) -> ModelReply:
        assert info is not None  # both changes end with a model that is served
        own = configured.get(info.id)
        return reply_of(info, aliases=own.aliases if own else (), default=False)
