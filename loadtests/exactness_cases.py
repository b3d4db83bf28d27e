"""The combinations of solver, schedule, prediction type and noise schedule that are compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from engine.solvers import (
    PREDICTION_TYPES,
    SCHEDULES,
    SOLVERS,
    TOP,
    NoiseSchedule,
    SolverOptions,
    Start,
    Strength,
)

LISTED = ("align_your_steps", "align_your_steps_sdxl", "custom")
"""Schedules that are lists of timesteps."""

NOISE_SCHEDULES = {
    "sd": NoiseSchedule("scaled_linear", 0.00085, 0.012),
    "linear": NoiseSchedule("linear", 0.0001, 0.02),
    "cosine": NoiseSchedule("squaredcos_cap_v2", 0.0001, 0.02),
    "sd, zero SNR": NoiseSchedule("scaled_linear", 0.00085, 0.012, rescale_betas_zero_snr=True),
}


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


def generate() -> Iterator[Case]:
    """All solvers, schedules and predictions on four noise schedules, then each solver's options.

    Combinations that one side refuses are generated too.
    """
    for noise in NOISE_SCHEDULES:
        for solver in SOLVERS:
            distilled = "distilled" in SOLVERS[solver].schedules
            for schedule in SCHEDULES:
                # LCM and TCD ignore timestep_spacing; no other class knows their own spacing.
                if distilled and schedule not in ("distilled", *LISTED):
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
