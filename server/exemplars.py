"""Exemplars: the request behind a bucket of a histogram, for "which one was so slow?".

A request's id may be its client's own. What it may look like is decided here once, so that no id
can break a page of metrics: OpenMetrics allows an exemplar 128 characters in all.
"""

from __future__ import annotations

import re

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
"""Ids that are taken from clients; all others are replaced by one of ours."""


def exemplar_of(request_id: str | None, trace_id: str | None = None) -> dict[str, str] | None:
    """The labels of an exemplar; None, which is no exemplar, for an id that is not well-formed."""
    if request_id is None or not REQUEST_ID.fullmatch(request_id):
        return None
    return {"request_id": request_id} | ({} if trace_id is None else {"trace_id": trace_id})


def exemplar_of_task(request_id: str) -> dict[str, str] | None:
    """The same for what a task calls its request: the request's or job's id, a dot, and a suffix.

    Only the part before the suffix means something to whoever asked, and in the log.
    """
    return exemplar_of(request_id.rpartition(".")[0])
