"""What a run of an engine needs, worked out from names and shapes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.compile.manifest import TensorSpec
from engine.compile.tensorrt_profile import EngineTarget, Profile, Range, ShapeRange
from engine.errors import (
    BackendUnavailableError,
    ExecutionError,
    LimitExceededError,
    PlanCorruptError,
)
from engine.runtime.tensorrt_calls import (
    ALIGNMENT,
    Call,
    EngineTensor,
    bounds_of,
    check_engine,
    check_target,
    lay_out,
    plan_call,
)


def spec(name: str, *shape: int | str, optional: bool = False) -> TensorSpec:
    return TensorSpec(name=name, source=name, dtype="float32", shape=shape, optional=optional)


INPUTS = (
    spec("hidden", "batch", 4, "height//2", "width//2"),
    spec("context", "batch", "tokens", 8),
    spec("tap.hidden", "batch", 4, "height//2", "width//2", optional=True),
    spec("down", "batch", "rank", 4, optional=True),
    spec("up", "batch", 4, "rank", optional=True),
)
OUTPUTS = (spec("out", "batch", 6, "height", "width"),)
TENSORS = [
    EngineTensor(
        name="hidden",
        dtype="float32",
        shape=(-1, 4, -1, -1),
        is_input=True,
        range=ShapeRange((1, 4, 2, 3), (2, 4, 4, 4), (8, 4, 8, 9)),
    ),
    EngineTensor(
        name="context",
        dtype="float32",
        shape=(-1, 7, 8),
        is_input=True,
        range=ShapeRange((2, 7, 8), (2, 7, 8), (16, 7, 8)),
    ),
    EngineTensor(name="tap.hidden", dtype="float32", shape=(-1, 4, -1, -1), is_input=True),
    EngineTensor(
        name="down",
        dtype="float32",
        shape=(-1, -1, 4),
        is_input=True,
        range=ShapeRange((1, 0, 4), (2, 4, 4), (8, 16, 4)),
    ),
    EngineTensor(name="up", dtype="float32", shape=(-1, 4, -1), is_input=True),
    EngineTensor(name="out", dtype="float32", shape=(-1, 6, -1, -1), is_input=False),
]
BOUNDS = bounds_of(INPUTS, TENSORS)
FED = {"hidden": (3, 4, 5, 6), "context": (3, 7, 8)}


def plan(**changes: tuple[int, ...]) -> Call:
    return plan_call("mid", INPUTS, OUTPUTS, BOUNDS, FED | changes)


def test_bounds_are_what_every_input_allows_in_the_dimensions_own_unit() -> None:
    assert BOUNDS == {
        "batch": (2, 8),
        "height": (4, 16),
        "width": (6, 18),
        "tokens": (7, 7),
        "rank": (0, 16),
    }


def test_a_call_is_complete_and_what_was_left_out_gets_zeros() -> None:
    call = plan()

    assert call.outputs == {"out": (3, 6, 10, 12)}
    assert call.inputs == {
        "hidden": (3, 4, 5, 6),
        "context": (3, 7, 8),
        "tap.hidden": (3, 4, 5, 6),
        "down": (3, 1, 4),
        "up": (3, 4, 1),
    }
    assert call.zeros == {"tap.hidden", "down", "up"}


def test_factors_that_are_left_out_have_the_rank_of_the_others() -> None:
    assert plan(down=(3, 5, 4)).inputs["up"] == (3, 4, 5)


def test_a_factor_of_rank_0_counts_as_left_out() -> None:
    call = plan(down=(3, 0, 4), up=(3, 4, 2))

    assert call.inputs["down"] == (3, 2, 4)
    assert "down" in call.zeros


@pytest.mark.parametrize(
    ("changes", "field", "limit", "message"),
    [
        (
            {"hidden": (9, 4, 5, 6), "context": (9, 7, 8)},
            "batch",
            8,
            r"mid: 9 rows are outside of .*: 2 to 8",
        ),
        ({"hidden": (1, 4, 5, 6), "context": (1, 7, 8)}, "batch", 2, "1 rows"),
        ({"hidden": (3, 4, 50, 6)}, "height", 16, "100 latent rows .*: 4 to 16"),
        ({"hidden": (3, 4, 5, 2)}, "width", 6, "4 latent columns"),
        ({"context": (3, 8, 8)}, "tokens", 7, "8 tokens .*: exactly 7"),
        ({"down": (3, 17, 4)}, "rank", 16, "17 rank .*: 0 to 16"),
    ],
)
def test_a_size_that_the_engine_was_not_built_for_is_named_with_what_is_allowed(
    changes: dict[str, Any], field: str, limit: int, message: str
) -> None:
    with pytest.raises(LimitExceededError, match=message) as raised:
        plan(**changes)
    assert (raised.value.field, raised.value.limit) == (field, limit)


@pytest.mark.parametrize(
    "changes",
    [
        {"context": (4, 7, 8)},  # another batch
        {"hidden": (3, 5, 5, 6)},  # a literal size
        {"hidden": (3, 4, 5)},  # a dimension too few
        {"tap.hidden": (3, 4, 6, 6)},  # another height
        {"down": (3, 2, 4), "up": (3, 4, 3)},  # two ranks
        {"hidden": (0, 4, 5, 6)},  # nothing
    ],
)
def test_shapes_that_contradict_the_plan_or_each_other_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ExecutionError, match=r"^mid: input"):
        plan(**changes)


def test_an_input_that_is_no_multiple_of_its_latent_is_refused() -> None:
    with pytest.raises(ExecutionError, match="does not go with height"):
        plan_call("vae.encoder", [spec("picture", "height*8")], (), {}, {"picture": (12,)})


# ------------------------------------------------------------------------------ the engine


def changed(tensor: str, **fields: Any) -> list[EngineTensor]:
    return [dataclasses.replace(t, **fields) if t.name == tensor else t for t in TENSORS]


def test_an_engine_with_the_manifests_bindings_passes() -> None:
    check_engine("mid", INPUTS, OUTPUTS, TENSORS)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([t for t in TENSORS if t.name != "up"], "no input 'up'"),
        ([t for t in TENSORS if t.name != "out"], "no output 'out'"),
        (changed("out", is_input=True), "no output 'out'"),
        (changed("up", name="sideways"), "unknown binding 'sideways'"),
        (changed("hidden", dtype="float16"), "'hidden' of its engine is float16"),
        (changed("hidden", dtype=None), "'hidden' of its engine is None"),
        (changed("hidden", shape=(-1, 5, -1, -1)), r"'hidden' of its engine is float32 \(-1, 5"),
        (changed("hidden", shape=(-1, 4, -1)), "'hidden' of its engine"),
        (changed("context", on_device=False), "'context' on the host"),
    ],
)
def test_an_engine_with_other_bindings_is_corrupt(
    tensors: list[EngineTensor], message: str
) -> None:
    with pytest.raises(PlanCorruptError, match=message):
        check_engine("mid", INPUTS, OUTPUTS, tensors)


def target(capability: str = "8.9") -> EngineTarget:
    one = Range.of(1, 1, 1)
    profile = Profile(batch=one, height=one, width=one, tokens=one, rank=one)
    return EngineTarget(
        flavour="tensorrt_rtx",
        version="1.7",
        capability=capability,
        unet=profile,
        text=profile,
        vae=profile,
    )


def test_engines_run_on_the_gpus_and_with_the_release_that_they_were_built_for() -> None:
    check_target(target(), "1.7", "8.9")

    with pytest.raises(BackendUnavailableError, match=r"1\.7 and no other .* 1\.8 is installed"):
        check_target(target(), "1.8", "8.9")
    with pytest.raises(BackendUnavailableError, match=r"8\.9 \(RTX 40.*has 8\.6: build the plan"):
        check_target(target(), "1.7", "8.6")
    with pytest.raises(BackendUnavailableError, match=r"has 9\.0: tensorrt_rtx covers 7\.5"):
        check_target(target(), "1.7", "9.0")


@given(st.dictionaries(st.integers(), st.integers(0, 10_000)))
def test_blocks_in_one_buffer_are_aligned_and_apart(sizes: dict[int, int]) -> None:
    offsets, total = lay_out(sizes)

    end = 0
    for key, offset in offsets.items():
        assert offset % ALIGNMENT == 0
        assert offset >= end
        end = offset + sizes[key]
    assert total >= end
    assert offsets.keys() == sizes.keys()
