"""From a checkpoint's ``scheduler/scheduler_config.json`` to a solver: served, mapped or refused.

:data:`SCHEDULER_CLASSES` is the whole mapping, one line per scheduler class. ``exact`` means equal
to that class to float tolerance; ``nearest`` means another solver on the same noise schedule draws
the picture, as the reply then says, and the ``note`` says why; a class that is absent is refused by
name. ``README.md`` beside this file holds the same for people.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from engine.errors import CorruptCheckpointError, InvalidRequestError, UnsupportedError
from engine.solvers.noise_schedule import NoiseSchedule
from engine.solvers.options import TOP, SolverOptions, Start
from engine.solvers.registry import SOLVERS, check_combination, solver_named
from engine.solvers.table import SolverTable, table


@dataclass(frozen=True, slots=True)
class SchedulerClass:
    """How one Diffusers scheduler class is served, and its defaults where they differ."""

    solver: str
    service: Literal["exact", "nearest"]
    note: str = ""
    spacing: str = "linspace"
    betas: tuple[str, float, float] = ("linear", 0.0001, 0.02)
    set_alpha_to_one: bool = True
    clips: bool = False
    lower_order_final: bool = True


_FILE = "scheduler/scheduler_config.json"
_K_BETAS = ("linear", 0.00085, 0.012)
_LCM_BETAS = ("scaled_linear", 0.00085, 0.012)

SCHEDULER_CLASSES: dict[str, SchedulerClass] = {
    "DDIMScheduler": SchedulerClass("ddim", "exact", spacing="leading", clips=True),
    "DDPMScheduler": SchedulerClass("ddpm", "exact", spacing="leading", clips=True),
    "PNDMScheduler": SchedulerClass(
        "plms",
        "exact",
        "with skip_prk_steps, as Stable Diffusion sets it; refused without",
        spacing="leading",
        set_alpha_to_one=False,
    ),
    "EulerDiscreteScheduler": SchedulerClass("euler", "exact"),
    "EulerAncestralDiscreteScheduler": SchedulerClass("euler_ancestral", "exact"),
    "HeunDiscreteScheduler": SchedulerClass("heun", "exact", betas=_K_BETAS),
    "DPMSolverMultistepScheduler": SchedulerClass(
        "dpmpp_2m", "exact", "dpmsolver++; sde-dpmsolver++ is dpmpp_2m_sde; orders 1 to 3"
    ),
    "UniPCMultistepScheduler": SchedulerClass("unipc", "exact", "predict_x0; orders 1 to 3"),
    "LCMScheduler": SchedulerClass("lcm", "exact", spacing="leading", betas=_LCM_BETAS),
    "TCDScheduler": SchedulerClass("tcd", "exact", spacing="leading", betas=_LCM_BETAS),
    "DPMSolverSinglestepScheduler": SchedulerClass(
        "dpmpp_2m", "nearest", "the multistep form of the same solver"
    ),
    "DEISMultistepScheduler": SchedulerClass(
        "dpmpp_2m", "nearest", "another exponential integrator of order 2"
    ),
    "LMSDiscreteScheduler": SchedulerClass(
        "dpmpp_2m", "nearest", "another linear multistep solver, stabler at few steps"
    ),
    "KDPM2DiscreteScheduler": SchedulerClass(
        "heun", "nearest", "another second-order solver of two evaluations", betas=_K_BETAS
    ),
    "KDPM2AncestralDiscreteScheduler": SchedulerClass(
        "euler_ancestral", "nearest", "ancestral, of first order", betas=_K_BETAS
    ),
    "DPMSolverSDEScheduler": SchedulerClass(
        "dpmpp_2m_sde", "nearest", "the multistep form, one evaluation a step", betas=_K_BETAS
    ),
}

MUST_BE_OFF = {
    "thresholding": "dynamic thresholding is not linear in the prediction",
    "use_beta_sigmas": "the beta schedule is not served",
    "use_lu_lambdas": "the Lu schedule is not served",
    "use_flow_sigmas": "flow matching is another family of models",
    "use_dynamic_shifting": "flow matching is another family of models",
    "sigma_min": "overridden sigma ranges are not served",
    "sigma_max": "overridden sigma ranges are not served",
}
"""Settings that change the arithmetic in ways no table holds, and so are refused, not ignored."""
MUST_EQUAL: dict[str, tuple[object, ...]] = {
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "predict_x0": (True,),
    "solver_p": (None,),
    "variance_type": (None, "fixed_small", "fixed_small_log"),
}
"""Settings that may be left out or have one of these values."""


@dataclass(frozen=True, slots=True)
class SchedulerDefaults:
    """What a checkpoint asks for; :meth:`table` builds tables with any of it replaced.

    ``service`` is "exact" or "nearest", with ``note`` to show to people. ``config`` is the raw
    JSON, kept so that :meth:`with_solver` can do what Diffusers' ``from_config`` does.
    """

    scheduler_class: str
    service: Literal["exact", "nearest"]
    note: str
    solver: str
    schedule: str
    prediction_type: str
    noise_schedule: NoiseSchedule
    options: SolverOptions
    config: Mapping[str, Any]

    @property
    def substitution(self) -> str | None:
        """``LMSDiscrete as dpmpp_2m`` where another solver draws requests that name none."""
        kind = self.scheduler_class.removesuffix("Scheduler")
        return None if self.service == "exact" else f"{kind} as {self.solver}"

    def check(self) -> None:
        """Refuse what could not draw one picture as the checkpoint says.

        Raises:
            UnsupportedError: solver, schedule, prediction and noise do not go together.
        """
        solver, noise = SOLVERS[self.solver], self.noise_schedule
        try:
            check_combination(solver, self.schedule, self.prediction_type, noise, self.options)
        except (InvalidRequestError, UnsupportedError) as error:
            raise UnsupportedError(f"{_FILE}: {error}") from error

    def with_solver(self, solver: str) -> SchedulerDefaults:
        """The same checkpoint under another solver: set keys carry over, its own defaults do not.

        That is Diffusers' ``Other.from_config(pipe.scheduler.config)``.
        """
        if solver == self.solver and self.service == "exact":
            return self
        return _read(self.config, SOLVERS[solver_named(solver).name].diffusers, solver)

    def table(
        self,
        steps: int,
        start: Start = TOP,
        *,
        solver: str | None = None,
        schedule: str | None = None,
        eta: float | None = None,
        timesteps: tuple[float, ...] | None = None,
    ) -> SolverTable:
        """A request's table: None means "as the checkpoint says".

        ``timesteps`` replace both ``steps`` and ``schedule``.
        """
        chosen = self if solver is None else self.with_solver(solver)
        options = chosen.options
        if eta is not None:
            options = replace(options, eta=eta)
        if timesteps is not None:
            if schedule not in (None, "custom"):
                raise InvalidRequestError(
                    f"give either timesteps or schedule={schedule!r}, not both", field="timesteps"
                )
            options = replace(options, timesteps=tuple(float(t) for t in timesteps))
            schedule, steps = "custom", len(timesteps)
        return table(
            chosen.solver,
            schedule or chosen.schedule,
            steps,
            start,
            noise_schedule=chosen.noise_schedule,
            prediction_type=chosen.prediction_type,
            options=options,
        )


def from_scheduler_config(config: Mapping[str, Any]) -> SchedulerDefaults:
    """Read a scheduler config; keys that it lacks take their class's defaults.

    Raises:
        UnsupportedError: naming the class, or the key and value, that is not served.
        CorruptCheckpointError: a value is no number where one is needed, or out of range.
    """
    name = str(config.get("_class_name", ""))
    try:
        if name not in SCHEDULER_CLASSES:
            raise _refused("_class_name", name, f"allowed: {', '.join(SCHEDULER_CLASSES)}")
        if config.get("clip_sample", SCHEDULER_CLASSES[name].clips):
            raise _refused("clip_sample", True, "clipping is not linear; latent models never clip")
        return _read(config, name, None)
    except UnsupportedError as error:
        raise UnsupportedError(f"{_FILE}: {error}") from error
    except (InvalidRequestError, TypeError, ValueError) as error:
        raise CorruptCheckpointError(f"{_FILE}: {error}") from error


def _read(config: Mapping[str, Any], class_name: str, solver: str | None) -> SchedulerDefaults:
    described = SCHEDULER_CLASSES[class_name]
    _check(config)
    if class_name == "PNDMScheduler" and solver is None and not config.get("skip_prk_steps"):
        raise _refused("skip_prk_steps", False, "Runge-Kutta warm-up steps are not served")
    solver = solver or _solver_of(config, described)
    noise = _noise_schedule(config, described)
    spacing = str(config.get("timestep_spacing", described.spacing))
    return SchedulerDefaults(
        scheduler_class=class_name,
        service=described.service,
        note=described.note,
        solver=solver,
        schedule=_schedule_of(config, solver, spacing),
        prediction_type=str(config.get("prediction_type", "epsilon")),
        noise_schedule=noise,
        options=_options(config, described, solver, spacing),
        config=config,
    )


def _check(config: Mapping[str, Any]) -> None:
    for key, reason in MUST_BE_OFF.items():
        if config.get(key):
            raise _refused(key, config[key], reason)
    for key, allowed in MUST_EQUAL.items():
        if key in config and config[key] not in allowed:
            wanted = ", ".join(repr(value) for value in allowed)
            raise _refused(key, config[key], f"allowed: {wanted}")


def _solver_of(config: Mapping[str, Any], described: SchedulerClass) -> str:
    algorithm = config.get("algorithm_type", "dpmsolver++")
    if described.solver != "dpmpp_2m" or described.service != "exact":
        return described.solver
    if algorithm not in ("dpmsolver++", "sde-dpmsolver++"):
        raise _refused("algorithm_type", algorithm, "allowed: 'dpmsolver++', 'sde-dpmsolver++'")
    return "dpmpp_2m_sde" if algorithm == "sde-dpmsolver++" else "dpmpp_2m"


def _schedule_of(config: Mapping[str, Any], solver: str, spacing: str) -> str:
    known = SOLVERS[solver].schedules
    if "distilled" in known:
        return "distilled"
    for key, schedule in (
        ("use_karras_sigmas", "karras"),
        ("use_exponential_sigmas", "exponential"),
    ):
        # A solver without sigma ramps ignores the key, as its Diffusers class does.
        if config.get(key) and schedule in known:
            return schedule
    return spacing


def _noise_schedule(config: Mapping[str, Any], described: SchedulerClass) -> NoiseSchedule:
    kind, start, end = described.betas
    trained = config.get("trained_betas")
    return NoiseSchedule(
        beta_schedule=str(config.get("beta_schedule", kind)),
        beta_start=float(config.get("beta_start", start)),
        beta_end=float(config.get("beta_end", end)),
        num_train_timesteps=int(config.get("num_train_timesteps", 1000)),
        trained_betas=None if trained is None else tuple(float(beta) for beta in trained),
        rescale_betas_zero_snr=bool(config.get("rescale_betas_zero_snr", False)),
    )


def _options(
    config: Mapping[str, Any], described: SchedulerClass, solver: str, spacing: str
) -> SolverOptions:
    plain = SolverOptions()
    known_types = SOLVERS[solver].solver_types
    # Diffusers replaces another family's solver_type by this one's default, and so do we.
    solver_type = config.get("solver_type")
    if solver_type not in known_types:
        solver_type = known_types[0] if known_types else None
    return SolverOptions(
        spacing=spacing,
        steps_offset=int(config.get("steps_offset", 0)),
        set_alpha_to_one=bool(config.get("set_alpha_to_one", described.set_alpha_to_one)),
        final_sigmas_type=str(config.get("final_sigmas_type", "zero")),
        solver_order=int(config.get("solver_order", plain.solver_order)),
        solver_type=solver_type,
        lower_order_final=bool(config.get("lower_order_final", described.lower_order_final)),
        euler_at_final=bool(config.get("euler_at_final", False)),
        lambda_min_clipped=float(config.get("lambda_min_clipped", plain.lambda_min_clipped)),
        disable_corrector=tuple(int(step) for step in config.get("disable_corrector") or ()),
        original_inference_steps=int(
            config.get("original_inference_steps", plain.original_inference_steps)
        ),
        timestep_scaling=float(config.get("timestep_scaling", plain.timestep_scaling)),
    )


def _refused(key: str, value: object, reason: str) -> UnsupportedError:
    return UnsupportedError(f"{key}={value!r} is not supported: {reason}")
