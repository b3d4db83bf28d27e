"""Jobs and stores to try the contract on."""

from __future__ import annotations

from typing import Any

from engine.types import GenerateRequest
from server.jobs.records import Job, JobSpec, JobState, WebhookTarget, pack


def job(
    job_id: str = "j1",
    *,
    owner: str = "gateway-1",
    tenant: str = "atelier",
    pictures: int = 1,
    created_at_s: float = 1000.0,
    deadline_at_s: float = 2000.0,
    webhook: WebhookTarget | None = None,
    **more: Any,
) -> Job:
    request = GenerateRequest(prompt="a red umbrella", steps=4, timesteps=(9.0, 5.0, 2.5, 1.0))
    spec = JobSpec(
        id=job_id,
        tenant=tenant,
        created_at_s=created_at_s,
        deadline_at_s=deadline_at_s,
        model="tintype",
        request=pack(request),
        seeds=tuple(range(7, 7 + pictures)),
        width_px=64,
        height_px=64,
        rows=8,
        webhook=webhook,
        **more,
    )
    return Job(spec=spec, state=JobState(), owner=owner)
