"""Bodies of the noise cache's operator routes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from server.schemas.base import Reply


class CacheState(Reply):
    """A stored state, and what it is worth to the eviction policy."""

    id: str
    kind: Annotated[str, Field(examples=["clean"])]
    log_snr: float | None
    """The noise level at which it stands; null for a finished picture."""
    uses: int
    bytes: int
    score: float
    """The lowest goes first."""
    worker: str | None
    """Which worker's memory it is in; null on Redis."""


class CacheShare(Reply):
    """What a tenant's pictures of one checkpoint have left, over all workers."""

    tenant: Annotated[str | None, Field(examples=["studio"])]
    """null: the states that all tenants share."""
    checkpoint: Annotated[str, Field(examples=["9f2c41d07b3e"])]
    """Fingerprint of its weights and configuration."""
    models: Annotated[list[str], Field(examples=[["tintype"]])]
    """The models of these weights that are served; none where they were reloaded or removed."""
    entries: int
    """Pictures that have left something."""
    states: int
    bytes: int
    """Charged; never above `limit_bytes`."""
    limit_bytes: int
    """What it may grow to: in memory the sum over the workers that answered."""
    best: list[CacheState]
    """The states of the highest scores, where asked for."""


class WorkerCache(Reply):
    """What a worker keeps in its own memory."""

    worker: str
    entries: int
    states: int
    bytes: int


class CacheReport(Reply):
    """The noise cache of the application."""

    backend: Literal["off", "memory", "redis"]
    policy: Annotated[str, Field(examples=["lcbfu"])]
    limit_bytes: int
    """Of one tenant's states of one model; in memory, in each worker."""
    entries: int
    states: int
    bytes: int
    """These three are the sums over `shares`."""
    shares: list[CacheShare]
    """By tenant and checkpoint, the largest first. In memory every worker has a cache of its own,
    and these are the sums: what two workers hold counts twice."""
    workers: list[WorkerCache]
    """For `memory`: of every worker that answered in time. Empty on Redis."""
    missing: list[str]
    """For `memory`: workers that did not answer in time, and that no number here includes."""


class CacheForgotten(Reply):
    """What a tenant's pictures of one checkpoint had left."""

    tenant: str | None
    """null: the states that all tenants share."""
    checkpoint: str
    models: list[str]
    entries: int
    states: int
    bytes: int


class CacheCleared(Reply):
    """What was forgotten, in all and by tenant and checkpoint."""

    entries: int
    states: int
    bytes: int
    shares: list[CacheForgotten]
