"""Batch mates on a real fp32 plan; ``test_int8.py`` holds the same against a real int8 one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from engine.compile.plan import Plan
from engine.model import Model
from engine.runtime.base import Runtime
from tests.mates import worst_difference


@pytest.fixture(scope="module")
def model(tiny_plan: Callable[[str], Plan], cpu_runtime: Runtime) -> Iterator[Model]:
    model = Model.open(tiny_plan("text"), cpu_runtime)
    yield model
    model.close()


@pytest.mark.parametrize("seed", range(2))
def test_a_trajectory_is_the_same_alone_and_in_a_random_mixed_batch(
    model: Model, seed: int
) -> None:
    assert worst_difference(model, seed) <= 1e-5
