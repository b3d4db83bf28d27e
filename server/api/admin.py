"""Operator routes: what is switched while the server runs."""

from __future__ import annotations

from fastapi import APIRouter, Depends

from server import request_log
from server.auth import operator_of
from server.schemas.admin import LogLevel
from server.schemas.base import responses
from server.services import Services


def routes(_services: Services) -> APIRouter:
    """All of them need an operator's key, where keys are needed."""
    router = APIRouter(prefix="/v1/admin", tags=["operation"], dependencies=[Depends(operator_of)])

    @router.get("/log-level", summary="The log level", responses=responses(401, 403))
    async def level() -> LogLevel:
        """Of the gateway that answers."""
        return LogLevel(level=request_log.level())

    @router.put(
        "/log-level",
        summary="Switch the log level",
        responses=responses(401, 403),
    )
    async def set_level(body: LogLevel) -> LogLevel:
        """Of the gateway that answers, until it ends. The configuration file is not changed."""
        request_log.set_level(body.level)
        return body

    return router
