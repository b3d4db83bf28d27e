"""The levels that a trajectory visits, and where on them it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from engine.errors import InvalidRequestError
from engine.solvers.forms import alpha_sigma
from engine.solvers.noise_schedule import FloatArray, NoiseSchedule
from engine.solvers.options import Level, SolverOptions, Start, Strength
from engine.solvers.spacing import (
    ALIGN_YOUR_STEPS,
    aligned_timesteps,
    custom_timesteps,
    distilled_timesteps,
    even_timesteps,
    exponential_sigmas,
    fractional_timesteps,
    karras_sigmas,
    multistep_timesteps,
    sigmas_at,
    timesteps_of,
)

# Two log-SNRs closer than this are the same level: far below what one training step spans.
SAME_LEVEL = 1e-6

# A first step shorter than this share of the next is no basis for extrapolation: a multistep
# solver would divide the network's rounding noise by it.
SHORT_STEP = 0.1


@dataclass(frozen=True, slots=True)
class Grid:
    """Steps of a solver before it turns them into rows.

    ``levels[i]`` is the log-SNR at which step ``i`` reads x, ``targets[i]`` the one that it aims
    at. They are the same ladder, except where Diffusers' DDIM and PNDM subtract a fixed stride
    from the timestep whatever the next timestep is.
    ``steps`` is the nominal count (some final-step rules depend on it), ``begin`` the first step
    taken, ``entered`` says that step 0 was prepended to a schedule that lacks its level.
    """

    steps: int
    timesteps: FloatArray
    levels: FloatArray
    targets: FloatArray
    initial_scale: float = 1.0
    begin: int = 0
    entered: bool = False
    from_level: bool = False

    @property
    def count(self) -> int:
        """Steps of this grid, those before ``begin`` included."""
        return len(self.timesteps)

    def is_last(self, step: int) -> bool:
        """Whether the schedule ends with this step."""
        return step == self.count - 1

    def half_log_snr(self, step: int) -> float:
        """lambda = log(alpha / sigma) at the entry of a step (or after the last)."""
        return float(self.levels[step]) / 2

    def usable_history(self, step: int) -> int:
        """How many earlier steps a multistep solver may extrapolate from."""
        earlier = step - self.begin
        first = self.begin
        if earlier >= 1 and self._is_unusable(first):
            earlier -= 1
        return earlier

    def _is_unusable(self, step: int) -> bool:
        here, after = float(self.levels[step]), float(self.levels[step + 1])
        if math.isinf(here):
            return True
        if not self.entered or step + 2 > self.count:
            return False
        return after - here < SHORT_STEP * (float(self.levels[step + 2]) - after)


def whole_grid(schedule: str, steps: int, noise: NoiseSchedule, options: SolverOptions) -> Grid:
    """DDIM and PNDM: step i goes from t to t - (train_steps // steps), as Diffusers does."""
    train = noise.num_train_timesteps
    timesteps = even_timesteps(schedule, steps, train, options.steps_offset)
    levels = _levels_at(timesteps, noise)
    final = math.inf if options.set_alpha_to_one else float(noise.log_snr[0])
    previous = timesteps.astype(np.int64) - train // steps
    targets = np.where(previous >= 0, noise.log_snr[np.maximum(previous, 0)], final)
    return Grid(steps, timesteps, np.append(levels, targets[-1]), targets)


def ancestral_grid(schedule: str, steps: int, noise: NoiseSchedule, options: SolverOptions) -> Grid:
    """DDPM: the next timestep of the list, and a clean image after the last."""
    train = noise.num_train_timesteps
    if schedule == "custom":
        timesteps = custom_timesteps(options.timesteps, steps, train, whole=True)
    elif schedule in ALIGN_YOUR_STEPS:
        timesteps = aligned_timesteps(schedule, steps, noise)
    else:
        timesteps = even_timesteps(schedule, steps, train, options.steps_offset)
    return _ladder(steps, timesteps, np.append(_levels_at(timesteps, noise), math.inf))


def lcm_grid(schedule: str, steps: int, noise: NoiseSchedule, options: SolverOptions) -> Grid:
    """LCM, which knows no spacing but the one that it was distilled on; ends clean."""
    return _distilled_grid(schedule, steps, noise, options, math.inf)


def tcd_grid(schedule: str, steps: int, noise: NoiseSchedule, options: SolverOptions) -> Grid:
    """TCD: as LCM, but its last step lands on timestep 0, which is not quite clean."""
    return _distilled_grid(schedule, steps, noise, options, float(noise.log_snr[0]))


def _distilled_grid(
    schedule: str, steps: int, noise: NoiseSchedule, options: SolverOptions, final: float
) -> Grid:
    train = noise.num_train_timesteps
    if schedule == "custom":
        timesteps = custom_timesteps(options.timesteps, steps, train, whole=True)
    else:
        timesteps = distilled_timesteps(steps, train, options.original_inference_steps)
    return _ladder(steps, timesteps, np.append(_levels_at(timesteps, noise), final))


def sigma_grid(schedule: str, steps: int, noise: NoiseSchedule, options: SolverOptions) -> Grid:
    """The Euler family: fractional timesteps, sigmas interpolated or ramped between their ends."""
    train, known = noise.num_train_timesteps, noise.sigmas
    spacing = options.spacing if schedule in ("karras", "exponential") else schedule
    if schedule == "custom":
        timesteps = custom_timesteps(options.timesteps, steps, train, whole=False)
    elif schedule in ALIGN_YOUR_STEPS:
        timesteps = aligned_timesteps(schedule, steps, noise)
    else:
        timesteps = fractional_timesteps(spacing, steps, train, options.steps_offset)
    sigmas = sigmas_at(timesteps, known)
    if schedule in ("karras", "exponential"):
        ramp = karras_sigmas if schedule == "karras" else exponential_sigmas
        sigmas = ramp(float(sigmas[0]), float(sigmas[-1]), steps)
        timesteps = timesteps_of(sigmas, known).astype(np.float32).astype(np.float64)
    levels = _sigma_levels(sigmas, noise, options)
    # Diffusers' init_noise_sigma in variance-preserving scale: sqrt(sigma^2 + 1) becomes 1.
    own_spacing = schedule if schedule in ("leading", "trailing", "linspace") else options.spacing
    scale = 1.0 if own_spacing == "leading" else alpha_sigma(float(levels[0]))[1]
    return replace(_ladder(steps, timesteps, levels), initial_scale=scale)


def multistep_grid(
    schedule: str,
    steps: int,
    noise: NoiseSchedule,
    options: SolverOptions,
    *,
    rounds_karras: bool,
    custom: bool,
) -> Grid:
    """DPM-Solver++ and UniPC: whole timesteps, ramps over the full range of training sigmas."""
    train, known = noise.num_train_timesteps, noise.sigmas
    if schedule in ("karras", "exponential"):
        ramp = karras_sigmas if schedule == "karras" else exponential_sigmas
        sigmas = ramp(float(known[-1]), float(known[0]), steps)
        timesteps = timesteps_of(sigmas, known)
        if schedule == "karras" and rounds_karras:
            timesteps = timesteps.round()
        timesteps = np.trunc(timesteps)
    else:
        if schedule == "custom":
            timesteps = custom_timesteps(options.timesteps, steps, train, whole=True)
        elif custom and schedule in ALIGN_YOUR_STEPS:
            timesteps = aligned_timesteps(schedule, steps, noise)
        else:
            last = train - _clipped_steps(noise, options.lambda_min_clipped)
            timesteps = multistep_timesteps(schedule, steps, train, options.steps_offset, last)
        sigmas = sigmas_at(timesteps, known)
    levels = _sigma_levels(sigmas, noise, options)
    if np.any(np.diff(levels[:-1]) <= 0):
        raise _too_many(steps, schedule)
    return _ladder(len(timesteps), timesteps, levels)


def _clipped_steps(noise: NoiseSchedule, lambda_min: float) -> int:
    """How many of the noisiest timesteps ``lambda_min_clipped`` drops (for cosine schedules)."""
    half = -np.log(noise.sigmas.astype(np.float64))[::-1]
    return int(np.searchsorted(half, lambda_min))


def _ladder(steps: int, timesteps: FloatArray, levels: FloatArray) -> Grid:
    return Grid(steps, timesteps, levels, levels[1:])


def _levels_at(timesteps: FloatArray, noise: NoiseSchedule) -> FloatArray:
    if timesteps[0] > noise.num_train_timesteps - 1 or timesteps[-1] < 0:
        raise InvalidRequestError(
            f"these steps would visit timesteps {timesteps[-1]:g}..{timesteps[0]:g}, outside"
            f" 0..{noise.num_train_timesteps - 1}; ask for other steps",
            field="steps",
        )
    if np.any(np.diff(timesteps) >= 0):
        raise _too_many(len(timesteps), "this")
    return noise.log_snr[timesteps.astype(np.int64)]


def _sigma_levels(sigmas: FloatArray, noise: NoiseSchedule, options: SolverOptions) -> FloatArray:
    # Diffusers keeps sigmas in float32; sigma_min is the last training sigma.
    levels = -2.0 * np.log(sigmas.astype(np.float32).astype(np.float64))
    if options.final_sigmas_type == "zero":
        return np.append(levels, math.inf)
    return np.append(levels, max(-2.0 * math.log(noise.sigmas[0]), float(levels[-1])))


def _too_many(steps: int, schedule: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"steps={steps} is more than the {schedule} schedule can tell apart on this noise schedule",
        field="steps",
    )


def enter(grid: Grid, start: Start, noise: NoiseSchedule) -> Grid:
    """The grid of a trajectory that starts there."""
    if isinstance(start, Strength):
        taken = min(int(grid.steps * start.value), grid.steps)
        if taken == 0:
            raise InvalidRequestError(
                f"strength={start.value} of {grid.steps} steps leaves no step to take",
                field="strength",
            )
        return replace(grid, begin=grid.steps - taken)
    if isinstance(start, Level):
        return _enter_level(grid, start.log_snr, noise)
    return grid


def _enter_level(grid: Grid, log_snr: float, noise: NoiseSchedule) -> Grid:
    if log_snr >= float(grid.levels[-1]) - SAME_LEVEL:
        raise InvalidRequestError(
            f"a state at log-SNR {log_snr:.4g} is already at the schedule's last level",
            field="start",
        )
    entries = grid.levels[:-1]
    # -inf - -inf is not a number: compare equality first.
    same = [i for i, level in enumerate(entries) if _same_level(float(level), log_snr)]
    if same:
        return replace(grid, begin=same[0], from_level=True)
    below = int(np.searchsorted(entries, log_snr))
    following = grid.levels[below:]
    return replace(
        grid,
        timesteps=np.concatenate([[noise.timestep_at(log_snr)], grid.timesteps[below:]]),
        levels=np.concatenate([[log_snr], following]),
        targets=np.concatenate([following[:1], grid.targets[below:]]),
        entered=True,
        from_level=True,
    )


def _same_level(level: float, log_snr: float) -> bool:
    return level == log_snr or abs(level - log_snr) <= SAME_LEVEL
