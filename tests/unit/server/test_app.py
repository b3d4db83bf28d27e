"""The application's graph, and how many workers it wants. Ray is imported, and not started."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

from engine.errors import InvalidRequestError
from server.app import application, build, workers_wanted
from server.config import AdmissionConfig, ServeConfig
from server.worker import SCALE_AHEAD_S, scale_ahead_s

RATE = 100.0


def context(
    outstanding: dict[str, float],
    *,
    rate: float = RATE,
    ahead_s: float = SCALE_AHEAD_S,
    now: int = 2,
    most: int = 4,
) -> Any:
    metrics = {
        "outstanding_steps": outstanding,
        "steps_per_s": dict.fromkeys(outstanding, rate),
        "scale_ahead_s": dict.fromkeys(outstanding, ahead_s),
    }
    return SimpleNamespace(
        aggregated_metrics=metrics,
        target_num_replicas=now,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=most,
    )


@pytest.mark.parametrize(
    ("outstanding", "wanted"),
    [(0.0, 1), (0.5 * RATE * SCALE_AHEAD_S, 1), (2.5 * RATE * SCALE_AHEAD_S, 3), (1e9, 4)],
)
def test_workers_follow_the_steps_that_are_outstanding(outstanding: float, wanted: int) -> None:
    assert workers_wanted(context({"a": outstanding, "b": outstanding})) == (wanted, {})


@pytest.mark.parametrize("max_wait_s", [2.0, 5.0, 10.0, 15.0])
def test_an_overload_adds_workers_however_short_the_bound_on_the_wait(max_wait_s: float) -> None:
    ahead_s = scale_ahead_s(AdmissionConfig(max_wait_s=max_wait_s))
    allowed = 4 * RATE * max_wait_s  # what admission lets four workers have before them
    overloaded = context({"a": allowed}, ahead_s=ahead_s, now=4, most=16)
    assert workers_wanted(overloaded)[0] == 8
    calm = context({"a": 0.4 * allowed}, ahead_s=ahead_s, now=4, most=16)
    assert workers_wanted(calm)[0] <= 4


@pytest.mark.parametrize("max_wait_s", [30.0, 600.0, None])
def test_a_long_wait_or_an_unbounded_one_is_not_waited_for(max_wait_s: float | None) -> None:
    assert scale_ahead_s(AdmissionConfig(max_wait_s=max_wait_s)) == SCALE_AHEAD_S


def test_without_a_measurement_nothing_changes() -> None:
    assert workers_wanted(context({}, now=3)) == (3, {})
    assert workers_wanted(context({"a": 1e9}, rate=0.0, now=3)) == (3, {})


def test_serve_deploy_calls_the_builder_with_the_keys_of_a_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DARKROOM_REDIS_URL", "redis://:secret@redis:6379/0")
    args = {"http": {"gateways": 3}}  # refused without a Redis

    made = call_user_app_builder_with_args_if_necessary(build, args)

    gateway = made._bound_deployment
    assert gateway.init_args[0].redis.url == "redis://:secret@redis:6379/0"
    assert gateway._deployment_config.num_replicas == 3


def test_keys_that_are_wrong_are_named() -> None:
    with pytest.raises(InvalidRequestError, match=r"workers\.replica: Extra inputs"):
        build({"workers": {"replica": 2}})


@pytest.mark.parametrize("workers", [{}, {"replicas": 2, "max_replicas": 4}])
def test_the_graph_is_gateway_router_and_worker(workers: dict[str, int]) -> None:
    config = ServeConfig.model_validate({"workers": workers})
    gateway = application(config)._bound_deployment
    assert gateway.name == "Gateway"
    router, worker = gateway.init_args[1:3]
    assert (router._bound_deployment.name, worker._bound_deployment.name) == ("Router", "Worker")
    scaling = worker._bound_deployment._deployment_config.autoscaling_config
    assert (scaling is not None) == bool(workers)
    if scaling is not None:
        assert (scaling.min_replicas, scaling.max_replicas) == (2, 4)
