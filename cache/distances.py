"""Distances between sets of pictures in a feature space."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float64]


def frechet(first: FloatArray, second: FloatArray) -> float:
    """Fréchet distance between Gaussians of two sets of features (Heusel et al., 2017).

    Biased upwards for few samples: compare sets of the same size only.
    """
    means = first.mean(axis=0) - second.mean(axis=0)
    covariances = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = _root(covariances[0])
    cross = np.linalg.eigvalsh(root @ covariances[1] @ root)
    trace = np.trace(covariances[0]) + np.trace(covariances[1])
    return float(means @ means + trace - 2.0 * np.sqrt(np.clip(cross, 0.0, None)).sum())


def pairwise_distance(features: FloatArray) -> float:
    """Mean Euclidean distance between the rows."""
    apart = np.linalg.norm(features[:, None] - features[None, :], axis=-1)
    return float(apart[np.triu_indices(len(features), 1)].mean())


def agreement(first: FloatArray, second: FloatArray) -> float:
    """Mean cosine between the rows of both, in order."""
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return float(np.mean((first * second).sum(axis=1) / lengths))


def _root(matrix: FloatArray) -> FloatArray:
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray((vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T)
