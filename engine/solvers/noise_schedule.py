"""What a checkpoint was trained on: the noise level of every training timestep.

Diffusers computes these tables in float32 (``betas`` in every ``scheduling_*.py``), and some of
its schedules round or truncate numbers derived from them to whole timesteps. A schedule computed
in float64 would now and then land on the neighbouring timestep, so the same roundings are made
here on purpose; everything after this module is float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from engine.errors import InvalidRequestError, UnsupportedError

FloatArray = npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
MAX_TRAIN_TIMESTEPS = 100_000

# Diffusers' sigma-based schedulers replace a terminal alpha of zero by this, so that sigma = 4096.
_ZERO_SNR_FLOOR = 2.0**-24


@dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """The betas of a ``scheduler_config.json``; derived tables are cached and read-only.

    ``rescale_betas_zero_snr`` is Algorithm 1 of "Common Diffusion Noise Schedules and Sample
    Steps are Flawed" (arXiv 2305.08891): the last training timestep becomes pure noise.
    """

    beta_schedule: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_train_timesteps: int = 1000
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False

    def __post_init__(self) -> None:
        if self.trained_betas is None and self.beta_schedule not in BETA_SCHEDULES:
            raise UnsupportedError(
                f"beta_schedule={self.beta_schedule!r} is not supported;"
                f" allowed: {', '.join(BETA_SCHEDULES)}"
            )
        if not 2 <= self.num_train_timesteps <= MAX_TRAIN_TIMESTEPS:
            raise InvalidRequestError(
                f"num_train_timesteps={self.num_train_timesteps} is outside"
                f" 2..{MAX_TRAIN_TIMESTEPS}",
                field="num_train_timesteps",
            )
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise InvalidRequestError(
                f"trained_betas has {len(self.trained_betas)} values,"
                f" num_train_timesteps is {self.num_train_timesteps}",
                field="trained_betas",
            )
        betas = _raw_betas(self)
        if not (np.all(np.isfinite(betas)) and np.all(betas > 0) and np.all(betas < 1)):
            raise InvalidRequestError("every beta must lie between 0 and 1", field="betas")

    @property
    def alphas_cumprod(self) -> FloatArray:
        """alpha^2 of each training timestep, decreasing; 0 at the end with zero terminal SNR."""
        return _alphas_cumprod(self)

    @property
    def log_snr(self) -> FloatArray:
        """log(alpha^2 / sigma^2) of each training timestep; -inf at zero terminal SNR."""
        return _log_snr(self)

    @property
    def sigmas(self) -> Float32Array:
        """sigma / alpha of each training timestep, increasing and finite (k-diffusion's sigma)."""
        return _sigmas(self)

    def timestep_at(self, log_snr: float) -> float:
        """The (fractional) timestep at a log-SNR: linear in log-SNR, clamped to the training range.

        Diffusers' ``_sigma_to_t`` interpolates log(sigma / alpha) = -log_snr / 2: the same line.
        """
        known = -2.0 * np.log(self.sigmas.astype(np.float64))
        steps = np.arange(self.num_train_timesteps, dtype=np.float64)
        return float(np.interp(-log_snr, -known, steps))

    def log_snr_at(self, timestep: float) -> float:
        """The log-SNR at a (fractional) timestep: the inverse of :meth:`timestep_at`."""
        known = -2.0 * np.log(self.sigmas.astype(np.float64))
        return float(np.interp(timestep, np.arange(self.num_train_timesteps), known))


_Scalar = TypeVar("_Scalar", bound=np.generic)


def _frozen(values: npt.NDArray[_Scalar]) -> npt.NDArray[_Scalar]:
    values.flags.writeable = False
    return values


def _linspace32(start: float, end: float, count: int) -> Float32Array:
    """float32 linspace, counted from both ends towards the middle as torch does."""
    first, last = np.float32(start), np.float32(end)
    step = np.float32((last - first) / np.float32(count - 1))
    index = np.arange(count)
    # Each half in float64 and rounded once: what a fused multiply-add gives.
    rising = float(first) + float(step) * index
    falling = float(last) - float(step) * (count - 1 - index)
    return np.where(index < count // 2, rising, falling).astype(np.float32)


def _raw_betas(schedule: NoiseSchedule) -> Float32Array:
    count = schedule.num_train_timesteps
    if schedule.trained_betas is not None:
        return np.asarray(schedule.trained_betas, dtype=np.float32)
    if schedule.beta_schedule == "linear":
        return _linspace32(schedule.beta_start, schedule.beta_end, count)
    if schedule.beta_schedule == "scaled_linear":
        root = _linspace32(schedule.beta_start**0.5, schedule.beta_end**0.5, count)
        return root * root
    return _cosine_betas(count)


@lru_cache(maxsize=8)
def _cosine_betas(count: int) -> Float32Array:
    """Improved DDPM (arXiv 2102.09672), eq. 17: alpha^2 follows a squared cosine, beta <= 0.999."""

    def level(fraction: float) -> float:
        return math.cos((fraction + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - level((i + 1) / count) / level(i / count), 0.999) for i in range(count)]
    return np.asarray(betas, dtype=np.float32)


def _cumulative(alphas: Float32Array) -> Float32Array:
    # torch accumulates a float32 product in float64 on the CPU and rounds every output.
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)


def _zero_terminal_snr(betas: Float32Array) -> Float32Array:
    """Shift and scale sqrt(alpha^2) so that its first value stays and its last becomes zero."""
    root = np.sqrt(_cumulative(np.float32(1) - betas))
    first, last = root[0], root[-1]
    root = (root - last) * (first / (first - last))
    level = root * root
    alphas = np.concatenate([level[:1], level[1:] / level[:-1]])
    return np.asarray(np.float32(1) - alphas, dtype=np.float32)


@lru_cache(maxsize=64)
def _alphas_cumprod(schedule: NoiseSchedule) -> FloatArray:
    betas = _raw_betas(schedule)
    if schedule.rescale_betas_zero_snr:
        betas = _zero_terminal_snr(betas)
    return _frozen(_cumulative(np.float32(1) - betas).astype(np.float64))


@lru_cache(maxsize=64)
def _log_snr(schedule: NoiseSchedule) -> FloatArray:
    level = _alphas_cumprod(schedule)
    with np.errstate(divide="ignore"):
        return _frozen(np.log(level) - np.log1p(-level))


@lru_cache(maxsize=64)
def _sigmas(schedule: NoiseSchedule) -> Float32Array:
    level = _alphas_cumprod(schedule).astype(np.float32)
    if schedule.rescale_betas_zero_snr:
        level[-1] = _ZERO_SNR_FLOOR
    return _frozen(np.sqrt((np.float32(1) - level) / level))
