"""Solver arithmetic as linear forms over a trajectory's state.

A state is a stack of :data:`SLOTS` latent-shaped tensors, and every quantity of a step is a linear
form over the columns ``[x, e, h1, h2, h3, out, noise]``: seven numbers. Writing
``(X - sigma * OUT) / alpha`` therefore builds a row of the table, and the solver files read like
the papers they cite.

The state is in variance-preserving scale, ``x = alpha * x0 + sigma * eps`` with
``alpha^2 + sigma^2 = 1``: it is what every UNet takes as input, and it stays finite at
zero terminal SNR (alpha = 0).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

SLOTS = 5
"""x, an earlier x (``e``), and three history records (``h1`` the newest)."""

COLUMNS = SLOTS + 2
"""The slots, the network's (guided) output, and fresh unit noise."""

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def _basis(column: int) -> FloatArray:
    form = np.zeros(COLUMNS)
    form[column] = 1.0
    form.flags.writeable = False
    return form


X, E, H1, H2, H3, OUT, NOISE = (_basis(column) for column in range(COLUMNS))


def _zero() -> FloatArray:
    return np.zeros(COLUMNS)


@dataclass(frozen=True, slots=True)
class Row:
    """One network evaluation: where it is made, and what becomes of the state."""

    timestep: float
    log_snr: float
    clean: FloatArray
    x: FloatArray
    e: FloatArray = field(default_factory=_zero)
    h1: FloatArray = field(default_factory=_zero)
    h2: FloatArray = field(default_factory=_zero)
    h3: FloatArray = field(default_factory=_zero)
    draws_noise: bool = False

    def matrix(self) -> FloatArray:
        """The transition: a form for every slot of the new state."""
        return np.stack([self.x, self.e, self.h1, self.h2, self.h3])


def alpha_sigma(log_snr: float) -> tuple[float, float]:
    """(alpha, sigma) at a log-SNR, exact at both ends: -inf is pure noise, +inf is clean."""
    return _root_sigmoid(log_snr), _root_sigmoid(-log_snr)


def _root_sigmoid(value: float) -> float:
    if value >= 0:
        return math.sqrt(1.0 / (1.0 + math.exp(-value)))
    return math.exp(value / 2) / math.sqrt(1.0 + math.exp(value))


def predictions(prediction_type: str, log_snr: float) -> tuple[FloatArray, FloatArray]:
    """The forms of (x0, eps) that the network's output implies for ``x`` at this level."""
    alpha, sigma = alpha_sigma(log_snr)
    if prediction_type == "epsilon":
        return (X - sigma * OUT) / alpha, OUT
    if prediction_type == "v_prediction":
        return alpha * X - sigma * OUT, sigma * X + alpha * OUT
    return OUT, (X - alpha * OUT) / sigma
