"""Bodies of the noise cache's operator routes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from server.schemas.base import Reply


class CacheShare(Reply):
    """What a tenant's pictures of one checkpoint have left."""

    tenant: Annotated[str | None, Field(examples=["studio"])]
    """null: the states that all tenants share."""
    checkpoint: Annotated[str, Field(examples=["9f2c41d07b3e"])]
    """Fingerprint of its weights and configuration."""
    states: int
    bytes: int
    """Charged; never above `limit_bytes`."""


class WorkerCache(Reply):
    """What a worker keeps in its own memory."""

    worker: str
    states: int
    bytes: int


class CacheReport(Reply):
    """The noise cache of the application."""

    backend: Literal["off", "memory", "redis"]
    policy: Annotated[str, Field(examples=["lcbfu"])]
    limit_bytes: int
    """Of one tenant's states of one model."""
    shares: list[CacheShare]
    """On Redis: of every tenant. Empty for `memory`."""
    workers: list[WorkerCache]
    """For `memory`: of every worker that answered in time. Empty on Redis."""


class CacheCleared(Reply):
    """What was forgotten."""

    states: int
