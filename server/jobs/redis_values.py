"""Between what Redis holds and the nouns of jobs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from server.jobs.records import Job, JobEvent, spec_of, state_of
from server.jobs.redis_client import key

FIELDS = ("spec", "state", "owner", "cancel", "attempts")
"""Of a job's hash; what :func:`job_of` takes."""


def job_of(values: Sequence[bytes | None]) -> Job | None:
    """A job of its hash's :data:`FIELDS`; None where it is not there."""
    spec, state, owner, cancel, attempts = values
    if spec is None or state is None or owner is None:
        return None
    return Job(
        spec=spec_of(spec),
        state=replace(state_of(state), attempts=int(attempts or 1)),
        owner=owner.decode(),
        cancelling=cancel == b"1",
    )


def event_of(number: bytes, fields: Mapping[bytes, bytes]) -> JobEvent:
    """An event of an entry of its stream."""
    data = json.loads(fields[b"data"])
    return JobEvent(int(number.split(b"-")[0]), fields[b"name"].decode(), data)


def blob_keys(job: Job) -> list[str]:
    """Keys of every picture, then of every preview."""
    indices = [str(index) for index in range(len(job.spec.seeds))]
    return [key(kind, job.spec.id, index) for kind in ("picture", "preview") for index in indices]
