"""Scales of int8: which range of real numbers the stored integers stand for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

_WEIGHT_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)
_ACTIVATION_SHRINKS = np.geomspace(1.0, 0.1, 48)


@dataclass(frozen=True, slots=True)
class Scale:
    """A static activation scale: real = scale * (stored - zero)."""

    scale: float
    zero: int


def activation_scale(low: float, high: float, sample: FloatArray, *, signed: bool) -> Scale:
    """The scale with the least squared error on ``sample``, among shrunken ranges.

    Values beyond a range are clipped, which pays where a few are far out.
    """
    best = (math.inf, Scale(1.0, 0))
    for shrink in _ACTIVATION_SHRINKS:
        scale = _affine(min(low, 0.0) * shrink, max(high, 0.0) * shrink, signed)
        error = float(np.square(fake_quantized(sample, scale, signed=signed) - sample).sum())
        if error < best[0]:
            best = (error, scale)
    return best[1]


def _affine(low: float, high: float, signed: bool) -> Scale:
    if signed:
        return Scale(_storable(max(-low, high) / 127), 0)
    scale = _storable((high - low) / 255)
    return Scale(scale, int(np.clip(round(-low / scale), 0, 255)))


def _storable(scale: float) -> float:
    """As float32, and of use for a tensor that is always zero."""
    return float(np.float32(scale)) if scale > 1e-30 else 1.0


def fake_quantized(values: FloatArray, scale: Scale, *, signed: bool) -> FloatArray:
    """What is left of ``values`` after quantizing and back."""
    low, high = (-128, 127) if signed else (0, 255)
    stored = np.clip(np.rint(values / np.float32(scale.scale)) + scale.zero, low, high)
    return np.asarray((stored - scale.zero) * np.float32(scale.scale), np.float32)


def quantized_weights(
    weights: FloatArray, axis: int, bits: int
) -> tuple[npt.NDArray[np.int8], FloatArray]:
    """Symmetric int8 values and one scale per channel of ``axis``, by least squared error."""
    rows = np.moveaxis(weights, axis, 0).reshape(weights.shape[axis], -1)
    limit = 2 ** (bits - 1) - 1
    peak = np.abs(rows).max(axis=1)
    whole = np.where(peak > 1e-30, peak / limit, 1.0).astype(np.float32)
    scales, least = whole, np.full(len(rows), np.inf)
    for shrink in _WEIGHT_SHRINKS:
        trial = (whole * np.float32(shrink)).astype(np.float32)
        stored = np.clip(np.rint(rows / trial[:, None]), -limit, limit)
        error = np.square(stored * trial[:, None] - rows).sum(axis=1)
        scales, least = np.where(error < least, trial, scales), np.minimum(error, least)
    shape = [1] * weights.ndim
    shape[axis] = -1
    stored = np.clip(np.rint(weights / scales.reshape(shape)), -limit, limit)
    return stored.astype(np.int8), scales
