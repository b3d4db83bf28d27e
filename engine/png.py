"""Pictures on disk with the parameters that drew them, in Automatic1111's text format.

::

    a red umbrella
    Negative prompt: blurry
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.0, Seed: 1, Size: 512x512, …

PNG holds the text in a ``parameters`` chunk, JPEG and WebP in EXIF's UserComment, which is where
existing viewers look. The format cannot quote a prompt: one that it would garble is given once
more, quoted, among the settings, so that :func:`parse_parameters` always returns what was written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL import ExifTags, PngImagePlugin
from PIL import Image as PilImage

from engine.errors import InvalidRequestError, LimitExceededError

if TYPE_CHECKING:
    from engine.types import Image, Picture


VERSION = "darkroom 0.1.0"
PictureFormat = Literal["png", "jpeg", "webp"]

SAMPLERS = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "unipc": "UniPC",
    "plms": "PLMS",
    "lcm": "LCM",
    "tcd": "TCD",
}
"""Solvers under the names that Automatic1111 gives them."""
SCHEDULE_TYPES = {
    "leading": "Leading",
    "trailing": "Trailing",
    "linspace": "Uniform",
    "karras": "Karras",
    "exponential": "Exponential",
    "align_your_steps": "Align Your Steps",
    "align_your_steps_sdxl": "Align Your Steps",
    "distilled": "Automatic",
}

_NEGATIVE = "Negative prompt: "
_EXACT_PROMPT = "Exact prompt"
_EXACT_NEGATIVE = "Exact negative prompt"
_SETTING = re.compile(r'\s*([\w][\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
# What Pillow raises over files that are cut short, forged or too large.
_BROKEN_FILE = (OSError, ValueError, SyntaxError, EOFError, PilImage.DecompressionBombError)
_EXIF_UNICODE = b"UNICODE\x00"
MAX_EXIF_BYTES = 65_000
"""JPEG's bound on one EXIF block, less its own fields."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """What drew a picture.

    Attributes:
        settings: by Automatic1111's names, in the order in which they are written.
    """

    prompt: str
    negative_prompt: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)


def parameters_of(picture: Picture, prompt: str, negative_prompt: str = "") -> Parameters:
    """Parameters of a finished picture; approximations are named, since they change it."""
    settings = {
        "Steps": str(picture.steps),
        "Sampler": SAMPLERS.get(picture.solver, picture.solver),
        "Schedule type": SCHEDULE_TYPES.get(picture.schedule, picture.schedule),
        "CFG scale": f"{picture.guidance:g}",
        "Seed": str(picture.seed),
        "Size": f"{picture.width_px}x{picture.height_px}",
        "Model hash": picture.plan_digest[:10],
        "Model": picture.model,
    }
    if picture.clip_skip:
        settings["Clip skip"] = str(
            picture.clip_skip + 1
        )  # Automatic1111 counts from the last layer
    if picture.guidance_rescale:
        settings["Guidance rescale"] = f"{picture.guidance_rescale:g}"
    if picture.approximations:
        named = [f"{name}={dial}" for name, dial in sorted(picture.approximations.items())]
        settings["Approximations"] = "; ".join(named)
    settings["Version"] = VERSION
    return Parameters(prompt, negative_prompt, settings)


def format_parameters(parameters: Parameters) -> str:
    """The text; :func:`parse_parameters` gives the same parameters back."""
    text = _format(parameters.prompt, parameters.negative_prompt, parameters.settings)
    if parse_parameters(text) == parameters:
        return text
    exact = {
        **parameters.settings,
        _EXACT_PROMPT: parameters.prompt,
        _EXACT_NEGATIVE: parameters.negative_prompt,
    }
    return _format(parameters.prompt, parameters.negative_prompt, exact)


def _format(prompt: str, negative_prompt: str, settings: Mapping[str, str]) -> str:
    lines = [prompt]
    if negative_prompt:
        lines.append(_NEGATIVE + negative_prompt)
    lines.append(", ".join(f"{name}: {_quote(value)}" for name, value in settings.items()))
    return "\n".join(lines)


def _quote(value: str) -> str:
    """JSON where the format's own marks, or blanks that it trims, are in ``value``."""
    plain = value and value == value.strip() and not re.search(r'[,:\n\r"\\]', value)
    return value if plain else json.dumps(value, ensure_ascii=False)


def parse_parameters(text: str) -> Parameters:
    """Read the text of any tool that writes Automatic1111's format; never fails."""
    lines = text.split("\n")
    settings: dict[str, str] = {}
    # As there: the last line is settings only if it looks like it.
    found = _SETTING.findall(lines[-1])
    if len(found) >= 3:
        settings = {name.strip(): _unquote(value) for name, value in found}
        lines.pop()
    split = next((i for i, line in enumerate(lines) if line.startswith(_NEGATIVE.rstrip())), None)
    prompt = "\n".join(lines[:split])
    negative = ""
    if split is not None:
        negative = "\n".join(lines[split:])[len(_NEGATIVE.rstrip()) :].removeprefix(" ")
    return Parameters(
        settings.pop(_EXACT_PROMPT, prompt), settings.pop(_EXACT_NEGATIVE, negative), settings
    )


def _unquote(value: str) -> str:
    value = value.strip()
    if value.startswith('"') and value.endswith('"'):
        try:
            return str(json.loads(value, strict=False))
        except ValueError:
            return value
    return value


# --------------------------------------------------------------------------------------- files


def encode_image(
    image: Image,
    parameters: Parameters | None,
    *,
    format: PictureFormat = "png",
    quality: int = 95,
) -> bytes:
    """The bytes of a picture file.

    Args:
        parameters: to carry along; None for none.
        quality: of JPEG and WebP, 1 to 100.

    Raises:
        LimitExceededError: the prompts are too long for a JPEG's or WebP's metadata.
    """
    text = None if parameters is None else _storable(format_parameters(parameters))
    buffer = BytesIO()
    picture = PilImage.fromarray(image)
    if format == "png":
        info = PngImagePlugin.PngInfo()
        if text is not None:
            info.add_text("parameters", text)
        picture.save(buffer, "PNG", pnginfo=info)
    else:
        picture.save(buffer, format.upper(), quality=quality, exif=_exif(text))
    return buffer.getvalue()


def save_image(
    image: Image, path: Path, parameters: Parameters | None = None, *, quality: int = 95
) -> None:
    """Write a picture in the format that ``path`` ends in.

    Raises:
        InvalidRequestError: the ending is none of png, jpg, jpeg, webp.
    """
    format = format_of(path)
    path.write_bytes(encode_image(image, parameters, format=format, quality=quality))


def format_of(path: Path) -> PictureFormat:
    """The picture format that ``path`` ends in.

    Raises:
        InvalidRequestError: the ending is none of png, jpg, jpeg, webp.
    """
    formats: dict[str, PictureFormat] = {
        ".png": "png",
        ".jpg": "jpeg",
        ".jpeg": "jpeg",
        ".webp": "webp",
    }
    if path.suffix.lower() not in formats:
        raise InvalidRequestError(
            f"cannot write a {path.suffix or 'nameless'} picture; allowed: {', '.join(formats)}",
            field="output",
        )
    return formats[path.suffix.lower()]


def read_parameters(file: Path | BytesIO) -> Parameters | None:
    """Parameters in a picture file, or None where it has none.

    Raises:
        InvalidRequestError: it is no picture.
    """
    try:
        with PilImage.open(file) as picture:
            text = picture.info.get("parameters")
            comment = picture.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    except FileNotFoundError:
        raise
    except _BROKEN_FILE as error:
        raise InvalidRequestError("not a picture that can be read", field="image") from error
    if isinstance(text, str):
        return parse_parameters(text)
    if isinstance(comment, bytes) and comment.startswith(_EXIF_UNICODE):
        return parse_parameters(comment[len(_EXIF_UNICODE) :].decode("utf-16-be", "replace"))
    return None


def _exif(text: str | None) -> PilImage.Exif:
    exif = PilImage.Exif()
    if text is not None:
        comment = _EXIF_UNICODE + text.encode("utf-16-be")
        if len(comment) > MAX_EXIF_BYTES:
            raise LimitExceededError(
                f"the prompts take {len(comment)} bytes of metadata; JPEG and WebP hold at most "
                f"{MAX_EXIF_BYTES}; use PNG",
                field="prompt",
                limit=MAX_EXIF_BYTES,
            )
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    return exif


def _storable(text: str) -> str:
    """Without what no file can hold: halves of surrogate pairs."""
    return text.encode("utf-8", "replace").decode()
