"""What every body shares: strictness, errors, and the words that more than one interface uses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from engine.types import MAX_SEED, Timings

SolverName = Literal[
    "ddim",
    "ddpm",
    "euler",
    "euler_ancestral",
    "heun",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "unipc",
    "plms",
    "lcm",
    "tcd",
]
ScheduleName = Literal[
    "leading",
    "trailing",
    "linspace",
    "karras",
    "exponential",
    "align_your_steps",
    "align_your_steps_sdxl",
    "distilled",
]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]


class Body(BaseModel):
    """Base of request bodies: nothing unknown, and no NaN or infinity."""

    model_config = ConfigDict(
        extra="forbid", allow_inf_nan=False, frozen=True, use_attribute_docstrings=True
    )


class Reply(BaseModel):
    """Base of reply bodies."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ErrorDetail(Reply):
    """What went wrong."""

    type: Annotated[str, Field(examples=["invalid_request_error"])]
    """The kind of error; clients branch on it."""
    code: Annotated[str, Field(examples=["invalid_value"])]
    """The error itself, one name each."""
    message: Annotated[str, Field(examples=["steps is 500; at most 150 is allowed"])]
    """For people: what was wrong, and what is allowed. Never contains a prompt."""
    param: Annotated[str | None, Field(examples=["steps"])] = None
    """The parameter that is to blame, where one is."""


class ErrorReply(Reply):
    """Every error of every route, in the shape that OpenAI's clients know."""

    error: ErrorDetail


class TimingsReply(Reply):
    """Where the time of one picture went, in milliseconds."""

    queue: float
    """From submission to its first step."""
    encode: float
    """Prompt, and input picture where there is one."""
    cache: float
    """Looking for a noise state to start from."""
    denoise: float
    decode: float
    total: float

    @classmethod
    def of(cls, timings: Timings) -> TimingsReply:
        """The engine's seconds."""
        return cls(
            queue=_ms(timings.queue_s),
            encode=_ms(timings.encode_s),
            cache=_ms(timings.cache_s),
            denoise=_ms(timings.denoise_s),
            decode=_ms(timings.decode_s),
            total=_ms(timings.total_s),
        )


def _ms(seconds: float) -> float:
    return round(seconds * 1000.0, 2)


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries of the errors that a route may give.

    Those of the layers around every route (400, 408, 413, 429, 500) are added to all.
    """
    return {status: {"model": ErrorReply, "description": MEANING[status]} for status in statuses}


MEANING = {
    400: "Malformed, unknown or out of range; `param` names the field",
    401: "No API key, or one that is not known",
    403: "The key is known but may not do this, or the content check refused",
    404: "Not there",
    405: "Another method",
    408: "The request arrived too slowly",
    409: "In conflict with what is there",
    413: "The body is larger than the configured bound",
    415: "A media type that this route does not take",
    422: "Well-formed, but not servable: a size off the grid, a combination that does not exist",
    429: "Too much at once: try again after `Retry-After` seconds; or, with the code"
    " `deadline_too_short`, a deadline that no idle server could meet either",
    499: "The client closed the connection; seen in logs and metrics only",
    500: "The server failed; its log says why",
    503: "Draining, not ready, or no worker left: try again after `Retry-After` seconds",
    504: "The deadline passed while the picture waited or was being drawn",
}
