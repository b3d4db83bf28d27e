"""A node that vanishes from the network under load, and comes back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.checkpoint import Checkpoint
from engine.compile.plan import PlanStore
from tests.faults.cluster import Cluster, two_nodes
from tests.faults.netns import why_not
from tests.faults.two_nodes import play

pytestmark = pytest.mark.full

BLINK_S = 15.0
"""Longer than gateways wait for a worker, shorter than Ray waits for a node."""
LONG_S = 40.0
"""Longer than both."""


@pytest.fixture(scope="module")
def cluster(
    default_model: Path, plans: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    PlanStore(plans).build(Checkpoint.open(default_model))
    home = tmp_path_factory.mktemp("two-nodes")
    (home / "plans").symlink_to(plans)
    models = [{"id": "default", "path": str(default_model)}]
    with two_nodes(home / "logs", home, models=models) as cluster:
        yield cluster


@pytest.mark.parametrize("cut_s", [BLINK_S, LONG_S])
def test_clients_of_a_node_that_vanishes_notice_nothing_but_time(
    cluster: Cluster, cut_s: float
) -> None:
    run = play(cluster, clients=8, steps=20, calm_s=10.0, cut_s=cut_s, after_s=5.0)
    assert {answer.status for answer in run.answers} == {200}
    assert run.meanwhile
    assert run.moved
    assert {answer.attempts for answer in run.moved} == {2}
    assert run.differing() == []
    assert run.after
    assert cluster.metric("darkroom_router_workers") == 2
