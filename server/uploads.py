"""Pictures that users send: held against every bound before they are decoded, then stripped.

What comes out is pixels and nothing else: no EXIF, no colour profile (colours are taken as sRGB),
no text, no second frame. Nothing is ever fetched: a picture comes as bytes or not at all.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import TypeVar

from PIL import Image as Pillow
from PIL import ImageOps

from engine.errors import InvalidRequestError, LimitExceededError
from server.config import LimitsConfig
from server.errors import PayloadTooLargeError, UnprocessableError

FORMATS = ("PNG", "JPEG", "WEBP")
_MAGIC = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF....WEBP", re.DOTALL)
_DATA_URL = re.compile(r"data:image/[a-z+.-]{1,20};base64,")
_MAX_JPEG_SCANS = 64
"""A progressive file has about ten. Each costs a pass over all pixels, however few bytes it has."""
_DECODERS = ThreadPoolExecutor(max_workers=2, thread_name_prefix="darkroom-pictures")
"""Few: a decoded picture at the bound takes 64 MB, and several copies while it is fitted."""

_T = TypeVar("_T")


async def off_loop(work: Callable[[], _T]) -> _T:
    """Run ``work`` on pictures in a thread; only a few run at once, which bounds their memory."""
    return await asyncio.get_running_loop().run_in_executor(_DECODERS, work)


def decode_picture(data: bytes, limits: LimitsConfig, *, field: str) -> Pillow.Image:
    """Decode an uploaded file, upright as its EXIF orientation says. Blocks: call it in a thread.

    Args:
        limits: ``max_input_px`` is the bound on its pixels, checked before any is decoded.
        field: the parameter that errors name.

    Returns:
        A picture of mode RGB, RGBA or L, without metadata.

    Raises:
        UnprocessableError: not PNG, JPEG or WebP, or animated.
        LimitExceededError: more pixels, or more passes over them, than allowed.
        InvalidRequestError: broken or truncated.
    """
    if not _MAGIC.match(data):
        raise UnprocessableError(f"{field} is no picture in PNG, JPEG or WebP", field=field)
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > _MAX_JPEG_SCANS:
        raise LimitExceededError(
            f"{field} is a JPEG of more than {_MAX_JPEG_SCANS} scans",
            field=field,
            limit=_MAX_JPEG_SCANS,
        )
    _check_webp_canvas(data, limits, field)
    try:
        with Pillow.open(BytesIO(data), formats=FORMATS) as opened:
            _check_size(opened.size, limits, field)
            if opened.format != "MPO" and getattr(opened, "is_animated", False):
                raise UnprocessableError(
                    f"{field} is animated; one frame is drawn from", field=field
                )
            return _plain(ImageOps.exif_transpose(opened))
    except (InvalidRequestError, UnprocessableError):
        raise
    except (Pillow.DecompressionBombError, Pillow.DecompressionBombWarning):
        raise _too_many(limits, field) from None
    except Exception as error:
        # Whatever Pillow's parsers stumble over in a stranger's bytes (OSError, ValueError,
        # SyntaxError, struct.error, …) means the same to its sender.
        raise InvalidRequestError(
            f"{field} cannot be decoded: it is broken", field=field
        ) from error


def from_base64(text: str, *, field: str, max_bytes: int) -> bytes:
    """The bytes of a picture in a JSON body: plain base64, or a ``data:image/…;base64,`` URL.

    Raises:
        PayloadTooLargeError: more than ``max_bytes``; found before anything is decoded.
        InvalidRequestError: not base64. Addresses of other kinds are never fetched.
    """
    prefix = _DATA_URL.match(text)
    encoded = text[prefix.end() :] if prefix else text
    if len(encoded) * 3 // 4 > max_bytes + 2:
        raise PayloadTooLargeError(
            f"{field} is larger than {max_bytes} bytes, the bound of uploads", field=field
        )
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequestError(f"{field} is not base64", field=field) from None


def _check_webp_canvas(data: bytes, limits: LimitsConfig, field: str) -> None:
    """WebP's decoder allocates its canvas as soon as the file is opened: look before that."""
    if data[12:16] == b"VP8X" and data.startswith(b"RIFF") and len(data) >= 30:
        width_px = int.from_bytes(data[24:27], "little") + 1
        height_px = int.from_bytes(data[27:30], "little") + 1
        _check_size((width_px, height_px), limits, field)
    elif data[12:16] == b"VP8L" and len(data) >= 25:
        bits = int.from_bytes(data[21:25], "little")
        _check_size(((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1), limits, field)
    elif data[12:16] == b"VP8 " and len(data) >= 30:
        width_px = int.from_bytes(data[26:28], "little") & 0x3FFF
        height_px = int.from_bytes(data[28:30], "little") & 0x3FFF
        _check_size((width_px, height_px), limits, field)


def _check_size(size: tuple[int, int], limits: LimitsConfig, field: str) -> None:
    if size[0] * size[1] > limits.max_input_px:
        raise _too_many(limits, field)


def _too_many(limits: LimitsConfig, field: str) -> LimitExceededError:
    return LimitExceededError(
        f"{field} has more than {limits.max_input_px} pixels, which is the bound",
        field=field,
        limit=limits.max_input_px,
    )


def _plain(picture: Pillow.Image) -> Pillow.Image:
    """The pixels alone, eight bits a channel."""
    if picture.mode.startswith("I") or picture.mode == "F":
        # Sixteen-bit grey: Pillow's own conversion would clip everything above 255 to white.
        picture = picture.convert("I").point(lambda value: value / 257).convert("L")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
    elif picture.mode not in ("RGB", "L"):
        picture = picture.convert("L" if picture.mode == "1" else "RGB")
    picture.load()
    picture.info = {}
    picture.getexif().clear()
    return picture
