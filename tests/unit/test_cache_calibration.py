"""Calibration against a world in which the right answer is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from cache.calibration import BINS, Draw, Pair, Quality, calibrate, choose_pairs, table_of
from cache.distances import FloatArray, frechet, pairwise_distance
from engine.errors import InvalidRequestError
from tests.noise import prompt

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)


class World:
    """A jump costs nothing up to what the pair's similarity bears, and a third beyond it.

    Prompts are "<similarity> <number>". Fewer steps cost 5 % for each tenth.
    """

    def __init__(self, bears: dict[float, float], alike_from: float = 1.0) -> None:
        self.bears = bears
        self.alike_from = alike_from
        self.drawn: list[Draw] = []

    def generate(self, draws: Sequence[Draw]) -> list[Draw]:
        self.drawn += draws
        return list(draws)

    def score(self, pictures: Sequence[Draw], prompts: Sequence[str]) -> FloatArray:
        assert [picture.prompt for picture in pictures] == list(prompts)
        return np.asarray([self._score(picture) for picture in pictures])

    def features(self, pictures: Sequence[Draw]) -> FloatArray:
        return np.stack(
            [
                np.random.default_rng(
                    0 if p.source is not None and p.share >= self.alike_from else p.seed
                ).standard_normal(8)
                for p in pictures
            ]
        )

    def _score(self, picture: Draw) -> float:
        if picture.source is None:
            return 1.0 - 0.5 * picture.share
        bears = self.bears[float(picture.prompt.split()[0])]
        return 1.0 if picture.share <= bears + 1e-9 else 0.67


def pairs(*similarities: float) -> list[Pair]:
    return [Pair(f"{s} {i}", f"source {i}", s) for s in similarities for i in range(4)]


def test_the_table_holds_the_largest_jump_that_keeps_quality() -> None:
    world = World({0.7: 0.0, 0.8: 0.2, 0.92: 0.4, 1.0: 0.5})
    found = calibrate(
        pairs(0.7, 0.8, 0.92, 1.0), world.generate, world.score, world.features, shares=SHARES
    )
    assert found.jumps.steps == ((0.75, 0.2), (0.9, 0.4), (0.999, 0.5))
    rows = {(row.low, row.share): row for row in found.quality}
    assert rows[0.75, 0.2].ratio == 1.0
    assert rows[0.75, 0.3].ratio == pytest.approx(0.67)
    assert rows[0.75, 0.2].ratio_fewer == pytest.approx(0.9)
    assert rows[0.75, 0.2].pairs == 4


def test_a_closer_bin_that_bears_less_holds_the_others_back() -> None:
    """A bin that scores better by chance must not jump further than a closer one."""
    world = World({0.8: 0.5, 0.92: 0.2, 1.0: 0.3})
    found = calibrate(
        pairs(0.8, 0.92, 1.0), world.generate, world.score, world.features, shares=SHARES
    )
    assert found.jumps.steps == ((0.75, 0.2), (0.9, 0.2), (0.999, 0.3))


def test_a_jump_after_which_seeds_look_alike_is_not_in_the_table() -> None:
    world = World({1.0: 0.5}, alike_from=0.4)
    found = calibrate(pairs(1.0), world.generate, world.score, world.features, shares=SHARES)
    assert found.jumps.steps == ((0.999, 0.3),)
    assert [d.ratio > 0.9 for d in found.diversity] == [True, True, True, False, False]


@pytest.mark.parametrize("exclusive", [True, False])
def test_exclusive_states_give_every_seed_its_own_source(exclusive: bool) -> None:
    world = World({1.0: 0.5})
    calibrate(
        pairs(1.0),
        world.generate,
        world.score,
        world.features,
        shares=(0.1,),
        seeds=5,
        exclusive=exclusive,
    )
    sources = {d.source for d in world.drawn if d.source is not None and d.source[0] == "1.0 0"}
    assert len(sources) == (5 if exclusive else 1)


def test_quality_is_kept_or_there_is_no_jump() -> None:
    world = World({1.0: 0.0})
    found = calibrate(pairs(1.0), world.generate, world.score, world.features, shares=SHARES)
    assert found.jumps.steps == ()
    with pytest.raises(InvalidRequestError, match="pairs"):
        calibrate([], world.generate, world.score, world.features)


def test_pairs_are_chosen_from_every_bin() -> None:
    vectors = np.stack([prompt(1), *(prompt(9 + i, 1, c) for i, c in enumerate((0.7, 0.92, 0.97)))])
    chosen = choose_pairs([f"p{i}" for i in range(4)], vectors, per_bin=2, bins=BINS)
    by_low = {
        low: [p for p in chosen if p.similarity >= low][:1] for low in (0.65, 0.9, 0.95, 0.999)
    }
    assert all(by_low.values())
    repeats = [pair for pair in chosen if pair.prompt == pair.source]
    assert len(repeats) == 2
    assert all(pair.similarity == pytest.approx(1.0, abs=1e-6) for pair in repeats)


def test_frechet_distance_of_gaussians_is_the_known_one() -> None:
    random = np.random.default_rng(0)
    first = random.standard_normal((200_000, 3))
    scaled = random.standard_normal((200_000, 3)) * np.asarray([1.0, 2.0, 0.5]) + 1.0
    assert frechet(first, scaled) == pytest.approx(3.0 + 1.0 + 0.25, rel=0.03)
    assert frechet(first, first) == pytest.approx(0.0, abs=1e-9)
    square = np.asarray([[0.0, 0.0], [3.0, 4.0]])
    assert pairwise_distance(square) == 5.0


def test_a_jump_that_fewer_steps_beat_is_not_in_the_table() -> None:
    """Good enough by itself is not enough: the honest baseline costs nothing to run."""
    rows = [quality(share=0.1, kept=0.999), quality(share=0.2, kept=0.99)]
    assert table_of(rows, keep=0.98, most=0.5).steps == ((0.9, 0.2),)
    beaten = [*rows, quality(share=0.3, kept=0.985, fewer=1.0)]
    assert table_of(beaten, keep=0.98, most=0.5).steps == ((0.9, 0.2),)
    deeper = [*beaten, quality(share=0.4, kept=0.985, fewer=0.97)]
    assert table_of(deeper, keep=0.98, most=0.5).steps == ((0.9, 0.4),)
    within_the_error = [*rows, quality(share=0.3, kept=0.985, fewer=1.0, error=0.02)]
    assert table_of(within_the_error, keep=0.98, most=0.5).steps == ((0.9, 0.3),)


def quality(*, share: float, kept: float, fewer: float = 0.99, error: float = 0.001) -> Quality:
    return Quality(
        low=0.9,
        share=share,
        pairs=8,
        score=kept,
        score_full=1.0,
        score_fewer=fewer,
        error=error,
        frechet=0.0,
        frechet_fewer=0.0,
        agreement=1.0,
        agreement_fewer=1.0,
    )
