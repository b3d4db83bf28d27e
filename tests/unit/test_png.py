"""Pictures carry their parameters, and every prompt comes back as it was written."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PilImage

from engine.errors import InvalidRequestError, LimitExceededError
from engine.png import (
    Parameters,
    PictureFormat,
    encode_image,
    format_parameters,
    parameters_of,
    parse_parameters,
    read_parameters,
    save_image,
)
from engine.types import Image, Picture

IMAGE: Image = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)
SETTINGS = {"Steps": "20", "Sampler": "Euler a", "Seed": "1", "Model": "a, b: c"}


def picture() -> Picture:
    return Picture(
        image=IMAGE,
        latent=torch.zeros(4, 2, 2),
        seed=1,
        solver="dpmpp_2m",
        schedule="karras",
        steps=20,
        evaluations=20,
        guidance=7.0,
        width_px=512,
        height_px=768,
        model="tintype",
        plan_digest="0123456789abcdef",
        approximations={"int8": "on", "cache": "0.8"},
    )


def test_text_is_what_viewers_expect() -> None:
    assert format_parameters(parameters_of(picture(), "a red umbrella", "blurry")) == (
        "a red umbrella\n"
        "Negative prompt: blurry\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, "
        "Size: 512x768, Model hash: 0123456789, Model: tintype, "
        "Approximations: cache=0.8; int8=on, Version: darkroom 0.1.0"
    )


def test_what_else_a_picture_was_drawn_with_is_there() -> None:
    drawn = replace(picture(), clip_skip=1, guidance_rescale=0.7)
    text = format_parameters(parameters_of(drawn, "a red umbrella"))
    assert "Model: tintype, Clip skip: 2, Guidance rescale: 0.7, " in text


def test_text_of_other_tools_is_read() -> None:
    text = (
        "masterpiece, (cat:1.2)\nsecond line\n"
        "Negative prompt: bad, ugly\nworse\n"
        'Steps: 28, Sampler: DPM++ 2M, CFG scale: 7, Lora hashes: "a: 1, b: 2", Version: v1.10.1'
    )
    assert parse_parameters(text) == Parameters(
        "masterpiece, (cat:1.2)\nsecond line",
        "bad, ugly\nworse",
        {
            "Steps": "28",
            "Sampler": "DPM++ 2M",
            "CFG scale": "7",
            "Lora hashes": "a: 1, b: 2",
            "Version": "v1.10.1",
        },
    )
    assert parse_parameters("only a prompt") == Parameters("only a prompt")
    assert parse_parameters("") == Parameters("")


TEXTS = st.one_of(
    st.text(max_size=40),
    st.text(alphabet='ab ,:"\\\n\r=<>é日🎨', max_size=40),
    st.sampled_from(
        [
            "Negative prompt: inside",
            "a\nNegative prompt: b\nc",
            "Steps: 1, Sampler: x, Seed: 2",
            "a\nSteps: 1, Sampler: x, Seed: 2, Size: 3x3",
            ' "quoted" ',
            "\n",
            "Exact prompt: x",
        ]
    ),
)


@settings(deadline=None)
@given(TEXTS, TEXTS, TEXTS)
def test_every_text_comes_back(prompt: str, negative: str, value: str) -> None:
    parameters = Parameters(prompt, negative, {**SETTINGS, "Model": value})
    assert parse_parameters(format_parameters(parameters)) == parameters


@settings(deadline=None)
@given(st.text(max_size=200))
def test_parsing_never_fails(text: str) -> None:
    parse_parameters(text)


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize(
    "prompt", ["a cat", 'q"uo:te, \\ ', "é", "日本 🎨\nsecond", "Negative prompt: x", "a\x00b"]
)
def test_files_carry_parameters(format: PictureFormat, prompt: str) -> None:
    parameters = Parameters(prompt, "blurry", SETTINGS)
    data = encode_image(IMAGE, parameters, format=format)
    assert read_parameters(BytesIO(data)) == parameters
    with PilImage.open(BytesIO(data)) as stored:
        assert stored.size == (6, 8)
        if format == "png":
            np.testing.assert_array_equal(np.asarray(stored), IMAGE)


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_files_without_parameters_have_none(format: PictureFormat) -> None:
    assert read_parameters(BytesIO(encode_image(IMAGE, None, format=format))) is None


def test_the_longest_prompts_fit_and_beyond_is_an_error() -> None:
    longest = Parameters("🎨" * 4000, "é" * 4000, SETTINGS)
    assert read_parameters(BytesIO(encode_image(IMAGE, longest, format="jpeg"))) == longest
    with pytest.raises(LimitExceededError, match="use PNG"):
        encode_image(IMAGE, Parameters("x" * 40_000), format="jpeg")


def test_half_characters_are_replaced_and_not_fatal() -> None:
    read = read_parameters(BytesIO(encode_image(IMAGE, Parameters("a\ud800b", "", SETTINGS))))
    assert read is not None
    assert read.prompt == "a?b"


@pytest.mark.parametrize("name", ["out.png", "out.JPG", "out.webp"])
def test_the_ending_says_the_format(name: str, tmp_path: Path) -> None:
    save_image(IMAGE, tmp_path / name, Parameters("a cat", "", SETTINGS))
    read = read_parameters(tmp_path / name)
    assert read is not None
    assert read.prompt == "a cat"


def test_unknown_endings_and_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"\.bmp.*allowed: \.png"):
        save_image(IMAGE, tmp_path / "out.bmp")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(InvalidRequestError, match="not a picture"):
        read_parameters(tmp_path / "text.png")


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it repairs
@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_broken_files_never_raise_anything_else(format: PictureFormat) -> None:
    data = encode_image(IMAGE, Parameters("a cat", "", SETTINGS), format=format)
    random = np.random.default_rng(0)
    for _ in range(200):
        broken = np.frombuffer(data, dtype=np.uint8).copy()
        broken[random.integers(0, len(broken), 4)] = random.integers(0, 256, 4)
        keep = random.integers(1, len(broken) + 1) if random.random() < 0.3 else len(broken)
        with contextlib.suppress(InvalidRequestError):
            read_parameters(BytesIO(broken[:keep].tobytes()))
