from __future__ import annotations

import math

import numpy as np
import pytest
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InvalidRequestError, UnsupportedError
from engine.solvers import NoiseSchedule

checked = settings(deadline=None, max_examples=40)

BETAS = (
    ("linear", 0.0001, 0.02),
    ("scaled_linear", 0.00085, 0.012),
    ("squaredcos_cap_v2", 0.0001, 0.02),
)


@pytest.mark.parametrize(("kind", "start", "end"), BETAS)
@pytest.mark.parametrize("count", [777, 1000])
def test_alphas_equal_diffusers_bit_for_bit(
    kind: str, start: float, end: float, count: int
) -> None:
    reference = DDIMScheduler(count, start, end, kind).alphas_cumprod.numpy()
    ours = NoiseSchedule(kind, start, end, count).alphas_cumprod
    np.testing.assert_array_equal(ours, reference.astype(np.float64))


@pytest.mark.parametrize(("kind", "start", "end"), BETAS)
def test_zero_snr_equals_diffusers_to_the_rounding_of_its_square_root(
    kind: str, start: float, end: float
) -> None:
    reference = DDIMScheduler(1000, start, end, kind, rescale_betas_zero_snr=True)
    ours = NoiseSchedule(kind, start, end, rescale_betas_zero_snr=True)
    np.testing.assert_allclose(ours.alphas_cumprod, reference.alphas_cumprod.numpy(), atol=1e-6)
    assert ours.alphas_cumprod[-1] == 0
    assert ours.log_snr[-1] == -math.inf
    euler = EulerDiscreteScheduler(1000, start, end, kind, rescale_betas_zero_snr=True)
    assert ours.sigmas[-1] == pytest.approx(float(euler.sigmas[0]))


def test_trained_betas_are_taken_as_they_are() -> None:
    betas = tuple(np.linspace(0.001, 0.03, 50))
    ours = NoiseSchedule(trained_betas=betas, num_train_timesteps=50)
    np.testing.assert_allclose(ours.alphas_cumprod, np.cumprod(1 - np.asarray(betas)), rtol=1e-6)


@checked
@given(st.floats(0, 999), st.sampled_from(BETAS))
def test_timesteps_and_levels_are_inverse(timestep: float, betas: tuple[str, float, float]) -> None:
    noise = NoiseSchedule(*betas)
    assert noise.timestep_at(noise.log_snr_at(timestep)) == pytest.approx(timestep, abs=1e-6)


def test_levels_fall_and_tables_are_read_only() -> None:
    noise = NoiseSchedule()
    assert np.all(np.diff(noise.log_snr) < 0)
    for derived in (noise.alphas_cumprod, noise.log_snr, noise.sigmas):
        with pytest.raises(ValueError, match="read-only"):
            derived[0] = 1.0


def test_what_is_not_a_schedule_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="allowed: linear"):
        NoiseSchedule("sigmoid")
    with pytest.raises(InvalidRequestError, match="num_train_timesteps"):
        NoiseSchedule(num_train_timesteps=1)
    with pytest.raises(InvalidRequestError, match="trained_betas has 2"):
        NoiseSchedule(trained_betas=(0.1, 0.2))
    with pytest.raises(InvalidRequestError, match="between 0 and 1"):
        NoiseSchedule("linear", 0.1, 1.5)
