"""Uploaded pictures: what is taken, what is refused before it is decoded, what is stripped."""

from __future__ import annotations

import base64
import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, PngImagePlugin
from PIL import Image as Pillow

from engine.errors import InvalidRequestError, LimitExceededError
from server.config import LimitsConfig
from server.errors import PayloadTooLargeError, UnprocessableError
from server.uploads import decode_picture, from_base64, off_loop

LIMITS = LimitsConfig(max_input_px=64 * 64)
CORNER = np.zeros((4, 6, 3), dtype=np.uint8)
CORNER[:2, :2] = 255


def written(picture: Pillow.Image, format_: str, **options: Any) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, format_, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("format_", ["PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "LA"])
def test_modes_come_out_as_three(format_: str, mode: str) -> None:
    picture = Pillow.fromarray(CORNER).convert(mode)
    if format_ == "WEBP" and mode in ("P", "1", "LA"):
        picture = picture.convert("RGB")
    decoded = decode_picture(written(picture, format_, lossless=True), LIMITS, field="image")
    assert decoded.mode in ("RGB", "RGBA", "L")
    assert np.array_equal(np.asarray(decoded.convert("RGB")), CORNER)


def test_jpeg_and_cmyk_jpeg() -> None:
    grey = np.full((8, 8, 3), 128, dtype=np.uint8)
    for mode in ("RGB", "L", "CMYK"):
        data = written(Pillow.fromarray(grey).convert(mode), "JPEG", quality=95)
        decoded = np.asarray(decode_picture(data, LIMITS, field="image").convert("RGB"))
        assert np.abs(decoded.astype(int) - 128).max() <= 3


def test_sixteen_bit_grey_keeps_its_range() -> None:
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    decoded = decode_picture(written(Pillow.fromarray(values), "PNG"), LIMITS, field="image")
    assert decoded.mode == "L"
    assert np.abs(np.asarray(decoded).astype(int) - values // 257).max() <= 1


def test_exif_turns_the_picture_upright_and_is_then_gone() -> None:
    exif = Pillow.Exif()
    exif[ExifTags.Base.Orientation] = 6  # turn by 90 degrees clockwise to see it upright
    exif[ExifTags.Base.Artist] = "somebody"
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a secret prompt")
    data = written(Pillow.fromarray(CORNER), "PNG", exif=exif, pnginfo=info, icc_profile=b"x")
    decoded = decode_picture(data, LIMITS, field="image")
    assert decoded.size == (4, 6)
    assert np.array_equal(np.asarray(decoded), np.rot90(CORNER, k=-1))
    assert decoded.info == {}
    assert not decoded.getexif()
    again = written(decoded, "PNG")
    assert b"somebody" not in again
    assert b"secret" not in again


def test_transparency_is_kept_for_masks() -> None:
    picture = Pillow.new("RGBA", (4, 4), (10, 20, 30, 0))
    decoded = decode_picture(written(picture, "PNG"), LIMITS, field="mask")
    assert decoded.mode == "RGBA"
    assert decoded.getpixel((0, 0)) == (10, 20, 30, 0)


@pytest.mark.parametrize("format_", ["GIF", "BMP", "TIFF", "PPM", "ICO", "PDF"])
def test_other_formats_are_refused(format_: str) -> None:
    with pytest.raises(UnprocessableError, match="PNG, JPEG or WebP") as caught:
        decode_picture(written(Pillow.fromarray(CORNER), format_), LIMITS, field="mask")
    assert caught.value.field == "mask"


@pytest.mark.parametrize("data", [b"", b"<svg/>", b"RIFF", b"%!PS-Adobe", b"\x00" * 100])
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises(UnprocessableError):
        decode_picture(data, LIMITS, field="image")


@pytest.mark.parametrize("format_", ["PNG", "WEBP"])
def test_animations_are_refused(format_: str) -> None:
    frames = [Pillow.new("RGB", (8, 8), colour) for colour in ("red", "green")]
    data = written(frames[0], format_, save_all=True, append_images=frames[1:])
    with pytest.raises(UnprocessableError, match="animated"):
        decode_picture(data, LIMITS, field="image")


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_truncated_files_are_refused(format_: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    data = written(Pillow.fromarray(noise), format_)
    with pytest.raises(InvalidRequestError, match="broken"):
        decode_picture(data[: int(len(data) * share)], LIMITS, field="image")


@pytest.mark.parametrize("size", [(65, 64), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused_before_it_is_decoded(size: tuple[int, int]) -> None:
    with pytest.raises(LimitExceededError, match="4096 pixels") as caught:
        decode_picture(png_header(*size), LIMITS, field="image")
    assert caught.value.limit == 64 * 64


@pytest.mark.parametrize("lossless", [False, True])
def test_a_large_webp_is_refused_before_its_canvas_is_allocated(lossless: bool) -> None:
    data = written(Pillow.new("RGB", (3000, 3000)), "WEBP", lossless=lossless)
    extended = (
        b"RIFF\xff\xff\x00\x00WEBPVP8X\x0a\x00\x00\x00\x02\x00\x00\x00"
        + (16382).to_bytes(3, "little") * 2
        + b"ANIM" + bytes(64)
    )  # fmt: skip
    for bomb in (data, extended):  # the second would not even open
        with pytest.raises(LimitExceededError):
            decode_picture(bomb, LIMITS, field="image")


def test_a_real_bomb_of_few_bytes_costs_no_memory() -> None:
    """Ninety million pixels in under 100 kB, within the bound of the file's size."""
    data = written(Pillow.new("1", (9500, 9500)), "PNG", optimize=True)
    assert len(data) < 100_000
    with pytest.raises(LimitExceededError):
        decode_picture(data, LimitsConfig(), field="image")


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    data = written(Pillow.new("RGB", (8, 8)), "JPEG", progressive=True)
    scans = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(LimitExceededError, match="scans"):
        decode_picture(data[:-2] + scans * 100 + data[-2:], LIMITS, field="image")


def test_base64_plain_and_as_a_data_url() -> None:
    text = base64.b64encode(b"picture").decode()
    assert from_base64(text, field="image", max_bytes=7) == b"picture"
    assert from_base64(f"data:image/png;base64,{text}", field="image", max_bytes=7) == b"picture"


def test_base64_over_the_bound_or_of_another_kind_is_refused() -> None:
    with pytest.raises(PayloadTooLargeError, match="100 bytes"):
        from_base64("A" * 1000, field="image", max_bytes=100)
    for text in ("http://169.254.169.254/latest", "file:///etc/passwd", "a*b=", "data:text/html,x"):
        with pytest.raises(InvalidRequestError, match="image is not base64"):
            from_base64(text, field="image", max_bytes=100)


@pytest.mark.anyio
async def test_decoding_runs_in_a_thread() -> None:
    import threading

    assert (await off_loop(lambda: threading.current_thread().name)).startswith("darkroom-pictures")
