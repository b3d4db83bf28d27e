"""Where the torch runtime runs its graphs."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from engine.errors import ExecutionError
from engine.runtime import Graph
from engine.runtime.torch import TorchRuntime
from tests.graphs import segment

MANIFEST = cast(Any, SimpleNamespace(backend="torch"))


@pytest.fixture(autouse=True)
def _restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def open_graph(monkeypatch: pytest.MonkeyPatch, threads: int, seen: list[object]) -> Graph:
    """A graph that doubles its input, and notes its thread and that one's number of threads."""

    def double(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        name = threading.current_thread().name
        seen.append((name, torch.get_num_threads(), torch.is_grad_enabled()))
        if feeds["x"].isnan().any():
            raise RuntimeError("nothing to double")
        return {"mid/y": 2 * feeds["x"]}

    source = SimpleNamespace(name="mid", module=double)
    monkeypatch.setattr(TorchRuntime, "_load", lambda *_: [source])
    runtime = TorchRuntime(threads=threads)
    return runtime.open(Path("nowhere"), MANIFEST, segment("mid", {"x": "float32"}, ["y"]))


def run_on_threads(graph: Graph, count: int) -> None:
    def run() -> None:
        assert torch.equal(graph.run({"x": torch.ones(2)})["mid/y"], 2 * torch.ones(2))

    callers = [threading.Thread(target=run) for _ in range(count)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()


def test_with_several_threads_graphs_share_one_thread_that_owns_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[object] = []
    graph = open_graph(monkeypatch, 2, seen)
    run_on_threads(graph, 3)
    assert seen == [("darkroom-torch_0", 2, False)] * 3
    with pytest.raises(ExecutionError, match="mid failed: nothing to double"):
        graph.run({"x": torch.full((2,), torch.nan)})


def test_with_one_thread_graphs_run_where_they_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    graph = open_graph(monkeypatch, 1, seen)
    graph.run({"x": torch.ones(2)})
    assert seen == [(threading.current_thread().name, 1, False)]


@pytest.mark.parametrize(("threads", "expected"), [(2, "darkroom-torch_0"), (1, None)])
def test_networks_are_split_where_they_run(
    monkeypatch: pytest.MonkeyPatch, threads: int, expected: str | None
) -> None:
    """Splitting runs the network once, and leaves a team with the thread that did it."""
    loaded_on: list[str] = []

    def load(*_: object) -> list[object]:
        loaded_on.append(threading.current_thread().name)
        return [SimpleNamespace(name="mid", module=None)]

    monkeypatch.setattr(TorchRuntime, "_load", load)
    runtime = TorchRuntime(threads=threads)
    runtime.open(Path("nowhere"), MANIFEST, segment("mid", {"x": "float32"}, ["y"]))
    runtime.close()
    assert loaded_on == [expected or threading.current_thread().name]
