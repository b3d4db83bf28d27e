"""What can be known of a start before, or without, Ray."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest

from engine.errors import InvalidRequestError
from server.config import HttpConfig, ServeConfig
from server.errors import StartError
from server.lifecycle import RAY_ENVIRONMENT, REPLICA_ENVIRONMENT, check_port, why
from server.precompile import precompile
from server.serve_cli import with_model
from tests.faults.cluster import ray_environment

TRACEBACK = """The deployment failed to start 1 times in a row. Error:
ray::ServeReplica:darkroom:Worker.initialize_and_get_metadata() (pid=1, ip=10.0.0.1)
  File "server/worker.py", line 40, in __init__
engine.errors.BackendUnavailableError: cuda is not available here

During handling of the above exception, another exception occurred:
RuntimeError: Traceback (most recent call last):
engine.errors.BackendUnavailableError: cuda is not available here
"""


def test_a_taken_port_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=f"cannot listen on .*:{port}"):
            check_port(HttpConfig(port=port))
    check_port(HttpConfig(port=port))


def test_a_host_that_is_not_ours_is_refused() -> None:
    with pytest.raises(StartError, match=r"192\.0\.2\.77"):
        check_port(HttpConfig(host="192.0.2.77"))


def test_the_reason_is_the_replicas_own_error() -> None:
    status = SimpleNamespace(deployments={"Worker": SimpleNamespace(message=TRACEBACK)})
    error = RuntimeError("Deploying application darkroom failed")
    assert why(status, error) == "BackendUnavailableError: cuda is not available here"
    assert why(None, error) == str(error)


def test_a_model_that_cannot_be_compiled_is_named() -> None:
    config = ServeConfig.model_validate({"models": [{"id": "nowhere"}]})
    with pytest.raises(StartError, match=r"nowhere: InvalidRequestError: .* no model folder"):
        precompile(config, lambda *_: None)


def test_flags_choose_one_model_or_change_the_first() -> None:
    config = ServeConfig.model_validate({"models": [{"id": "a"}, {"id": "b", "precision": "int8"}]})
    assert [m.id for m in with_model(config, None).models] == ["a", "b"]
    [only] = with_model(config, "b", precision=None).models
    assert (only.id, only.precision) == ("b", "int8")
    [other] = with_model(config, "c", precision="int8").models
    assert (other.id, other.precision) == ("c", "int8")
    first, second = with_model(config, None, precision="int8", backend="torch").models
    assert (first.precision, first.backend, second.backend) == ("int8", "torch", "onnxruntime")
    [switched] = with_model(config, "a", backend="torch", compile=True).models
    assert (switched.backend, switched.compile, switched.cuda_graphs) == ("torch", True, None)
    with pytest.raises(InvalidRequestError, match=r"models\.a: cuda_graphs needs device cuda"):
        with_model(config, "a", backend="torch", cuda_graphs=True)


def test_the_nodes_of_a_cluster_are_told_what_one_machine_is() -> None:
    assert (RAY_ENVIRONMENT | REPLICA_ENVIRONMENT).items() <= ray_environment().items()
