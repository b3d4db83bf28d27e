"""One combination run twice around an analytic denoiser: by our table, and by Diffusers' class."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any
from unittest import mock

import numpy as np
import torch
from diffusers import schedulers

from engine.solvers import (
    SOLVERS,
    NoiseSchedule,
    SolverTable,
    Strength,
    advance,
    initial_state,
    renoise,
    table,
)
from loadtests.exactness_cases import LISTED, NOISE_SCHEDULES, Case

SHAPE = (1, 4, 4, 4)

_SIGMA_SCALED = ("euler", "euler_ancestral", "heun")


class DiffusersRefusal(Exception):
    """Diffusers' class of this solver cannot run the combination."""


class Mixture:
    """The exact denoiser of a per-pixel Gaussian mixture, in variance-preserving scale."""

    def __init__(self, noise: NoiseSchedule, prediction_type: str) -> None:
        self._noise = noise
        self._prediction_type = prediction_type
        offset = np.linspace(-0.3, 0.3, int(np.prod(SHAPE))).reshape(SHAPE)
        self._means = np.stack([offset - 0.9, offset + 0.1, offset + 0.8])
        self._variance = 0.35**2

    def __call__(self, x: np.ndarray[Any, Any], timestep: float) -> np.ndarray[Any, Any]:
        alpha, sigma = renoise(self._noise.log_snr_at(timestep))
        spread = alpha**2 * self._variance + sigma**2
        gap = x[None] - alpha * self._means
        energy = 0.5 * gap**2 / spread
        weights = np.exp(energy.min(axis=0) - energy)
        weights /= weights.sum(axis=0)
        x0 = np.sum(weights * (self._means + alpha * self._variance / spread * gap), axis=0)
        eps = (x - alpha * x0) / sigma
        if self._prediction_type == "epsilon":
            return np.asarray(eps)
        return np.asarray(x0 if self._prediction_type == "sample" else alpha * eps - sigma * x0)


def custom_timesteps(steps: int) -> tuple[float, ...]:
    """Denser towards the clean end: whole, descending, from 999."""
    ramp = np.linspace(1.0, 0.0, steps, endpoint=False) ** 1.5
    return tuple(float(t) for t in np.round(999 * ramp))


def build(case: Case, steps: int) -> SolverTable:
    options = case.options
    if case.schedule == "custom":
        options = replace(options, timesteps=custom_timesteps(steps))
    return table(
        case.solver,
        case.schedule,
        steps,
        case.start,
        noise_schedule=NOISE_SCHEDULES[case.noise],
        prediction_type=case.prediction_type,
        options=options,
    )


def run_table(case: Case, steps: int, dtype: torch.dtype, seed: int = 0) -> np.ndarray[Any, Any]:
    rows = build(case, steps)
    network = Mixture(NOISE_SCHEDULES[case.noise], case.prediction_type)
    draw = _Draws(dtype, seed)
    if isinstance(case.start, Strength):
        alpha, sigma = rows.level(0)
        x = alpha * _clean_image() + sigma * draw()
    else:
        x = rows.initial_scale * draw()
    state = initial_state(x)
    for row in range(rows.evaluations):
        out = network(state[0], float(rows.timesteps[row]))
        noise = draw() if rows.draws_noise[row] else np.zeros(SHAPE)
        state = advance(rows.transition[row : row + 1], state[None], out[None], noise[None])[0]
    return np.asarray(state[0])


class _Draws:
    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self._dtype = dtype
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self) -> np.ndarray[Any, Any]:
        drawn = torch.randn(SHAPE, generator=self._generator, dtype=self._dtype)
        return np.asarray(drawn.numpy(), dtype=np.float64)


def _clean_image() -> np.ndarray[Any, Any]:
    return np.sin(np.arange(np.prod(SHAPE), dtype=np.float64)).reshape(SHAPE)


@lru_cache(maxsize=4)
def make_scheduler(case: Case) -> Any:
    cls = getattr(schedulers, SOLVERS[case.solver].diffusers)
    noise = NOISE_SCHEDULES[case.noise]
    wanted: dict[str, Any] = {
        "num_train_timesteps": noise.num_train_timesteps,
        "beta_schedule": noise.beta_schedule,
        "beta_start": noise.beta_start,
        "beta_end": noise.beta_end,
        "prediction_type": case.prediction_type,
    }
    if noise.rescale_betas_zero_snr:
        wanted["rescale_betas_zero_snr"] = True
    if case.schedule in ("karras", "exponential"):
        wanted[f"use_{case.schedule}_sigmas"] = True
    known = inspect.signature(cls.__init__).parameters
    for key in wanted:
        if key not in known:
            raise DiffusersRefusal(f"{cls.__name__} has no {key}")
    # Options that a class lacks are not asked for: they are other solvers' business.
    given = {key: value for key, value in _scheduler_options(case).items() if key in known}
    return cls(**wanted, **given)


def _scheduler_options(case: Case) -> dict[str, Any]:
    """The case's options under Diffusers' names."""
    options = case.options
    spaced = case.schedule in ("leading", "trailing", "linspace")
    types = SOLVERS[case.solver].solver_types
    given: dict[str, Any] = {
        "timestep_spacing": case.schedule if spaced else options.spacing,
        "steps_offset": options.steps_offset,
        "set_alpha_to_one": options.set_alpha_to_one,
        "final_sigmas_type": options.final_sigmas_type,
        "solver_order": options.solver_order,
        "solver_type": options.solver_type or (types[0] if types else None),
        "lower_order_final": options.lower_order_final,
        "euler_at_final": options.euler_at_final,
        "lambda_min_clipped": options.lambda_min_clipped,
        "disable_corrector": list(options.disable_corrector),
        "original_inference_steps": options.original_inference_steps,
        "timestep_scaling": options.timestep_scaling,
        "clip_sample": False,
        "skip_prk_steps": True,
    }
    if case.solver == "dpmpp_2m_sde":
        given["algorithm_type"] = "sde-dpmsolver++"
    return given


def _set_timesteps(scheduler: Any, case: Case, steps: int) -> None:
    if case.schedule not in LISTED:
        scheduler.set_timesteps(steps)
        return
    if "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise DiffusersRefusal(f"{type(scheduler).__name__} takes no custom timesteps")
    if case.schedule == "custom":
        wanted = list(custom_timesteps(steps))
    else:
        # Diffusers publishes ten; other counts have no reference but our own interpolation.
        listed = replace(case, solver="euler", prediction_type="v_prediction")
        wanted = build(listed, steps).timesteps.tolist()
    scheduler.set_timesteps(timesteps=[int(t) for t in wanted])


def run_diffusers(
    case: Case, steps: int, dtype: torch.dtype, seed: int = 0
) -> np.ndarray[Any, Any]:
    """The loop of Diffusers' text-to-image (or image-to-image) pipeline, without the pipeline."""
    # A shallow copy of a fresh one: set_timesteps makes anew all that a run changes in place.
    scheduler = copy.copy(make_scheduler(case))
    _set_timesteps(scheduler, case, steps)
    _promote(scheduler, dtype)
    network = Mixture(NOISE_SCHEDULES[case.noise], case.prediction_type)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(SHAPE, generator=generator, dtype=dtype)
    timesteps, begin = scheduler.timesteps, 0
    if isinstance(case.start, Strength):
        taken = min(int(steps * case.start.value), steps)
        begin = (steps - taken) * scheduler.order
        timesteps = timesteps[begin:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    if isinstance(case.start, Strength):
        clean = torch.from_numpy(_clean_image()).to(dtype)
        sample = scheduler.add_noise(clean, noise, timesteps[:1])
    else:
        sample = noise * scheduler.init_noise_sigma
    extra = _step_arguments(scheduler, case, generator)
    for timestep in timesteps:
        scaled = scheduler.scale_model_input(sample, timestep)
        out = network(scaled.double().numpy(), float(timestep))
        with _steps_in(dtype):
            sample = scheduler.step(
                torch.from_numpy(out).to(dtype), timestep, sample, **extra, return_dict=False
            )[0]
    return np.asarray(sample.double().numpy())


def _promote(scheduler: Any, dtype: torch.dtype) -> None:
    """Keep the scheduler's float32 numbers, but let it calculate with them in ``dtype``."""
    for name in ("alphas_cumprod", "final_alpha_cumprod", "one", "sigmas"):
        value = getattr(scheduler, name, None)
        if isinstance(value, torch.Tensor):
            setattr(scheduler, name, value.to(dtype))


def _step_arguments(scheduler: Any, case: Case, generator: torch.Generator) -> dict[str, Any]:
    eta = case.options.eta
    known = inspect.signature(scheduler.step).parameters
    wanted: Mapping[str, Any] = {"generator": generator, "eta": eta}
    return {key: value for key, value in wanted.items() if key in known and value is not None}


def _steps_in(dtype: torch.dtype) -> Any:
    # Some step() functions cast to torch.float32 whatever the sample is. A float64 run, which tells
    # Diffusers' own rounding from a real difference, must redirect that.
    return mock.patch.object(torch, "float32", dtype)


def relative_error(
    case: Case,
    steps: int,
    dtype: torch.dtype,
    seed: int = 0,
    reference: np.ndarray[Any, Any] | None = None,
) -> float:
    """|ours - Diffusers| / |Diffusers| of the final x, in variance-preserving scale."""
    if reference is None:
        reference = run_diffusers(case, steps, dtype, seed)
    ours = run_table(case, steps, dtype, seed)
    if case.solver in _SIGMA_SCALED:
        # Diffusers' x / alpha, at the level where the run ends.
        reference = reference * build(case, steps).level(-1)[0]
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))
