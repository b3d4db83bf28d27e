"""The HTTP application: every interface, and the layers around them.

::

    SecurityHeaders
    CORS              only where origins are configured
    RequestLayer      name, count, time, trace and log each request; no error falls through
    Door              who is it, and how often: before any of a body is read
    BodyLimit         how much, and how slowly: where the bytes arrive
    FastAPI           server/api/*, each module's ``routes(services)``
"""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from engine.png import VERSION
from engine.ports import SystemClock
from server import error_replies
from server.api import (
    admin,
    cache,
    docs,
    health,
    jobs,
    metrics_route,
    models,
    openai,
    playground,
    sdapi,
)
from server.middleware.body_limit import BodyLimit
from server.middleware.door import Door
from server.middleware.request_id import RequestLayer
from server.middleware.security_headers import SecurityHeaders
from server.openapi import DESCRIPTION, TAGS, DescribedApp, operation_id
from server.rate_limit import RateLimiter
from server.request_log import RequestLog
from server.services import Services

_MODULES = (openai, jobs, models, sdapi, admin, cache, metrics_route, health, docs, playground)
_UPLOADS = ("/v1/images/edits", "/sdapi/")


def create_app(services: Services) -> FastAPI:
    """The application over ``services``, for any ASGI server.

    ``/openapi.json`` describes it and ``/docs`` shows that.
    """
    app = DescribedApp(
        title="Darkroom",
        summary="An inference server for diffusion models, scheduled by the denoising step.",
        description=DESCRIPTION,
        version=VERSION.rpartition(" ")[2],
        openapi_tags=TAGS,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=operation_id,
        # Its log records hold whole bodies of requests that fail validation: prompts.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    error_replies.install(app)
    for module in _MODULES:
        app.include_router(module.routes(services))
    _wrap(app, services)
    return app


def _wrap(app: FastAPI, services: Services) -> None:
    """Put the layers around it; the last one that is added is the outermost."""
    http = services.config.http
    app.add_middleware(BodyLimit, http=http, upload_paths=_UPLOADS)
    app.add_middleware(Door, keys=services.keys, limiter=RateLimiter(SystemClock()))
    log = RequestLog(services.config.logging)
    app.add_middleware(RequestLayer, metrics=services.metrics, log=log, traces=services.traces)
    if http.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(http.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type", "idempotency-key", "x-api-key"],
            expose_headers=["x-request-id", "server-timing", "retry-after"],
        )
    app.add_middleware(SecurityHeaders, shared=bool(http.cors_origins))
