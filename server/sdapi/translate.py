"""Automatic1111's words in ours, and back."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image as Pillow
from PIL import ImageOps
from pydantic import ValidationError

from engine.errors import InvalidRequestError
from engine.png import (
    SAMPLERS,
    SCHEDULE_TYPES,
    VERSION,
    Parameters,
    format_parameters,
)
from server.config import HttpConfig, LimitsConfig
from server.error_replies import invalid
from server.errors import UnprocessableError
from server.messages import Drawn, ModelInfo
from server.orders import Inputs
from server.schemas.draw import DrawBody
from server.schemas.sdapi import DrawSettings, Img2ImgBody, Txt2ImgBody
from server.sizes import Size, allowed_size, fitted_size
from server.uploads import decode_picture, from_base64

AUTOMATIC = "Automatic"
_SOLVERS = {label.lower(): name for name, label in SAMPLERS.items()}
_SOLVERS |= {name: name for name in SAMPLERS}
_FORMATS = {"png": "png", "jpg": "jpeg", "jpeg": "jpeg", "webp": "webp"}
_REFUSED = (
    "styles",
    "tiling",
    "restore_faces",
    "subseed_strength",
    "refiner_checkpoint",
    "script_name",
    "alwayson_scripts",
    "enable_hr",
)
CLIP_STOP = "CLIP_stop_at_last_layers"
_DEFAULT_STEPS = 20
_MAX_CLIP_STOP = 12


def schedules() -> dict[str, str]:
    """Schedules by label, each once; two that share a label are the checkpoint family's affair."""
    labels: dict[str, str] = {}
    for name, label in SCHEDULE_TYPES.items():
        if label != AUTOMATIC:
            labels.setdefault(label, name)
    return labels


def draw_body(settings: DrawSettings, model: ModelInfo) -> DrawBody:
    """The request in our own words.

    Raises:
        InvalidRequestError: an unknown sampler, scheduler or format, or a value out of bounds.
        UnprocessableError: a feature that would change the picture and is not served, or more clip
            skip than the model has layers.
    """
    for name in _REFUSED:
        if getattr(settings, name, None):
            raise UnprocessableError(f"{name} is not served; leave it out", field=name)
    solver, schedule = solver_of(settings)
    clip_stop_at = clip_stop_of(settings, model)
    fields: dict[str, Any] = {
        "prompt": settings.prompt,
        "negative_prompt": settings.negative_prompt or "",
        "n": (settings.batch_size or 1) * (settings.n_iter or 1),
        "seed": None if settings.seed in (None, -1) else settings.seed,
        "solver": solver,
        "schedule": schedule,
        "steps": settings.steps or _DEFAULT_STEPS,
        "guidance": settings.cfg_scale,
        "clip_skip": clip_stop_at - 1,
        "eta": settings.eta if solver in ("ddim", "tcd") else None,
        "output_format": _format_of(settings),
        "size": size_text(settings, model),
        # This interface has no word for it, and its users compare pictures by seed.
        "cache": {"mode": "off"},
    }
    try:
        return DrawBody.model_validate(fields)
    except ValidationError as error:
        raise invalid(error.errors(include_url=False, include_input=False)[0]) from None


def size_text(settings: DrawSettings, model: ModelInfo) -> str | None:
    """``WIDTHxHEIGHT``; a side that is left out is the model's own."""
    if settings.width is None and settings.height is None:
        return None
    return f"{settings.width or model.native_px}x{settings.height or model.native_px}"


def model_name(settings: DrawSettings) -> str | None:
    """The model that the request names, without the hash that titles carry."""
    named = (settings.override_settings or {}).get("sd_model_checkpoint")
    if named is not None and not isinstance(named, str):
        raise InvalidRequestError(
            "override_settings.sd_model_checkpoint is no text", field="override_settings"
        )
    return plain_title(named) if named else None


def plain_title(title: str) -> str:
    """``tintype [0123456789]`` and ``tintype.safetensors`` both mean ``tintype``."""
    return title.partition(" [")[0].strip().removesuffix(".safetensors")


def solver_of(settings: DrawSettings) -> tuple[str | None, str | None]:
    """(solver, schedule); a sampler's name may end in its scheduler's, as it did before 1.9.

    Raises:
        InvalidRequestError: one that does not exist, listing those that do.
    """
    labels = {label.lower(): name for label, name in schedules().items()}
    names = labels | {name: name for name in labels.values()}
    schedule = None
    if settings.scheduler and settings.scheduler.lower() != AUTOMATIC.lower():
        schedule = names.get(settings.scheduler.lower())
        if schedule is None:
            raise InvalidRequestError(
                f"unknown scheduler; allowed: {', '.join((AUTOMATIC, *schedules()))}",
                field="scheduler",
            )
    asked = (settings.sampler_name or settings.sampler_index or "").lower()
    if not asked:
        return None, schedule
    for label, name in labels.items():
        if asked not in _SOLVERS and asked.endswith(f" {label}"):
            asked, schedule = asked.removesuffix(f" {label}"), schedule or name
    if asked not in _SOLVERS:
        raise InvalidRequestError(
            f"unknown sampler; allowed: {', '.join(SAMPLERS.values())}", field="sampler_name"
        )
    return _SOLVERS[asked], schedule


def clip_stop_of(settings: DrawSettings, model: ModelInfo) -> int:
    """Clip skip in this interface's count: 1 stops at the last layer, 2 at the one before.

    Always 1 for SDXL: the original takes its penultimate states whatever the setting says, and its
    users leave the setting of another model in place.

    Raises:
        InvalidRequestError: not 1 to 12, which is what the original takes.
        UnprocessableError: the model has fewer layers.
    """
    asked = (settings.override_settings or {}).get(CLIP_STOP, 1)
    number = isinstance(asked, int | float) and not isinstance(asked, bool)
    # Sliders of some clients send 2.0; infinity has no int.
    if not (number and 1 <= asked <= _MAX_CLIP_STOP and asked == int(asked)):
        raise InvalidRequestError(
            f"override_settings.{CLIP_STOP} must be a whole number from 1 to {_MAX_CLIP_STOP}",
            field="override_settings",
        )
    if model.family == "sdxl":
        return 1
    if asked > model.max_clip_skip + 1:
        raise UnprocessableError(
            f"override_settings.{CLIP_STOP} is {asked}; {model.id} allows 1 to"
            f" {model.max_clip_skip + 1}",
            field="override_settings",
        )
    return int(asked)


def _format_of(settings: DrawSettings) -> str:
    asked = (settings.override_settings or {}).get("samples_format", "png")
    if asked not in _FORMATS:
        raise InvalidRequestError(
            f"unknown samples_format; allowed: {', '.join(_FORMATS)}", field="override_settings"
        )
    return _FORMATS[asked]


# ------------------------------------------------------------------------------------ pictures


def inputs_of(
    body: Img2ImgBody, model: ModelInfo, limits: LimitsConfig, http: HttpConfig
) -> Inputs:
    """Decode and fit the pictures. Blocks: call it in a thread.

    Raises:
        DarkroomError: no picture, too large, or a size off the model's grid.
    """
    picture = _decoded(body.init_images[0], limits, http, "init_images").convert("RGB")
    size = allowed_size(size_text(body, model), model, limits)
    size = size or fitted_size(picture.size, model, limits)
    mask = None
    if body.mask is not None:
        mask = _mask(_decoded(body.mask, limits, http, "mask"), bool(body.inpainting_mask_invert))
        mask = _resized(mask, size, crop=body.resize_mode == 1)
    picture = _resized(picture, size, crop=body.resize_mode == 1)
    return Inputs(
        image=np.asarray(picture, dtype=np.uint8),
        mask=None if mask is None else np.asarray(mask, dtype=np.uint8),
        strength=body.denoising_strength or 0.75,
    )


def _decoded(text: str, limits: LimitsConfig, http: HttpConfig, field: str) -> Pillow.Image:
    data = from_base64(text, field=field, max_bytes=http.max_upload_bytes)
    return decode_picture(data, limits, field=field)


def _mask(mask: Pillow.Image, invert: bool) -> Pillow.Image:
    grey = mask.convert("L")
    if "A" in mask.getbands():
        alpha = mask.getchannel("A")
        # A mask that is opaque everywhere has its alpha from the tool that saved it.
        if int(np.asarray(alpha).min()) < 255:
            grey = alpha
    return ImageOps.invert(grey) if invert else grey


def _resized(picture: Pillow.Image, size: Size, *, crop: bool) -> Pillow.Image:
    if picture.size == size:
        return picture
    if crop:
        return ImageOps.fit(picture, size, Pillow.Resampling.LANCZOS)
    return picture.resize(size, Pillow.Resampling.LANCZOS)


# ------------------------------------------------------------------------------------- replies


def info_text(
    settings: DrawSettings, pictures: Sequence[Drawn], *, clip_stop_at: int, interrupted: bool
) -> str:
    """The JSON text that clients read seeds and parameters from."""
    first = pictures[0] if pictures else None
    seeds = [picture.seed for picture in pictures]
    return json.dumps(
        {
            "prompt": settings.prompt,
            "all_prompts": [settings.prompt] * len(pictures),
            "negative_prompt": settings.negative_prompt or "",
            "all_negative_prompts": [settings.negative_prompt or ""] * len(pictures),
            "seed": seeds[0] if seeds else -1,
            "all_seeds": seeds,
            "subseed": -1,
            "all_subseeds": [-1] * len(pictures),
            "subseed_strength": 0,
            "width": first.width_px if first else 0,
            "height": first.height_px if first else 0,
            "sampler_name": SAMPLERS.get(first.solver, first.solver) if first else "",
            "cfg_scale": first.guidance if first else 0,
            "steps": first.steps if first else 0,
            "batch_size": settings.batch_size or 1,
            "restore_faces": False,
            "face_restoration_model": None,
            "sd_model_name": first.model if first else "",
            "sd_model_hash": first.plan_digest[:10] if first else "",
            "sd_vae_name": None,
            "sd_vae_hash": None,
            "seed_resize_from_w": -1,
            "seed_resize_from_h": -1,
            "denoising_strength": getattr(settings, "denoising_strength", None),
            "extra_generation_params": {},
            "index_of_first_image": 0,
            "infotexts": [_infotext(settings, picture, clip_stop_at) for picture in pictures],
            "styles": [],
            "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
            "clip_skip": clip_stop_at,
            "is_using_inpainting_conditioning": False,
            "version": VERSION,
            "interrupted": interrupted,
        }
    )


def parameters_echo(settings: Txt2ImgBody | Img2ImgBody) -> dict[str, Any]:
    """The request as it was understood, pictures left out unless they were asked for."""
    echo = settings.model_dump()
    if isinstance(settings, Img2ImgBody) and not settings.include_init_images:
        echo |= {"init_images": None, "mask": None}
    return echo


def encoded(pictures: Sequence[Drawn]) -> list[str]:
    """Files in base64."""
    return [base64.b64encode(picture.data).decode() for picture in pictures]


def _infotext(settings: DrawSettings, picture: Drawn, clip_stop_at: int) -> str:
    values = {
        "Steps": str(picture.steps),
        "Sampler": SAMPLERS.get(picture.solver, picture.solver),
        "Schedule type": SCHEDULE_TYPES.get(picture.schedule, picture.schedule),
        "CFG scale": f"{picture.guidance:g}",
        "Seed": str(picture.seed),
        "Size": f"{picture.width_px}x{picture.height_px}",
        "Model hash": picture.plan_digest[:10],
        "Model": picture.model,
        **({"Clip skip": str(clip_stop_at)} if clip_stop_at > 1 else {}),
        "Version": VERSION,
    }
    return format_parameters(Parameters(settings.prompt, settings.negative_prompt or "", values))
