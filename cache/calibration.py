"""How far a model's pictures may jump: quality against similarity and jump, measured.

Pure: pictures come from a callable and so do their scores, so that neither an engine nor an
evaluator is known here. Beside every jump stands the honest baseline: the same number of steps
saved by running fewer steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from cache.distances import FloatArray, agreement, frechet, pairwise_distance
from engine.errors import InvalidRequestError
from engine.ports import JumpTable

Picture: TypeAlias = Any
"""Whatever ``generate`` returns and ``score`` and ``features`` take."""

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Of the steps; NIRVANA's end at a half."""
BEYOND_ERROR = 1.0
"""Standard errors by which fewer steps must keep more to count as better: with few pairs a larger
number would let jumps pass whose harm one can see."""
BINS = (0.55, 0.65, 0.75, 0.85, 0.90, 0.95, 0.999)
"""Lower edges of the bins of similarity; the last one holds repeats of a prompt."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One picture to draw.

    Attributes:
        source: (prompt, seed) of the picture whose states it may start from; None for none.
        share: of the steps to skip from there; without a source, to leave out of the schedule.
    """

    prompt: str
    seed: int
    source: tuple[str, int] | None = None
    share: float = 0.0


Generate: TypeAlias = Callable[[Sequence[Draw]], Sequence[Picture]]
Score: TypeAlias = Callable[[Sequence[Picture], Sequence[str]], FloatArray]
"""How well each picture fits its prompt; more is better."""
Features: TypeAlias = Callable[[Sequence[Picture]], FloatArray]
"""(pictures, width) in which distances mean something."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt, and an earlier one of that cosine to it."""

    prompt: str
    source: str
    similarity: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """One bin of similarity at one jump.

    Attributes:
        low: lower edge of the bin.
        share: of the steps skipped.
        score, score_full, score_fewer: mean score with the cache, with all steps, and with as few
            steps and no cache.
        error: standard error of ``ratio``.
        frechet, frechet_fewer: Fréchet distance to the pictures with all steps, of the bin.
        agreement, agreement_fewer: mean cosine of features with the same seed's full picture.
    """

    low: float
    share: float
    pairs: int
    score: float
    score_full: float
    score_fewer: float
    error: float
    frechet: float
    frechet_fewer: float
    agreement: float
    agreement_fewer: float

    @property
    def ratio(self) -> float:
        """Quality kept by the cache."""
        return self.score / self.score_full

    @property
    def ratio_fewer(self) -> float:
        """Quality kept by running fewer steps."""
        return self.score_fewer / self.score_full

    @property
    def beaten(self) -> bool:
        """Whether as few steps without the cache keep more, beyond the error."""
        return self.ratio_fewer - self.ratio > BEYOND_ERROR * self.error


@dataclass(frozen=True, slots=True, kw_only=True)
class Diversity:
    """Pairwise feature distance among seeds of a prompt at one jump, as a ratio to no cache."""

    share: float
    ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was measured, and the table that follows from it."""

    quality: tuple[Quality, ...]
    diversity: tuple[Diversity, ...]
    jumps: JumpTable


def calibrate(
    pairs: Sequence[Pair],
    generate: Generate,
    score: Score,
    features: Features,
    *,
    shares: Sequence[float] = SHARES,
    bins: Sequence[float] = BINS,
    keep: float = 0.98,
    keep_diversity: float = 0.9,
    seeds: int = 8,
    diversity_prompts: int = 8,
    exclusive: bool = False,
) -> Calibration:
    """Measure quality and diversity, and the jumps that keep both.

    Args:
        pairs: prompts and sources over the similarities of interest (:func:`choose_pairs`).
        keep: least ratio of the mean score to that without the cache.
        keep_diversity: least ratio of the mean pairwise feature distance among ``seeds`` pictures
            of a prompt.
        exclusive: states serve a prompt once (``NOISY`` ones), so that every seed has its own
            source; else all start from the same.

    Raises:
        InvalidRequestError: there are no pairs, or the uncached pictures score nothing.
    """
    if not pairs:
        raise InvalidRequestError("calibration needs pairs of prompts")
    quality = _quality(pairs, generate, score, features, tuple(shares), tuple(bins))
    prompts = sorted({pair.prompt for pair in pairs})[:diversity_prompts]
    diversity = _diversity(prompts, generate, features, tuple(shares), seeds, exclusive=exclusive)
    diverse = max((d.share for d in diversity if d.ratio >= keep_diversity), default=0.0)
    return Calibration(
        quality=quality,
        diversity=diversity,
        jumps=table_of(quality, keep=keep, most=diverse),
    )


def table_of(quality: Sequence[Quality], *, keep: float, most: float) -> JumpTable:
    """The largest jumps that keep ``keep`` of the score in their bin and in every closer one.

    A jump that is beaten by running fewer steps is not worth having, whatever it keeps.

    Args:
        most: no jump beyond it.
    """
    steps: list[tuple[float, float]] = []
    allowed = most
    for low in sorted({row.low for row in quality}, reverse=True):
        rows = sorted((r for r in quality if r.low == low), key=lambda row: row.share)
        share = 0.0
        for row in rows:
            if row.ratio < keep:  # what lies beyond costs more still, whatever chance says
                break
            if not row.beaten:
                share = row.share
        allowed = min(allowed, share)
        if allowed <= 0:
            break
        steps.append((low, allowed))
    return JumpTable(tuple(reversed(steps)))


def choose_pairs(
    prompts: Sequence[str],
    embeddings: npt.NDArray[np.float32],
    *,
    per_bin: int,
    bins: Sequence[float] = BINS,
    seed: int = 0,
) -> list[Pair]:
    """Up to ``per_bin`` random pairs of each bin of similarity; repeats pair with themselves.

    Args:
        embeddings: (prompts, dimensions) unit vectors.
    """
    random = np.random.default_rng(seed)
    cosines = embeddings @ embeddings.T
    pairs: list[Pair] = []
    edges = [*bins, np.inf]
    for low, high in pairwise(edges):
        rows, columns = np.nonzero((cosines >= low) & (cosines < high))
        for i in random.permutation(len(rows))[:per_bin]:
            a, b = int(rows[i]), int(columns[i])
            pairs.append(Pair(prompts[a], prompts[b], min(1.0, float(cosines[a, b]))))
    return pairs


# ---------------------------------------------------------------------- measuring


def _quality(
    pairs: Sequence[Pair],
    generate: Generate,
    score: Score,
    features: Features,
    shares: tuple[float, ...],
    bins: tuple[float, ...],
) -> tuple[Quality, ...]:
    prompts = [pair.prompt for pair in pairs]

    def measure(draws: Sequence[Draw]) -> tuple[FloatArray, FloatArray]:
        pictures = generate(draws)
        return score(pictures, prompts), features(pictures)

    seeds = range(len(pairs))
    full = measure([Draw(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)])
    rows = []
    for share in shares:
        fewer = measure(
            [Draw(p, seed, None, share) for p, seed in zip(prompts, seeds, strict=True)]
        )
        cached = measure(
            [
                # The source is another seed's: its noise is not the one the request would draw.
                Draw(pair.prompt, seed, (pair.source, len(pairs) + seed), share)
                for pair, seed in zip(pairs, seeds, strict=True)
            ]
        )
        for low, members in _binned(pairs, bins):
            rows.append(_row(low, share, members, full, fewer, cached))
    return tuple(sorted(rows, key=lambda row: (row.low, row.share)))


def _row(
    low: float,
    share: float,
    members: npt.NDArray[np.int64],
    full: tuple[FloatArray, FloatArray],
    fewer: tuple[FloatArray, FloatArray],
    cached: tuple[FloatArray, FloatArray],
) -> Quality:
    scores = [scored[members] for scored, _ in (full, fewer, cached)]
    looks = [looked[members] for _, looked in (full, fewer, cached)]
    mean_full = float(scores[0].mean())
    if mean_full <= 0:
        raise InvalidRequestError("the uncached pictures score nothing: no ratio can be kept")
    difference = scores[2] - scores[0]
    enough = len(members) > 1
    return Quality(
        low=low,
        share=share,
        pairs=len(members),
        score=float(scores[2].mean()),
        score_full=mean_full,
        score_fewer=float(scores[1].mean()),
        error=float(difference.std(ddof=1) / np.sqrt(len(members)) / mean_full) if enough else 0.0,
        frechet=frechet(looks[2], looks[0]) if enough else 0.0,
        frechet_fewer=frechet(looks[1], looks[0]) if enough else 0.0,
        agreement=agreement(looks[2], looks[0]),
        agreement_fewer=agreement(looks[1], looks[0]),
    )


def _diversity(
    prompts: Sequence[str],
    generate: Generate,
    features: Features,
    shares: tuple[float, ...],
    seeds: int,
    *,
    exclusive: bool,
) -> tuple[Diversity, ...]:
    """Every seed is a request for the same prompt, of which pictures have been drawn before."""

    def distance(share: float | None) -> float:
        draws = [
            Draw(prompt, 1000 + seed)
            if share is None
            else Draw(prompt, 1000 + seed, (prompt, 2000 + seed * exclusive), share)
            for prompt in prompts
            for seed in range(seeds)
        ]
        looked = features(generate(draws)).reshape(len(prompts), seeds, -1)
        return float(np.mean([pairwise_distance(of_prompt) for of_prompt in looked]))

    without = distance(None)
    return tuple(Diversity(share=share, ratio=distance(share) / without) for share in shares)


def _binned(
    pairs: Sequence[Pair], bins: tuple[float, ...]
) -> list[tuple[float, npt.NDArray[np.int64]]]:
    similarities = np.asarray([pair.similarity for pair in pairs])
    places = np.searchsorted(np.asarray(bins), similarities + 1e-9, side="right") - 1
    return [
        (low, members)
        for i, low in enumerate(bins)
        if len(members := np.flatnonzero(places == i)) > 0
    ]
