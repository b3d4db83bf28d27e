"""Off means exact: latents equal those of Diffusers' own pipelines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from loadtests.exactness_pipelines import BOUND, Pair, sample_cases
from tests.conftest import DEFAULT_MODEL

# Diffusers' and Transformers' own, from code that we call and cannot change.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers"),
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers"),
]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_tiny_pipelines(family: str, tiny_checkpoint: Callable[[str], Path], plans: Path) -> None:
    _compare(family, tiny_checkpoint(family), plans, count=10)


@pytest.mark.full
@pytest.mark.parametrize("family", ["sd21-v", "lcm", "inpaint9", "text"])
def test_more_tiny_pipelines(
    family: str, tiny_checkpoint: Callable[[str], Path], plans: Path
) -> None:
    _compare(family, tiny_checkpoint(family), plans, count=10)


@pytest.mark.full
def test_the_default_model(plans: Path) -> None:
    _compare("default", DEFAULT_MODEL, plans, count=10)


def _compare(family: str, folder: Path, plans: Path, *, count: int) -> None:
    pair = Pair(folder, plans)
    try:
        errors = {
            str(case): pair.relative_error(case) for case in sample_cases([family], count, seed=0)
        }
    finally:
        pair.close()
    assert len(errors) == count
    assert {case: error for case, error in errors.items() if not error <= BOUND} == {}
