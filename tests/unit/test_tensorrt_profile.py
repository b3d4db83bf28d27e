"""Which shapes engines are built for, and for which GPUs: all of it without TensorRT."""

from __future__ import annotations

from importlib.machinery import ModuleSpec

import pytest
from pydantic import ValidationError

from engine.compile import tensorrt_flavours as flavours
from engine.compile.manifest import TensorSpec
from engine.compile.tensorrt_flavours import FLAVOURS, choose_library, load_library
from engine.compile.tensorrt_profile import Profile, Range, ShapeRange, part_of, shape_profile
from engine.errors import BackendUnavailableError, PlanError, UnsupportedError

PROFILE = Profile(
    batch=Range.of(1, 8, 16),
    height=Range.of(8, 64, 128),
    width=Range.of(8, 32, 96),
    tokens=Range.of(77, 77, 154),
    rank=Range.of(0, 16, 64),
)


def spec(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, source=name, dtype="float32", shape=shape)


def test_every_input_gets_its_smallest_best_and_largest_shape() -> None:
    shapes = shape_profile(
        [
            spec("hidden", "batch", 16, "height//4", "width//4"),
            spec("picture", "batch", 3, "height*8", "width*8"),
            spec("context", "batch", "tokens", 768),
            spec("down", "batch", "rank", 320),
            spec("frequencies", 160),
        ],
        PROFILE,
    )

    assert shapes == {
        "hidden": ShapeRange((1, 16, 2, 2), (8, 16, 16, 8), (16, 16, 32, 24)),
        "picture": ShapeRange((1, 3, 64, 64), (8, 3, 512, 256), (16, 3, 1024, 768)),
        "context": ShapeRange((1, 77, 768), (8, 77, 768), (16, 154, 768)),
        "down": ShapeRange((1, 0, 320), (8, 16, 320), (16, 64, 320)),
        "frequencies": ShapeRange((160,), (160,), (160,)),
    }


def test_a_size_that_a_segment_cannot_halve_is_refused() -> None:
    odd = PROFILE.model_copy(update={"height": Range.of(6, 64, 128)})

    with pytest.raises(PlanError, match=r"hidden has height//4: height must be a multiple of 4"):
        shape_profile([spec("hidden", "batch", 16, "height//4", "width//4")], odd)


@pytest.mark.parametrize("ends", [(2, 1, 4), (1, 5, 4), (-1, 0, 1), (0, 0, 0)])
def test_a_range_is_in_order_and_not_empty(ends: tuple[int, int, int]) -> None:
    with pytest.raises(ValidationError):
        Range.of(*ends)


@pytest.mark.parametrize(
    ("segment", "part"),
    [("down.0", "unet"), ("mid", "unet"), ("text.1", "text"), ("vae.decoder", "vae")],
)
def test_a_segment_belongs_to_a_network(segment: str, part: str) -> None:
    assert part_of(segment) == part


# ------------------------------------------------------------------------------ flavours


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the modules that seem to be installed: none, until a test adds some."""
    names: set[str] = set()
    monkeypatch.setattr(
        flavours, "find_spec", lambda name: ModuleSpec(name, None) if name in names else None
    )
    monkeypatch.setattr(flavours, "gpu_capability", lambda: None)
    load_library.cache_clear()
    return names


def test_without_a_library_the_error_says_what_to_install(installed: set[str]) -> None:
    with pytest.raises(BackendUnavailableError, match=r"tensorrt_rtx \(pip install 'darkroom\["):
        choose_library("8.9")


def test_a_library_that_cannot_be_loaded_is_unavailable(installed: set[str]) -> None:
    installed.add("tensorrt_rtx")  # which is not there, so that importing it fails

    with pytest.raises(BackendUnavailableError, match="installed but cannot be loaded"):
        choose_library("8.9")


def test_hopper_needs_tensorrt_itself_on_such_a_gpu(installed: set[str]) -> None:
    installed.add("tensorrt_rtx")

    with pytest.raises(BackendUnavailableError, match=r"builds on the GPU itself.*9\.0 \(H100"):
        choose_library("9.0")
    with pytest.raises(UnsupportedError, match=r"tensorrt_rtx covers 7\.5 \(RTX 20"):
        choose_library("9.0", "tensorrt_rtx")


def test_a_gpu_that_nothing_covers_is_refused_with_what_is(installed: set[str]) -> None:
    with pytest.raises(UnsupportedError, match=r"6\.1 is not covered.*RTX 40.*H100"):
        choose_library("6.1")


def test_an_unknown_flavour_is_refused_by_name(installed: set[str]) -> None:
    with pytest.raises(UnsupportedError, match="'onnx'; there are: tensorrt, tensorrt_rtx"):
        choose_library("8.9", "onnx")


def test_rtx_has_no_hopper() -> None:
    assert "9.0" in FLAVOURS["tensorrt"].gpus
    assert "9.0" not in FLAVOURS["tensorrt_rtx"].gpus
