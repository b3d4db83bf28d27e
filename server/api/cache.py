"""``/v1/cache``: what the noise cache holds, and clearing it, for operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, TypeVar

from fastapi import APIRouter, Depends, Query
from fastapi.concurrency import run_in_threadpool

from engine.errors import InvalidRequestError, UnsupportedError
from server.auth import operator_of
from server.config import RedisConfig
from server.errors import CacheUnavailableError
from server.metrics_page import families_of
from server.schemas.base import responses
from server.schemas.cache import CacheCleared, CacheReport, CacheShare, WorkerCache
from server.services import Services

if TYPE_CHECKING:
    from cache.inspection import Operator

_T = TypeVar("_T")
_TIMEOUT_S = 5.0


def routes(services: Services) -> APIRouter:
    """Both need an operator's key, where keys are needed."""
    router = APIRouter(prefix="/v1/cache", tags=["operation"], dependencies=[Depends(operator_of)])
    config = services.config

    async def on_redis(do: Callable[[Operator], _T]) -> _T:
        def run() -> _T:
            with _operator(config.redis) as operator:
                return do(operator)

        return await run_in_threadpool(run)

    @router.get("", summary="What the noise cache holds", responses=responses(401, 403, 503))
    async def report() -> CacheReport:
        """On Redis by tenant; in the workers' memory by worker, all tenants together."""
        shared = config.cache.enabled and config.redis.url is not None
        local = config.cache.enabled and not shared
        return CacheReport(
            backend="redis" if shared else "memory" if local else "off",
            policy=config.cache.policy,
            limit_bytes=config.cache.max_bytes,
            shares=await on_redis(_shares) if shared else [],
            workers=_workers(await services.dispatcher.metrics()) if local else [],
        )

    @router.delete(
        "",
        summary="Forget states of the noise cache",
        responses=responses(401, 403, 422, 503),
    )
    async def clear(
        tenant: Annotated[str | None, Query(max_length=64)] = None,
        shared: Annotated[bool, Query(description="Those that all tenants share.")] = False,
        everything: Annotated[bool, Query(description="Everybody's.")] = False,
    ) -> CacheCleared:
        """Say whose: one of `tenant`, `shared`, `everything`. Every worker's index follows.

        Needs a cache on Redis: of the workers' memory 422, as each of them has its own.
        """
        if sum((tenant is not None, shared, everything)) != 1:
            raise InvalidRequestError(
                "say whose states: one of tenant, shared, everything", field="tenant"
            )
        if not config.cache.enabled or config.redis.url is None:
            raise UnsupportedError(
                "only a noise cache on Redis can be cleared from here; a worker's own memory is"
                " cleared by starting it anew (redis.url puts the cache on Redis)"
            )

        def do(operator: Operator) -> int:
            return sum(
                operator.clear(namespace)
                for namespace in operator.namespaces()
                if everything or namespace.tenant == tenant
            )

        return CacheCleared(states=await on_redis(do))

    return router


@contextmanager
def _operator(config: RedisConfig) -> Iterator[Operator]:
    import redis  # whoever has no Redis need not import its client

    from cache.inspection import Operator
    from server.redis_settings import redis_settings

    client = redis_settings(config, _TIMEOUT_S).client(_TIMEOUT_S)
    try:
        yield Operator(client)
    except redis.RedisError as error:
        raise CacheUnavailableError(
            f"the noise cache's Redis cannot be asked: {type(error).__name__}"
        ) from error
    finally:
        client.close()


def _shares(operator: Operator) -> list[CacheShare]:
    reports = [operator.look(namespace) for namespace in operator.namespaces()]
    return [
        CacheShare(
            tenant=report.namespace.tenant,
            checkpoint=report.namespace.checkpoint,
            states=report.states,
            bytes=report.size_bytes,
        )
        for report in reports
    ]


def _workers(pages: Sequence[tuple[str, bytes]]) -> list[WorkerCache]:
    """Read from the workers' metrics, which every one of them gives anyway."""
    found = []
    for name, page in pages:
        values = {
            sample.name: int(sample.value)
            for family in families_of(page)
            if family.name in ("darkroom_cache_states", "darkroom_cache_bytes")
            for sample in family.samples
        }
        if values:
            found.append(
                WorkerCache(
                    worker=name,
                    states=values.get("darkroom_cache_states", 0),
                    bytes=values.get("darkroom_cache_bytes", 0),
                )
            )
    return found
