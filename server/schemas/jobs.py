"""Bodies of the interface of jobs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from server.jobs.records import Status
from server.messages import PictureFormat
from server.schemas.base import Body, ErrorDetail, Reply
from server.schemas.draw import DrawnReply
from server.schemas.openai import GenerationBody, Usage


class WebhookBody(Body):
    """Whom to tell when the job is done."""

    url: Annotated[str, Field(max_length=2000, examples=["https://hooks.example.com/darkroom"])]
    """Only hosts that the operator lists, and never private addresses unless listed too."""
    secret: Annotated[str, Field(min_length=16, max_length=256)]
    """Signs what is sent, as standardwebhooks.com has it: `whsec_` and base64, or plain text. It
    is never shown again."""


class JobBody(GenerationBody):
    """A request for pictures from a prompt, to be drawn in the background.

    `partial_images` previews of each picture come with the events; `stream` does not apply.
    """

    response_format: Annotated[Literal["b64_json", "url"] | None, Field(examples=["url"])] = None
    """`url`, the default, links to the pictures; `b64_json` puts them into the reply as well."""
    degrade: Literal[False] = False
    """Does not apply: a job waits until there is room for all of its steps."""
    webhook: WebhookBody | None = None
    """Called once the job has ended, however it did."""


class JobPictureReply(Reply):
    """A finished picture."""

    index: int
    url: str
    """A link that works for a while without a key; each reply has fresh ones."""
    b64_json: str | None = None
    darkroom: DrawnReply


class JobReply(Reply):
    """A job."""

    id: Annotated[str, Field(examples=["job-4f0c4b2e9f4d4d0fb4d1a0c9e2b7a6d1"])]
    object: Literal["job"] = "job"
    status: Status
    cancelling: bool
    """Whether somebody asked to cancel it, and it has not ended yet."""
    created_at: int
    started_at: int | None
    finished_at: int | None
    expires_at: int | None
    """When a finished job is forgotten, at the latest."""
    model: str
    n: int
    size: Annotated[str, Field(examples=["512x512"])]
    output_format: PictureFormat
    usage: Usage
    attempts: int
    """More than 1 where a gateway was lost on the way."""
    data: list[JobPictureReply]
    """The pictures that are finished."""
    error: ErrorDetail | None
    """Why the job failed."""


class JobList(Reply):
    """Jobs, the newest first."""

    object: Literal["list"] = "list"
    data: list[JobReply]
    has_more: bool
    """Whether there are older ones: ask again with `after` set to the last id."""
