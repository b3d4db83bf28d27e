"""Which timesteps, or which sigmas, a given number of steps visits.

Each function names the Diffusers rule that it follows. Roundings differ between scheduler classes
(whole, truncated or fractional timesteps), and they decide what the network is asked, so they are
kept exactly.
"""

from __future__ import annotations

import math

import numpy as np

from engine.errors import InvalidRequestError
from engine.solvers.noise_schedule import Float32Array, FloatArray, NoiseSchedule

KARRAS_RHO = 7.0  # "Elucidating the Design Space" (arXiv 2206.00364), eq. 5

# "Align Your Steps" (arXiv 2404.14507): timesteps of the Stable Diffusion noise schedule. The
# trailing 0 is the level after the last step, needed to interpolate other step counts.
_AYS_KNOTS = {
    "align_your_steps": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0),
    "align_your_steps_sdxl": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13, 0),
}
_AYS_REFERENCE = NoiseSchedule("scaled_linear", 0.00085, 0.012, 1000)
ALIGN_YOUR_STEPS = tuple(_AYS_KNOTS)


def even_timesteps(spacing: str, steps: int, train_steps: int, offset: int) -> FloatArray:
    """Whole timesteps of DDIM, DDPM, PNDM (Table 2 of arXiv 2305.08891), descending."""
    if spacing == "leading":
        return np.arange(steps - 1, -1, -1, dtype=np.float64) * (train_steps // steps) + offset
    if spacing == "trailing":
        return _trailing(steps, train_steps, train_steps)
    return np.linspace(0, train_steps - 1, steps).round()[::-1]


def fractional_timesteps(spacing: str, steps: int, train_steps: int, offset: int) -> FloatArray:
    """Timesteps of the Euler family: as above, but ``linspace`` stays fractional (in float32)."""
    if spacing == "linspace":
        points = np.linspace(0, train_steps - 1, steps, dtype=np.float32)[::-1]
        return points.astype(np.float64)
    return even_timesteps(spacing, steps, train_steps, offset)


def multistep_timesteps(
    spacing: str, steps: int, train_steps: int, offset: int, last: int
) -> FloatArray:
    """Whole timesteps of DPM-Solver++ and UniPC: one interval more, whose end is not visited.

    ``last`` is the number of training timesteps left by ``lambda_min_clipped``.
    """
    if spacing == "leading":
        return np.arange(steps, 0, -1, dtype=np.float64) * (last // (steps + 1)) + offset
    if spacing == "trailing":
        return _trailing(steps, train_steps, last)
    return np.linspace(0, last - 1, steps + 1).round()[::-1][:-1]


def _trailing(steps: int, train_steps: int, last: int) -> FloatArray:
    stride = train_steps / steps
    timesteps = np.arange(last, 0, -stride).round() - 1.0
    if timesteps[-1] < 0:
        # For a few counts (499 of 1000) the rounding of the stride adds a step at -1 in Diffusers.
        raise InvalidRequestError(
            f"steps={steps} divides {train_steps} timesteps so that a rounded one is negative;"
            " ask for one step more or less",
            field="steps",
        )
    return timesteps


def distilled_timesteps(steps: int, train_steps: int, original_steps: int) -> FloatArray:
    """LCM and TCD: a subset of the timesteps that the distillation used."""
    if original_steps > train_steps:
        raise InvalidRequestError(
            f"original_inference_steps={original_steps} is more than the {train_steps}"
            " training timesteps",
            field="original_inference_steps",
        )
    if steps > original_steps:
        raise InvalidRequestError(
            f"steps={steps} is more than the {original_steps} steps that this model was"
            " distilled on (original_inference_steps)",
            field="steps",
        )
    stride = train_steps // original_steps
    origin = np.arange(original_steps, 0, -1, dtype=np.float64) * stride - 1.0
    index = np.floor(np.linspace(0, original_steps, num=steps, endpoint=False))
    return origin[index.astype(np.int64)]


def karras_sigmas(largest: float, smallest: float, steps: int) -> FloatArray:
    """Karras et al. (arXiv 2206.00364), eq. 5: even in sigma^(1/rho)."""
    low, high = smallest ** (1 / KARRAS_RHO), largest ** (1 / KARRAS_RHO)
    ramp: FloatArray = (high + np.linspace(0, 1, steps) * (low - high)) ** KARRAS_RHO
    return ramp


def exponential_sigmas(largest: float, smallest: float, steps: int) -> FloatArray:
    """Even in log(sigma)."""
    ramp: FloatArray = np.exp(np.linspace(math.log(largest), math.log(smallest), steps))
    return ramp


def timesteps_of(sigmas: FloatArray, known: Float32Array) -> FloatArray:
    """The fractional timestep of each sigma, by linear interpolation of log(sigma).

    The known logarithms stay float32: DPM-Solver++ truncates the result, so the last bit counts.
    """
    log_known = np.log(known)
    low = np.clip(
        np.searchsorted(log_known.astype(np.float64), np.log(sigmas), side="right") - 1,
        0,
        len(known) - 2,
    )
    below, above = log_known[low], log_known[low + 1]
    weight = np.clip((below - np.log(sigmas)) / (below - above), 0.0, 1.0)
    between: FloatArray = (1.0 - weight) * low + weight * (low + 1)
    return between


def sigmas_at(timesteps: FloatArray, known: Float32Array) -> FloatArray:
    """sigma at (fractional) timesteps: linear in sigma, as Diffusers interpolates."""
    return np.interp(timesteps, np.arange(len(known)), known)


def aligned_timesteps(name: str, steps: int, schedule: NoiseSchedule) -> FloatArray:
    """Align Your Steps: the published ten, or their sigmas interpolated log-linearly.

    On another noise schedule the inner levels keep their SNR, and the ends become that schedule's
    own: the first step must begin where its training ended.
    """
    known = schedule.sigmas
    knots = np.log(_AYS_REFERENCE.sigmas[list(_AYS_KNOTS[name])].astype(np.float64))
    knots[0], knots[-1] = math.log(known[-1]), math.log(known[0])
    places = np.linspace(0, len(knots) - 1, steps + 1)[:-1]
    sigmas = np.exp(np.interp(places, np.arange(len(knots)), knots))
    return timesteps_of(sigmas, known).round()


def custom_timesteps(
    wanted: tuple[float, ...] | None, steps: int, train_steps: int, *, whole: bool
) -> FloatArray:
    """The caller's own timesteps, checked: as many as steps, descending, within training."""
    if wanted is None:
        raise InvalidRequestError("schedule 'custom' needs timesteps", field="timesteps")
    if len(wanted) != steps:
        raise InvalidRequestError(
            f"{len(wanted)} timesteps were given for {steps} steps", field="timesteps"
        )
    timesteps = np.asarray(wanted, dtype=np.float64)
    if not np.all(np.isfinite(timesteps)) or np.any(np.diff(timesteps) >= 0):
        raise InvalidRequestError("timesteps must be descending", field="timesteps")
    if timesteps[0] > train_steps - 1 or timesteps[-1] < 0:
        raise InvalidRequestError(
            f"timesteps must lie within 0..{train_steps - 1}", field="timesteps"
        )
    if whole and np.any(timesteps != np.round(timesteps)):
        raise InvalidRequestError("this solver takes whole timesteps only", field="timesteps")
    return timesteps
