"""Sends one planned request, and says what came of it, in the server's own timings too.

Locust's sessions are ``requests`` sessions: its users and the open-loop driver send the very same
bytes.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from requests import Response, Session

from loadtests.traffic.plan import Planned

PHASES = ("queue", "encode", "cache", "denoise", "decode")


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What came of a request.

    Attributes:
        outcome: ``ok``, ``given_up`` (as planned), or the server's error code, or
            ``transport:<kind>`` where there was no answer.
        late_s: how long after its planned time it was sent: the driver's own fault.
        phases_s: the server's timings by phase, from the reply.
    """

    kind: str
    at_s: float
    prompt: str
    steps: int
    width_px: int
    height_px: int
    outcome: str = "ok"
    status: int = 0
    late_s: float = 0.0
    total_s: float = 0.0
    first_preview_s: float | None = None
    phases_s: dict[str, float] = field(default_factory=dict)
    seed: int | None = None
    approximations: dict[str, str] = field(default_factory=dict)
    picture: bytes | None = None

    @property
    def ok(self) -> bool:
        """Whether the client got what it wanted."""
        return self.outcome in ("ok", "given_up")


class GivenUpError(Exception):
    """The client went away, as planned."""


def send(
    session: Session, base: str, planned: Planned, *, timeout_s: float, keep_picture: bool = False
) -> Outcome:
    """Send ``planned`` and wait for its end. Never raises for what the server or network does."""
    outcome = Outcome(
        kind=planned.kind,
        at_s=planned.at_s,
        prompt=planned.prompt,
        steps=planned.steps,
        width_px=planned.width_px,
        height_px=planned.height_px,
    )
    began_s = time.perf_counter()
    try:
        _SENDERS[planned.kind](session, base, planned, outcome, began_s, timeout_s)
    except GivenUpError:
        outcome.outcome = "given_up"
    except Exception as error:
        outcome.outcome = f"transport:{type(error).__name__}"
    outcome.total_s = time.perf_counter() - began_s
    if not keep_picture:
        outcome.picture = None
    return outcome


def _fields(planned: Planned) -> dict[str, Any]:
    return {
        "prompt": planned.prompt,
        "size": f"{planned.width_px}x{planned.height_px}",
        "steps": planned.steps,
    }


def _generation(
    session: Session,
    base: str,
    planned: Planned,
    outcome: Outcome,
    began_s: float,  # noqa: ARG001
    timeout_s: float,
) -> None:
    giving_up = planned.give_up_after_s is not None
    try:
        response = session.request(
            "POST",
            f"{base}/v1/images/generations",
            json=_fields(planned),
            timeout=planned.give_up_after_s or timeout_s,
        )
    except Exception:
        if giving_up:
            raise GivenUpError from None
        raise
    _read_reply(response, outcome)


def _edit(
    session: Session,
    base: str,
    planned: Planned,
    outcome: Outcome,
    began_s: float,  # noqa: ARG001
    timeout_s: float,
) -> None:
    picture = _flat_picture(planned.width_px, planned.height_px)
    response = session.request(
        "POST",
        f"{base}/v1/images/edits",
        data={"prompt": planned.prompt, "steps": str(planned.steps), "strength": "0.7"},
        files={"image": ("in.png", picture, "image/png")},
        timeout=timeout_s,
    )
    _read_reply(response, outcome)


def _stream(
    session: Session,
    base: str,
    planned: Planned,
    outcome: Outcome,
    began_s: float,
    timeout_s: float,
) -> None:
    body = _fields(planned) | {"stream": True, "partial_images": 2}
    response = session.request(
        "POST", f"{base}/v1/images/generations", json=body, stream=True, timeout=timeout_s
    )
    _follow(response, planned, outcome, began_s)


def _job(
    session: Session,
    base: str,
    planned: Planned,
    outcome: Outcome,
    began_s: float,
    timeout_s: float,
) -> None:
    response = session.request("POST", f"{base}/v1/jobs", json=_fields(planned), timeout=timeout_s)
    if response.status_code >= 400:
        _read_reply(response, outcome)
        return
    job = response.json()["id"]
    events = session.request("GET", f"{base}/v1/jobs/{job}/events", stream=True, timeout=timeout_s)
    try:
        _follow(events, planned, outcome, began_s)
    except GivenUpError:
        session.request("DELETE", f"{base}/v1/jobs/{job}", timeout=timeout_s)
        raise


_SENDERS = {"generation": _generation, "edit": _edit, "stream": _stream, "job": _job}


def _read_reply(response: Response, outcome: Outcome) -> None:
    outcome.status = response.status_code
    body = response.json()
    if response.status_code >= 400:
        outcome.outcome = str(body["error"]["code"])
        return
    for phase in PHASES:
        if value := response.headers.get(f"x-darkroom-{phase}-ms"):
            outcome.phases_s[phase] = float(value) / 1000
    _read_picture(body["data"][0], outcome)


def _read_picture(item: Mapping[str, Any], outcome: Outcome) -> None:
    if item.get("b64_json"):
        outcome.picture = base64.b64decode(item["b64_json"])
    told = item.get("darkroom") or {}
    outcome.seed = told.get("seed")
    outcome.approximations = dict(told.get("approximations") or {})


def _follow(response: Response, planned: Planned, outcome: Outcome, began_s: float) -> None:
    """Read server-sent events to the end."""
    outcome.status = response.status_code
    if response.status_code >= 400:
        _read_reply(response, outcome)
        return
    finished = False
    try:
        for name, data in _events(response):
            elapsed_s = time.perf_counter() - began_s
            if planned.give_up_after_s is not None and elapsed_s > planned.give_up_after_s:
                raise GivenUpError
            if outcome.first_preview_s is None and ("partial" in name or "preview_b64" in data):
                outcome.first_preview_s = elapsed_s
            # A job's last event is `done` however it ended, with the error that ended it.
            if error := data.get("error"):
                outcome.outcome = str(error["code"])
                finished = True
            elif name == "done" and data["status"] != "succeeded":
                outcome.outcome = str(data["status"])
                finished = True
            elif name == "picture" or name.endswith(".completed"):
                _read_timings(data, outcome)
                finished = True
    finally:
        response.close()
    if not finished:
        outcome.outcome = "transport:stream_ended"


def _read_timings(data: Mapping[str, Any], outcome: Outcome) -> None:
    told = data.get("darkroom") or {}
    for phase, value in (told.get("timings_ms") or {}).items():
        if phase in PHASES:
            outcome.phases_s[phase] = float(value) / 1000
    outcome.seed = told.get("seed")
    outcome.approximations = dict(told.get("approximations") or {})
    if data.get("b64_json"):
        outcome.picture = base64.b64decode(data["b64_json"])


def _events(response: Response) -> Iterator[tuple[str, dict[str, Any]]]:
    name, data = "message", ""
    for raw in response.iter_lines():
        line = raw.decode()
        if line.startswith("event:"):
            name = line.removeprefix("event:").strip()
        elif line.startswith("data:"):
            data += line.removeprefix("data:").strip()
        elif not line and data:
            yield name, ({} if data == "[DONE]" else json.loads(data))
            name, data = "message", ""


def _flat_picture(width_px: int, height_px: int) -> bytes:
    from PIL import Image

    buffer = BytesIO()
    Image.new("RGB", (width_px, height_px), (90, 140, 200)).save(buffer, "PNG")
    return buffer.getvalue()
