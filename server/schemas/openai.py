"""Bodies of the OpenAI Images interface, with Darkroom's own fields beside the standard ones."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from server.messages import PictureFormat
from server.schemas.base import Reply
from server.schemas.draw import DrawBody, DrawnReply


class GenerationBody(DrawBody):
    """A request for pictures from a prompt."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "a red umbrella"},
                {"prompt": "a red umbrella", "n": 2, "seed": 7, "steps": 10, "guidance": 5.0},
            ]
        }
    )

    prompt: Annotated[str, Field(min_length=1, max_length=32_000, examples=["a red umbrella"])]
    """What to draw. The configured bound on its length is usually lower."""

    response_format: Annotated[Literal["b64_json", "url"] | None, Field(examples=["b64_json"])] = (
        None
    )
    """`b64_json`, the default, puts the pictures into the reply; `url` links to them for a time.
    Events of a stream always carry them."""
    style: Literal["vivid", "natural"] | None = None
    """Accepted without effect: say it in the prompt."""
    degrade: bool = False
    """Where the request would be refused for load, or because its deadline cannot be met, draw with
    three quarters, a half or a quarter of its steps instead; a model that is distilled for few
    steps, and asked for another solver than its own, with its own in a fifth of the steps.
    `approximations` then says so."""
    stream: bool | None = None
    """Answer with server-sent events instead of one reply."""
    partial_images: Annotated[int | None, Field(ge=0, le=100, examples=[2])] = None
    """With `stream`: at most so many previews of each picture, evenly spread over its steps."""


class EditFields(GenerationBody):
    """The fields, other than files, of a request to change a picture."""

    strength: Annotated[float | None, Field(gt=0.0, le=1.0, examples=[0.6])] = None
    """How far to go from the picture: 1 keeps nothing. By default what `input_fidelity` says."""
    input_fidelity: Literal["high", "low"] | None = None
    """`high` stands for a strength of 0.5; otherwise it is 0.8."""


class ImageReply(Reply):
    """One picture, by value or by link."""

    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = None
    """Always null: prompts are drawn as they are written."""
    darkroom: DrawnReply


class TokenDetails(Reply):
    """Always zero: Darkroom does not count tokens."""

    image_tokens: int = 0
    text_tokens: int = 0


class Usage(Reply):
    """What the request cost. The unit of work here is a step of one UNet row, not a token: that
    number stands in `output_tokens` and `total_tokens`, where billing tools look."""

    input_tokens: int = 0
    input_tokens_details: TokenDetails = TokenDetails()
    output_tokens: int
    total_tokens: int


class ImagesReply(Reply):
    """The pictures of one request, in order."""

    created: int
    background: Literal["opaque"] = "opaque"
    output_format: PictureFormat
    quality: str | None = None
    size: str
    usage: Usage
    data: list[ImageReply]


class ModelDetails(Reply):
    """What a model can do."""

    aliases: list[str]
    family: str
    native_px: int
    size_multiple_px: int
    min_px: int
    max_px: int
    guidance_default: float
    guidable: bool
    """Whether guidance costs a second UNet row; distilled models have it built in."""
    solver_default: Annotated[str, Field(examples=["dpmpp_2m"])]
    """What draws a request that names no solver."""
    schedule_default: str
    scheduler_class: Annotated[str, Field(examples=["LMSDiscreteScheduler"])]
    """The Diffusers scheduler that the checkpoint names."""
    scheduler_stand_in: Annotated[str | None, Field(examples=["LMSDiscrete as dpmpp_2m"])]
    """Where `solver_default` is not that scheduler's own solver but the nearest that is served:
    which for which, in the words of the reply's `approximations.scheduler`. A request that names a
    solver gets exactly that one. null: drawn as the class itself would."""
    scheduler_note: Annotated[
        str, Field(examples=["another linear multistep solver, stabler at few steps"])
    ]
    """How the stand-in differs, or what of the class is served; may be empty."""
    precision: str
    backend: str
    plan_digest: str
    max_clip_skip: int
    """The largest `clip_skip` that leaves the text encoders a layer."""
    inpainting_only: bool
    default: bool
    """Whether requests that name no model get this one."""


class ModelReply(Reply):
    """A model, as OpenAI's clients list it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["darkroom"] = "darkroom"
    darkroom: ModelDetails


class ModelList(Reply):
    """All configured models, the default first."""

    object: Literal["list"] = "list"
    data: list[ModelReply]
