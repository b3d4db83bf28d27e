"""Which rows of a batch hold finite values."""

from __future__ import annotations

import math

import pytest
import torch

from engine.ticks import finite_rows


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_with_a_value_that_is_not_finite_are_told_from_the_others(bad: float) -> None:
    out = torch.randn(3, 4, 8, 8)
    assert finite_rows(out) == [True, True, True]
    out[1, 2, 3, 4] = bad
    assert finite_rows(out) == [True, False, True]


def test_finite_values_are_finite_also_where_their_sum_is_not() -> None:
    out = torch.full((2, 4, 8, 8), 3e38)
    out[1, 0, 0, 0] = math.nan
    assert finite_rows(out) == [True, False]
