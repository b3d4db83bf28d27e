"""Reading the events of streams and jobs, as the server writes them."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest
from requests import Response

from loadtests.traffic.client import Outcome, _follow
from loadtests.traffic.plan import Planned

PLANNED = Planned(at_s=0.0, kind="job", prompt="a cat", steps=20, width_px=128, height_px=128)
TOLD = {"seed": 7, "timings_ms": {"queue": 10.0, "denoise": 200.0, "total": 210.0}}


class Events:
    """As much of a response as a reader of events uses."""

    status_code = 200

    def __init__(self, *events: tuple[str, dict[str, Any]]) -> None:
        lines = [[f"event: {name}", f"data: {json.dumps(data)}", ""] for name, data in events]
        self._lines = [line.encode() for group in lines for line in group]

    def iter_lines(self) -> list[bytes]:
        return self._lines

    def close(self) -> None:
        self._lines = []


def followed(*events: tuple[str, dict[str, Any]]) -> Outcome:
    outcome = Outcome(kind="job", at_s=0.0, prompt="", steps=20, width_px=128, height_px=128)
    _follow(cast(Response, Events(*events)), PLANNED, outcome, 0.0)
    return outcome


def test_a_job_tells_its_timings_with_its_picture() -> None:
    outcome = followed(
        ("progress", {"index": 0, "step": 5, "preview_b64": "AA=="}),
        ("picture", {"index": 0, "darkroom": TOLD}),
        ("done", {"status": "succeeded", "error": None}),
    )

    assert (outcome.outcome, outcome.seed) == ("ok", 7)
    assert outcome.phases_s == {"queue": 0.01, "denoise": 0.2}
    assert outcome.first_preview_s is not None


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (("done", {"status": "failed", "error": {"code": "overloaded"}}), "overloaded"),
        (("done", {"status": "cancelled", "error": None}), "cancelled"),
        (("error", {"error": {"code": "worker_lost"}}), "worker_lost"),
        (("progress", {"index": 0, "step": 5}), "transport:stream_ended"),
    ],
)
def test_whatever_did_not_end_well_is_no_success(
    last: tuple[str, dict[str, Any]], expected: str
) -> None:
    assert followed(last).outcome == expected
