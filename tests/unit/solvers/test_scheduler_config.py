"""Every scheduler class of a checkpoint: served exactly, mapped by name, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest

from engine.errors import CorruptCheckpointError, InvalidRequestError, UnsupportedError
from engine.solvers import SCHEDULER_CLASSES, SOLVERS, from_scheduler_config, scheduler_config
from engine.solvers.scheduler_config import MUST_BE_OFF, MUST_EQUAL

SD15 = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


def test_stable_diffusion_1_is_plms() -> None:
    defaults = from_scheduler_config(SD15)
    assert (defaults.solver, defaults.schedule, defaults.service) == ("plms", "leading", "exact")
    rows = defaults.table(50)
    assert rows.evaluations == 51
    assert rows.timesteps[:3].tolist() == [981, 961, 961]


# The SDE scheduler cannot be made without torchsde, which nothing else here needs.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", sorted(set(SCHEDULER_CLASSES) - {"DPMSolverSDEScheduler"}))
def test_missing_keys_take_the_defaults_of_the_class(name: str) -> None:
    described = SCHEDULER_CLASSES[name]
    cls = getattr(diffusers.schedulers, name)
    reference = dict(cls().config)
    config: dict[str, Any] = {"_class_name": name, "clip_sample": False, "skip_prk_steps": True}
    bare = from_scheduler_config(config)
    full = from_scheduler_config({**reference, **config})
    assert bare.noise_schedule == full.noise_schedule
    assert bare.solver == full.solver == described.solver
    assert bare.prediction_type == full.prediction_type
    if described.service == "exact":
        assert bare.schedule == full.schedule
        assert bare.options == full.options


@pytest.mark.parametrize(
    ("name", "extra", "solver", "schedule"),
    [
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "dpmpp_2m", "karras"),
        (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "sde-dpmsolver++"},
            "dpmpp_2m_sde",
            "linspace",
        ),
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, "euler", "trailing"),
        ("UniPCMultistepScheduler", {"use_exponential_sigmas": True}, "unipc", "exponential"),
        ("LCMScheduler", {"timestep_spacing": "trailing"}, "lcm", "distilled"),
        ("KDPM2DiscreteScheduler", {}, "heun", "linspace"),
    ],
)
def test_settings_choose_solver_and_schedule(
    name: str, extra: dict[str, Any], solver: str, schedule: str
) -> None:
    defaults = from_scheduler_config({"_class_name": name, **extra})
    assert (defaults.solver, defaults.schedule) == (solver, schedule)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name="),
        ({"_class_name": ""}, "_class_name="),
        ({"clip_sample": True}, "clip_sample=True"),
        ({"_class_name": "DDIMScheduler", "thresholding": True}, "thresholding=True"),
        ({"skip_prk_steps": False}, "skip_prk_steps=False"),
        ({"use_beta_sigmas": True}, "use_beta_sigmas=True"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas=True"),
        ({"interpolation_type": "log_linear"}, "interpolation_type='log_linear'"),
        ({"timestep_type": "continuous"}, "timestep_type='continuous'"),
        ({"variance_type": "learned_range"}, "variance_type='learned_range'"),
        ({"_class_name": "UniPCMultistepScheduler", "predict_x0": False}, "predict_x0=False"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid'"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"},
            "algorithm_type='dpmsolver'",
        ),
    ],
)
def test_what_is_not_served_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedError, match=f"^scheduler/scheduler_config.json: .*{named}"):
        from_scheduler_config({**SD15, **changes})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"beta_start": "small"}, "small"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas has 2"),
        ({"beta_end": 1.5}, "between 0 and 1"),
        ({"steps_offset": None}, "NoneType"),
    ],
)
def test_a_broken_config_says_which_file_and_why(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CorruptCheckpointError, match=f"scheduler_config.json: .*{named}"):
        from_scheduler_config({**SD15, **changes})


def test_the_nearest_solver_becomes_exact_when_asked_for_by_name() -> None:
    defaults = from_scheduler_config({**SD15, "_class_name": "LMSDiscreteScheduler"})
    assert defaults.service == "nearest"
    assert "multistep" in defaults.note
    assert defaults.substitution == "LMSDiscrete as dpmpp_2m"
    assert defaults.with_solver("dpmpp_2m").substitution is None


def test_the_document_lists_every_class_and_every_setting_that_is_refused() -> None:
    """Rows are written as they are checked: a change of the mapping fails here until it is told."""
    rows = [
        f"| `{name}` | `{described.solver}` | {described.service} | {described.note} |"
        for name, described in SCHEDULER_CLASSES.items()
    ]
    rows += [f"| `{key}` | off | {reason} |" for key, reason in MUST_BE_OFF.items()]
    rows += [
        f"| `{key}` | {' or '.join(f'`{value}`' for value in allowed)} | |"
        for key, allowed in MUST_EQUAL.items()
    ]
    text = (Path(scheduler_config.__file__).parent / "README.md").read_text()
    told = [line for line in text.splitlines() if line.startswith("| `")]
    assert told == rows, "\n" + "\n".join(rows)


def test_pixel_models_clip_by_default_and_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="clip_sample"):
        from_scheduler_config({"_class_name": "DDIMScheduler"})


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("solver", SOLVERS)
def test_another_solver_gets_what_diffusers_from_config_gives_it(solver: str) -> None:
    ours = from_scheduler_config(SD15).with_solver(solver)
    theirs = getattr(diffusers.schedulers, SOLVERS[solver].diffusers).from_config(
        diffusers.PNDMScheduler.from_config(SD15).config
    )
    theirs.set_timesteps(8)
    if solver == "dpmpp_2m_sde":
        assert ours.solver == solver
    np.testing.assert_allclose(ours.table(8).timesteps, theirs.timesteps.numpy(), rtol=1e-6)
    if "set_alpha_to_one" in theirs.config:
        assert ours.options.set_alpha_to_one == theirs.config.set_alpha_to_one


def test_a_request_replaces_solver_schedule_eta_and_timesteps() -> None:
    defaults = from_scheduler_config(SD15)
    assert defaults.table(8, solver="dpmpp_2m", schedule="karras").schedule == "karras"
    assert defaults.table(8, solver="ddim", eta=1.0).draws_noise.all()
    custom = defaults.table(8, solver="euler", timesteps=(900, 400))
    assert custom.steps == 2
    assert custom.timesteps.tolist() == [900, 400]
    with pytest.raises(InvalidRequestError, match="not both"):
        defaults.table(8, solver="euler", schedule="karras", timesteps=(900, 400))
    with pytest.raises(InvalidRequestError, match="unknown solver"):
        defaults.table(8, solver="magic")
    with pytest.raises(UnsupportedError, match="'plms' does not support schedule 'karras'"):
        defaults.table(8, schedule="karras")
