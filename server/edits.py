"""The multipart form of ``/v1/images/edits``: its fields, its pictures, and how they are fitted."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image as Pillow
from PIL import ImageOps
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request

from engine.errors import InvalidRequestError
from engine.types import Image
from server.config import LimitsConfig
from server.error_replies import invalid
from server.errors import UnprocessableError
from server.messages import ModelInfo
from server.orders import DEFAULT_STRENGTH, Inputs
from server.schemas.openai import EditFields
from server.sizes import Size, allowed_size, fitted_size
from server.uploads import decode_picture, off_loop

FAITHFUL_STRENGTH = 0.5
_FILES = {"image": "image", "image[]": "image", "mask": "mask"}
# Fields that are no plain value; in a form they are written as JSON.
_STRUCTURED = ("timesteps", "guidance_interval", "cache")
_MAX_FIELDS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class EditFiles:
    """The files of a form, as they came."""

    image: bytes
    mask: bytes | None


async def read_edit(request: Request) -> tuple[EditFields, EditFiles]:
    """Read the form. Its size is bounded by the layers below, file by file and in all.

    Raises:
        InvalidRequestError: no form, an unknown or wrong field, no picture.
        UnprocessableError: more than one picture or mask.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise InvalidRequestError("the body must be multipart/form-data", field="body")
    form = await request.form(max_files=4, max_fields=_MAX_FIELDS)
    try:
        return _fields(form), await _files(form)
    finally:
        await form.close()


async def inputs_of(
    body: EditFields, files: EditFiles, model: ModelInfo, limits: LimitsConfig
) -> Inputs:
    """Decode the pictures and bring them to the size that is drawn, off the event loop.

    Raises:
        DarkroomError: a file that is no picture or too large, or a size off the model's grid.
    """
    wanted = allowed_size(body.size, model, limits)
    strength = body.strength
    if strength is None:
        strength = FAITHFUL_STRENGTH if body.input_fidelity == "high" else DEFAULT_STRENGTH

    def decode() -> Inputs:
        picture = decode_picture(files.image, limits, field="image")
        size = wanted or fitted_size(picture.size, model, limits)
        mask = None
        if files.mask is not None:
            mask = _mask(decode_picture(files.mask, limits, field="mask"), picture.size, size)
        return Inputs(image=_opaque(picture, size), mask=mask, strength=strength)

    return await off_loop(decode)


def _fields(form: FormData) -> EditFields:
    values: dict[str, Any] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name not in _FILES:
                raise InvalidRequestError(f"unknown file {name[:64]!r}", field="body")
            continue
        if name in _FILES:
            raise InvalidRequestError(f"{name} must be a file", field=_FILES[name])
        if name in values:
            raise InvalidRequestError(f"{name[:64]} is there twice", field=name[:64])
        values[name] = _structured(name, value) if name in _STRUCTURED else value
    try:
        return EditFields.model_validate(values)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        raise invalid(found[0], others=len(found) - 1) from None


def _structured(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidRequestError(f"{name} is not JSON", field=name) from None


async def _files(form: FormData) -> EditFiles:
    found: dict[str, UploadFile] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if _FILES[name] in found:
                raise UnprocessableError(
                    f"more than one {_FILES[name]}; one is drawn from", field=_FILES[name]
                )
            found[_FILES[name]] = value
    if "image" not in found:
        raise InvalidRequestError("image: a file is required", field="image")
    mask = await found["mask"].read() if "mask" in found else None
    return EditFiles(image=await found["image"].read(), mask=mask)


# ------------------------------------------------------------------------------------ pixels


def _opaque(picture: Pillow.Image, size: Size) -> Image:
    """(height, width, 3): transparent parts show white, as on paper."""
    if "A" in picture.getbands():
        layers = picture.convert("RGBA")
        picture = Pillow.alpha_composite(Pillow.new("RGBA", layers.size, "white"), layers)
    return np.asarray(_fit(picture.convert("RGB"), size), dtype=np.uint8)


def _mask(mask: Pillow.Image, picture_size: Size, size: Size) -> Image:
    """(height, width), white where it is repainted: the mask's transparent, else white, parts."""
    if mask.size != picture_size:
        raise InvalidRequestError(
            f"the mask is {mask.width}x{mask.height} px, the image"
            f" {picture_size[0]}x{picture_size[1]} px; they must be equal",
            field="mask",
        )
    if "A" in mask.getbands():
        grey = ImageOps.invert(mask.convert("RGBA").getchannel("A"))
    else:
        grey = mask.convert("L")
    return np.asarray(_fit(grey, size), dtype=np.uint8)


def _fit(picture: Pillow.Image, size: Size) -> Pillow.Image:
    """Scale to cover ``size``, and crop around the middle; a picture of that size stays exact."""
    if picture.size == size:
        return picture
    return ImageOps.fit(picture, size, Pillow.Resampling.LANCZOS)
