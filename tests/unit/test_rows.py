"""Batches within the graphs' bounds, padded to the sizes that they like, cut when memory ends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import InvalidRequestError, OutOfMemoryError
from engine.rows import RowLimits, Rows, run_rows
from tests.unit.fakes import SHAPE, ClosedFormWalk


def make_rows(count: int) -> Rows:
    generator = torch.Generator().manual_seed(count)
    return Rows(
        sample=torch.randn((count, *SHAPE), generator=generator),
        timesteps=torch.arange(count, dtype=torch.float32) * 10,
        context=torch.randn((count, 3, 2), generator=generator),
        added={"time_ids": torch.randn((count, 6), generator=generator)},
        guided=torch.tensor([], dtype=torch.long),
    )


@given(
    count=st.integers(1, 20),
    most=st.none() | st.integers(1, 20),
    limit=st.none() | st.integers(1, 20),
    sizes=st.sets(st.integers(1, 24)).map(lambda sizes: tuple(sorted(sizes))),
    memory=st.integers(1, 30),
)
def test_however_a_batch_is_run_every_row_comes_out_the_same(
    count: int, most: int | None, limit: int | None, sizes: tuple[int, ...], memory: int
) -> None:
    rows = make_rows(count)
    expected = ClosedFormWalk()(rows.sample, rows.timesteps, rows.context, rows.added)
    smallest = min((size for size in sizes if limit is None or size <= limit), default=1)
    walk = ClosedFormWalk(limits=RowLimits(limit, sizes))
    walk.memory_rows = max(memory, smallest)  # what a single row is padded to must fit
    out = run_rows(walk, rows, most=most)
    assert torch.allclose(out, expected, rtol=1e-5, atol=1e-6)
    for run in walk.batches:
        assert limit is None or run <= limit
        assert run in sizes or run <= min(count, most or count)


def test_a_batch_is_padded_to_the_next_size_and_no_further() -> None:
    limits = RowLimits(most=12, sizes=(2, 4, 8, 16))
    assert [limits.padded(rows) for rows in (1, 2, 3, 5, 8, 9, 12)] == [2, 2, 4, 8, 8, 9, 12]
    assert RowLimits().padded(7) == 7


def test_a_batch_above_the_bound_is_run_in_parts() -> None:
    walk = ClosedFormWalk(limits=RowLimits(most=4))
    assert run_rows(walk, make_rows(10)).shape == (10, *SHAPE)
    assert walk.batches == [4, 4, 2]


def test_a_batch_that_does_not_fit_is_halved_until_it_does_and_says_so() -> None:
    walk = ClosedFormWalk()
    walk.memory_rows = 3
    told: list[int] = []
    assert len(run_rows(walk, make_rows(8), on_out_of_memory=told.append)) == 8
    assert told == [8, 4]
    assert walk.batches == [8, 4, 2, 2, 2, 2]


def test_a_single_row_that_does_not_fit_fails() -> None:
    walk = ClosedFormWalk()
    walk.memory_rows = 0
    told: list[int] = []
    with pytest.raises(OutOfMemoryError):
        run_rows(walk, make_rows(2), on_out_of_memory=told.append)
    assert told == [2, 1]


@pytest.mark.parametrize("sizes", [(2, 1), (0, 1), (1, 1)])
def test_sizes_that_do_not_ascend_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequestError, match="ascend"):
        RowLimits(sizes=sizes)
