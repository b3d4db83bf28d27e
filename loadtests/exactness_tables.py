"""Solver tables against Diffusers' scheduler classes, around an analytic denoiser.

    python -m loadtests.exactness_tables            every combination, 1 to 50 steps
    python -m loadtests.exactness_tables --quick    the same combinations, a few step counts

No model is needed: the network is the exact posterior mean of a Gaussian mixture, which is not
linear in x, expressed in each prediction type. Every combination of solver, schedule, prediction
type and noise schedule is generated, run on both sides with the same generator, and printed with
its largest relative error over the step counts, or with who refuses it and why.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any
from unittest import mock

import numpy as np
import torch
from diffusers import schedulers
from diffusers.utils import logging as diffusers_logging
from rich.console import Console
from rich.progress import track
from rich.table import Table

from engine.errors import DarkroomError
from engine.solvers import (
    PREDICTION_TYPES,
    SCHEDULES,
    SOLVERS,
    TOP,
    NoiseSchedule,
    SolverOptions,
    SolverTable,
    Start,
    Strength,
    advance,
    initial_state,
    renoise,
    table,
)

TOLERANCE = 1e-3
"""Largest relative error allowed against Diffusers as it is, in float32."""

TOLERANCE64 = 1e-5
"""The same with Diffusers' tensors and scalars in float64, where only its tables stay float32.

Starting where alpha is 5e-5 (the cosine schedule's top), an epsilon model, or a solver that keeps
x / alpha, loses up to a percent to float32 in Diffusers. There this bound decides.
"""

SHAPE = (1, 4, 4, 4)
ALL_STEPS = tuple(range(1, 51))
FEW_STEPS = (1, 2, 3, 4, 7, 14, 15, 20, 50)

NOISE_SCHEDULES = {
    "sd": NoiseSchedule("scaled_linear", 0.00085, 0.012),
    "linear": NoiseSchedule("linear", 0.0001, 0.02),
    "cosine": NoiseSchedule("squaredcos_cap_v2", 0.0001, 0.02),
    "sd, zero SNR": NoiseSchedule("scaled_linear", 0.00085, 0.012, rescale_betas_zero_snr=True),
}
_LISTED = ("align_your_steps", "align_your_steps_sdxl", "custom")
_SIGMA_SCALED = ("euler", "euler_ancestral", "heun")


@dataclass(frozen=True)
class Case:
    """One combination. ``variant`` names what differs from the defaults, which ``options`` say."""

    solver: str
    schedule: str
    prediction_type: str
    noise: str = "sd"
    variant: str = ""
    options: SolverOptions = field(default_factory=SolverOptions)
    start: Start = TOP

    @property
    def name(self) -> str:
        parts = (self.solver, self.schedule, self.prediction_type, self.noise, self.variant)
        return " / ".join(part for part in parts if part)


class DiffusersRefusal(Exception):
    """Diffusers' class of this solver cannot run the combination."""


def generate() -> Iterator[Case]:
    """All solvers, schedules and predictions on four noise schedules, then each solver's options.

    Combinations that one side refuses are generated too.
    """
    for noise in NOISE_SCHEDULES:
        for solver in SOLVERS:
            distilled = "distilled" in SOLVERS[solver].schedules
            for schedule in SCHEDULES:
                # LCM and TCD ignore timestep_spacing; no other class knows their own spacing.
                if distilled and schedule not in ("distilled", *_LISTED):
                    continue
                if schedule == "distilled" and not distilled:
                    continue
                for prediction_type in PREDICTION_TYPES:
                    yield Case(solver, schedule, prediction_type, noise)
    yield from _variants()
    for solver in SOLVERS:
        for strength in (0.95, 0.6, 0.3):
            schedule = SOLVERS[solver].schedules[0]
            label = f"strength {strength}"
            yield Case(solver, schedule, "epsilon", "sd", label, start=Strength(strength))
    for solver in ("euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc"):
        yield Case(solver, "karras", "v_prediction", "sd", "strength 0.6", start=Strength(0.6))


def _variants() -> Iterator[Case]:
    plain = SolverOptions()
    stable = replace(plain, steps_offset=1, set_alpha_to_one=False)
    for solver in ("ddim", "plms"):
        for spacing in ("leading", "trailing", "linspace"):
            yield Case(solver, spacing, "epsilon", "sd", "offset 1, final alpha 0", stable)
    for solver in ("ddpm", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc"):
        yield Case(solver, "leading", "epsilon", "sd", "offset 1", stable)
    for noise, etas in (("sd", (0.3, 1.0)), ("sd, zero SNR", (0.3, 0.99))):
        # At eta = 1 and zero SNR all of eps is noise, and Diffusers' DDIM takes the square root of
        # 1 - 1, which rounding sometimes makes negative. DDPM compares that combination.
        for eta in etas:
            options = replace(plain, eta=eta)
            yield Case("ddim", "trailing", "v_prediction", noise, f"eta {eta}", options)
            yield Case("tcd", "distilled", "v_prediction", noise, f"eta {eta}", options)
    yield Case("tcd", "distilled", "epsilon", "sd", "eta 0", replace(plain, eta=0.0))
    scaled = replace(plain, timestep_scaling=1.0, original_inference_steps=100)
    yield Case("lcm", "distilled", "epsilon", "sd", "scaling 1, 100 original steps", scaled)
    for solver in ("euler", "heun"):
        for ramp in ("karras", "exponential"):
            for spacing in ("trailing", "linspace"):
                options = replace(plain, spacing=spacing)
                yield Case(solver, ramp, "epsilon", "sd", f"over {spacing}", options)
    yield Case("euler", "trailing", "epsilon", "sd", "to sigma_min", _to_sigma_min(plain))
    for solver in ("dpmpp_2m", "dpmpp_2m_sde"):
        for label, options in _dpm_options(plain):
            for schedule in ("trailing", "karras"):
                yield Case(solver, schedule, "v_prediction", "sd", label, options)
        clipped = replace(plain, lambda_min_clipped=-5.1)
        yield Case(solver, "linspace", "v_prediction", "cosine", "lambda >= -5.1", clipped)
    for label, options in _unipc_options(plain):
        yield Case("unipc", "trailing", "v_prediction", "sd", label, options)


def _to_sigma_min(options: SolverOptions) -> SolverOptions:
    return replace(options, final_sigmas_type="sigma_min")


def _dpm_options(plain: SolverOptions) -> Iterator[tuple[str, SolverOptions]]:
    for order in (1, 2, 3):
        for solver_type in ("midpoint", "heun"):
            options = replace(plain, solver_order=order, solver_type=solver_type)
            yield f"order {order}, {solver_type}", options
    yield "euler at final", replace(plain, euler_at_final=True)
    yield "to sigma_min", _to_sigma_min(plain)
    yield "high order to sigma_min", replace(_to_sigma_min(plain), lower_order_final=False)


def _unipc_options(plain: SolverOptions) -> Iterator[tuple[str, SolverOptions]]:
    for order in (1, 2, 3):
        for kind in ("bh1", "bh2"):
            options = replace(plain, solver_order=order, solver_type=kind)
            yield f"order {order}, {kind}", options
            yield f"order {order}, {kind}, to sigma_min", _to_sigma_min(options)
    yield "no corrector at 0, 1, 2", replace(plain, disable_corrector=(0, 1, 2))
    yield "high order to sigma_min", replace(_to_sigma_min(plain), lower_order_final=False)


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
    noise, options = NOISE_SCHEDULES[case.noise], case.options
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
    # Options that a class lacks are not asked for: they are other solvers' business.
    spaced = case.schedule in ("leading", "trailing", "linspace")
    types = SOLVERS[case.solver].solver_types
    plain: dict[str, Any] = {
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
        plain["algorithm_type"] = "sde-dpmsolver++"
    known = inspect.signature(cls.__init__).parameters
    for key in wanted:
        if key not in known:
            raise DiffusersRefusal(f"{cls.__name__} has no {key}")
    given = {key: value for key, value in plain.items() if key in known}
    return cls(**wanted, **given)


def _set_timesteps(scheduler: Any, case: Case, steps: int) -> None:
    if case.schedule not in _LISTED:
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


@dataclass
class Outcome:
    case: Case
    error32: float = 0.0
    error64: float = 0.0
    compared: int = 0
    worst_steps: int = 0
    refused_by_us: str = ""
    refused_by_diffusers: str = ""
    skipped: dict[int, str] = field(default_factory=dict)

    @property
    def agrees(self) -> bool:
        """Both run it and are equal, or we refuse; never: Diffusers refuses and we serve."""
        if self.refused_by_us:
            return True
        return not self.refused_by_diffusers and self.compared > 0 and self.error64 < TOLERANCE64

    @property
    def is_rounded(self) -> bool:
        """Equal in float64, but Diffusers' float32 arithmetic is coarser than the tolerance."""
        return self.agrees and not self.error32 < TOLERANCE


def examine(case: Case, step_counts: Sequence[int]) -> Outcome:
    outcome = Outcome(case)
    for steps in step_counts:
        ours = _our_refusal(case, steps)
        reference, theirs = _their_result(case, steps)
        if reference is None and not ours:
            outcome.refused_by_diffusers = f"{steps} steps: {theirs}"
            return outcome
        if ours:
            outcome.skipped[steps] = ours
            outcome.refused_by_diffusers = theirs
            continue
        error = relative_error(case, steps, torch.float64, reference=reference)
        outcome.error64 = max(outcome.error64, error)
        error = relative_error(case, steps, torch.float32)
        # Not finite: sqrt of a rounding error below zero, in Diffusers' float32 only.
        error = error if np.isfinite(error) else np.inf
        if error >= outcome.error32:
            outcome.error32, outcome.worst_steps = error, steps
        outcome.compared += 1
    if not outcome.compared:
        outcome.refused_by_us = next(iter(outcome.skipped.values()))
    else:
        outcome.refused_by_diffusers = ""
    return outcome


def _our_refusal(case: Case, steps: int) -> str:
    try:
        build(case, steps)
    except DarkroomError as error:
        return str(error)
    return ""


def _their_result(case: Case, steps: int) -> tuple[np.ndarray[Any, Any] | None, str]:
    """Diffusers' final x in float64, or None and why there is none."""
    try:
        result = run_diffusers(case, steps, torch.float64)
    except (DiffusersRefusal, ValueError, NotImplementedError, IndexError, RuntimeError) as error:
        return None, f"{type(error).__name__}: {error}".split("\n")[0]
    if not np.all(np.isfinite(result)):
        return None, "its result is not finite"
    return result, ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few step counts instead of 1..50")
    parser.add_argument("--only", default="", help="combinations whose name contains this")
    parser.add_argument("--all-refusals", action="store_true", help="print every refusal as well")
    given = parser.parse_args(arguments)
    diffusers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    began = time.monotonic()
    cases = [case for case in generate() if given.only in case.name]
    step_counts = FEW_STEPS if given.quick else ALL_STEPS
    with np.errstate(all="ignore"):
        outcomes = [
            examine(case, step_counts) for case in track(cases, console=Console(stderr=True))
        ]
    console = Console()
    console.width = max(console.width, 150)  # a row a line, also in a file
    _print(console, outcomes, given.all_refusals)
    served = [outcome for outcome in outcomes if not outcome.refused_by_us]
    failed = [outcome for outcome in outcomes if not outcome.agrees]
    rounded = [outcome for outcome in served if outcome.is_rounded]
    plain = [outcome.error32 for outcome in served if not outcome.is_rounded]
    refused = [outcome for outcome in outcomes if outcome.refused_by_us]
    both = sum(1 for outcome in refused if outcome.refused_by_diffusers)
    console.print(
        f"{len(served)} combinations served, {sum(o.compared for o in served)} runs compared:"
        f" largest relative error {max((o.error64 for o in served), default=0.0):.1e} against"
        f" Diffusers in float64; in float32 {max(plain, default=0.0):.1e} for {len(plain)} and"
        f" above {TOLERANCE:g}, by Diffusers' own rounding, for {len(rounded)}."
        f" {len(refused)} refused by us, {both} of them by Diffusers too."
        f" {len(failed)} disagree. {time.monotonic() - began:.0f} s"
    )
    return 1 if failed else 0


def _print(console: Console, outcomes: Sequence[Outcome], all_refusals: bool) -> None:
    shown = Table("combination", "runs", "error (fp32)", "error (fp64)", "at steps", "verdict")
    for outcome in outcomes:
        if outcome.refused_by_us:
            if all_refusals:
                theirs = outcome.refused_by_diffusers or "accepts"
                verdict = f"refused: {outcome.refused_by_us} | Diffusers: {theirs}"
                shown.add_row(outcome.case.name, "0", "", "", "", verdict)
            continue
        verdict = "equal" if outcome.agrees else "DIFFERS"
        if outcome.is_rounded:
            verdict = "equal in fp64; Diffusers' fp32 rounds"
        if outcome.refused_by_diffusers:
            verdict = f"DIFFUSERS REFUSES: {outcome.refused_by_diffusers}"
        shown.add_row(
            outcome.case.name,
            str(outcome.compared),
            f"{outcome.error32:.1e}",
            f"{outcome.error64:.1e}",
            str(outcome.worst_steps),
            verdict + (f" ({len(outcome.skipped)} step counts refused)" if outcome.skipped else ""),
        )
    console.print(shown)


if __name__ == "__main__":
    sys.exit(main())
