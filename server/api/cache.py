"""``/v1/cache``: what the noise cache holds, and clearing it, for operators."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Depends, Query
from fastapi.concurrency import run_in_threadpool

from engine.errors import BackendUnavailableError, InvalidRequestError, UnsupportedError
from engine.types import CacheScope, CacheShare
from server.auth import operator_of
from server.cache_contents import Names, backend_of, forgotten, in_memory, on_redis, redis_operator
from server.errors import CacheUnavailableError
from server.messages import CacheAnswer, CacheOrder
from server.orders import model_named
from server.schemas.base import responses
from server.schemas.cache import CacheCleared, CacheReport
from server.services import Services

MAX_BEST = 100
_FINGERPRINT = r"^[0-9a-f]{64}$"

Tenant = Annotated[str | None, Query(max_length=64, description="This tenant's states alone.")]
Shared = Annotated[bool, Query(description="Those alone that all tenants share.")]
Model = Annotated[
    str | None, Query(max_length=64, description="Of this model's weights alone: an id or alias.")
]
Checkpoint = Annotated[
    str | None,
    Query(pattern=_FINGERPRINT, description="Of these weights alone, served or not."),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Meant:
    """Which states a call is about, as it says it."""

    tenant: str | None
    shared: bool
    model: str | None
    checkpoint: str | None

    async def scope(self, services: Services) -> CacheScope:
        """The same with the model's fingerprint.

        Raises:
            InvalidRequestError: it is said twice.
            NotFoundError: there is no such model.
        """
        checkpoint = self.checkpoint
        if self.model is not None:
            if checkpoint is not None:
                raise InvalidRequestError("either a model or a checkpoint, not both", field="model")
            checkpoint = (await model_named(services, self.model)).checkpoint
        return CacheScope(tenant=self.tenant, shared=self.shared, checkpoint=checkpoint)


def meant_by(
    tenant: Tenant = None,
    shared: Shared = False,
    model: Model = None,
    checkpoint: Checkpoint = None,
) -> Meant:
    """Read the query."""
    return Meant(tenant=tenant, shared=shared, model=model, checkpoint=checkpoint)


def routes(services: Services) -> APIRouter:
    """Both need an operator's key, where keys are needed."""
    router = APIRouter(prefix="/v1/cache", tags=["operation"], dependencies=[Depends(operator_of)])
    config = services.config
    backend = backend_of(config)

    @router.get("", summary="What the noise cache holds", responses=responses(401, 403, 404, 503))
    async def report(
        meant: Annotated[Meant, Depends(meant_by)],
        best: Annotated[
            int, Query(ge=0, le=MAX_BEST, description="So many states of each share.")
        ] = 0,
    ) -> CacheReport:
        """By tenant and checkpoint. In the workers' memory these are sums: each has its own."""
        order = CacheOrder(action="look", scope=await meant.scope(services), best=best)
        names = await _names(services)
        if backend == "redis":
            return on_redis(config, await _ask_redis(services, order), names, best=best)
        answers = await services.dispatcher.ask_caches(order) if backend == "memory" else ()
        return in_memory(config, answers, names, best=best)

    @router.delete(
        "",
        summary="Forget states of the noise cache",
        responses=responses(401, 403, 404, 422, 503),
    )
    async def clear(
        meant: Annotated[Meant, Depends(meant_by)],
        everything: Annotated[bool, Query(description="Everybody's, of all models.")] = False,
    ) -> CacheCleared:
        """Say whose (`tenant` or `shared`), or of which weights (`model` or `checkpoint`), or both;
        or `everything`. On every worker; pictures that are being drawn may leave states afterwards.
        503: some worker may still hold them, or nobody can say which workers there are; ask again.

        Models of the same weights, as fp32 beside int8, share their states.
        """
        scope = await meant.scope(services)
        if everything == (scope != CacheScope()):
            raise InvalidRequestError(
                "say which states: tenant or shared, model or checkpoint, or everything alone",
                field="tenant",
            )
        if backend == "off":
            raise UnsupportedError("there is no noise cache: cache.enabled is false")
        order = CacheOrder(action="clear", scope=scope)
        if backend == "redis":
            gone = await _ask_redis(services, order)
        else:
            gone = _all_of(await services.dispatcher.ask_caches(order))
        return forgotten(gone, await _names(services))

    return router


async def _ask_redis(services: Services, order: CacheOrder) -> Sequence[CacheShare]:
    def run() -> Sequence[CacheShare]:
        with redis_operator(services.config.redis) as operator:
            if order.action == "clear":
                return operator.clear(order.scope)
            return operator.shares(order.scope, best=order.best)

    try:
        return await run_in_threadpool(run)
    except BackendUnavailableError as error:
        raise CacheUnavailableError(str(error)) from error


def _all_of(answers: Sequence[CacheAnswer]) -> list[CacheShare]:
    """What all of them have forgotten.

    Raises:
        CacheUnavailableError: one has not said that it has. To ask again does no harm.
    """
    silent = [answer.worker for answer in answers if answer.shares is None]
    if silent:
        raise CacheUnavailableError(
            f"{', '.join(silent)} did not answer and may still hold states; the other workers have"
            " forgotten them; try again"
        )
    return [share for answer in answers for share in answer.shares or ()]


async def _names(services: Services) -> Names:
    """Of the models that are served; none while no worker is up to say so."""
    names: defaultdict[str, list[str]] = defaultdict(list)
    try:
        for info in await services.dispatcher.models():
            names[info.checkpoint].append(info.id)
    except BackendUnavailableError:
        return {}
    return names
