"""The application as Ray Serve deploys it: gateways, one router, workers.

``darkroom serve`` runs :func:`application` on one machine; ``serve deploy`` and KubeRay name it as
``import_path: server.app:build``, with the keys of the configuration file under ``args``.
"""

from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import (
    AutoscalingConfig,
    AutoscalingContext,
    AutoscalingPolicy,
    RequestRouterConfig,
)
from ray.serve.deployment import Application

from server.config import ServeConfig
from server.gateway_deployment import Gateway
from server.router_deployment import RouterReplica
from server.settings import Settings, deployed_config
from server.worker import SCALE_AHEAD_S, Worker

NAME = "darkroom"

_UNBOUNDED = 100_000
"""Serve's own queues must never be what refuses: admission is the router's."""
_HEAD = "node:__internal_head__"
_ROOM_ON_HEAD = 0.001
"""Of the one that every cluster's head node has. The router goes where Serve's controller is, which
it could not do without for long, so that no other node takes it along; and a gateway that is alone
has to be where clients can find it."""
_GRACE_S = 15.0
"""Beyond the drain timeout, for last replies and for closing what is open."""


def build(args: dict[str, Any]) -> Application:
    """What a deployment names; the environment of whoever deploys is laid over its ``args``."""
    return application(deployed_config(args))


def application(config: ServeConfig, log: Path | None = None) -> Application:
    """The graph for a configuration.

    Args:
        log: a pipe (:mod:`server.log_pipe`) to which every process writes its log.
    """
    deploy: dict[str, Any] = {
        "max_ongoing_requests": _UNBOUNDED,
        "graceful_shutdown_wait_loop_s": 0.2,
        "graceful_shutdown_timeout_s": config.drain_timeout_s + _GRACE_S,
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 30.0,
        "max_constructor_retry_count": 1,
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
    }
    plain = RequestRouterConfig(request_router_class="server.serve_clients:PlainCalls")
    named = RequestRouterConfig(request_router_class="server.serve_clients:NamedReplicaRouter")
    light: dict[str, Any] = {"num_cpus": 0}
    on_head = {**light, "resources": {_HEAD: _ROOM_ON_HEAD}}
    router = serve.deployment(
        RouterReplica,
        name="Router",
        ray_actor_options=on_head,
        request_router_config=plain,
        **deploy,
    )
    worker = serve.deployment(
        Worker,
        name="Worker",
        ray_actor_options=_device(config),
        request_router_config=named,
        **deploy,
        **_replicas(config),
    )
    gateway = serve.deployment(
        Gateway,
        name="Gateway",
        num_replicas=config.http.gateways,
        ray_actor_options=on_head if config.http.gateways == 1 else light,
        request_router_config=named,
        **deploy,
    )
    to_router = router.bind(config, log)
    return gateway.bind(config, to_router, worker.bind(config, to_router, log), log)


def workers_wanted(ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """Serve's autoscaling policy: workers for what is outstanding, counted in steps.

    Each worker reports the same figures, of the whole application: the steps that wait or run,
    what one worker does in a second, and for how many seconds workers may have work before more
    are added.
    """
    metrics = ctx.aggregated_metrics or {}
    outstanding = max(metrics.get("outstanding_steps", {}).values(), default=0.0)
    rate = max(metrics.get("steps_per_s", {}).values(), default=0.0)
    if rate <= 0.0:
        return ctx.target_num_replicas, {}
    ahead_s = min(metrics.get("scale_ahead_s", {}).values(), default=SCALE_AHEAD_S)
    wanted = -(-outstanding // (rate * ahead_s))
    low, high = ctx.capacity_adjusted_min_replicas, ctx.capacity_adjusted_max_replicas
    return int(min(max(wanted, low), high)), {}


def _device(config: ServeConfig) -> dict[str, Any]:
    gpus = 1 if config.workers.device == "cuda" else 0
    cpus = config.workers.threads_of(Settings.from_environment().threads)
    return {"num_cpus": cpus, "num_gpus": gpus}


def _replicas(config: ServeConfig) -> dict[str, Any]:
    workers = config.workers
    if workers.max_replicas is None:
        return {"num_replicas": workers.replicas}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=workers.replicas,
            initial_replicas=workers.replicas,
            max_replicas=workers.max_replicas,
            upscale_delay_s=5.0,
            downscale_delay_s=workers.scale_down_after_s,
            policy=AutoscalingPolicy(policy_function="server.app:workers_wanted"),
        )
    }
