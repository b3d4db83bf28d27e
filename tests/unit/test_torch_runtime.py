"""Where the torch runtime runs its graphs."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from engine.errors import ExecutionError
from engine.runtime import Graph
from engine.runtime.torch import TorchRuntime, _Recorded
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


class FakeGraphs:
    """CUDA graphs without CUDA: what is captured runs at once, a replay says that it was one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capturing = 0
        self.most = 0
        self.modes: list[str] = []
        self.replays = 0
        self.set_back: list[object] = []
        stream = SimpleNamespace(wait_stream=lambda _: None)
        for name, value in {
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "set_stream": self.set_back.append,
            "stream": lambda _: nullcontext(),
            "CUDAGraph": lambda: SimpleNamespace(replay=self._replay),
            "graph": self._capture,
        }.items():
            monkeypatch.setattr(f"torch.cuda.{name}", value)

    @contextmanager
    def _capture(self, _graph: object, *, capture_error_mode: str) -> Iterator[None]:
        self.modes.append(capture_error_mode)
        self.capturing += 1
        self.most = max(self.most, self.capturing)
        try:
            yield
        finally:
            self.capturing -= 1

    def _replay(self) -> None:
        self.replays += 1


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> FakeGraphs:
    return FakeGraphs(monkeypatch)


def double(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"y": 2 * feeds["x"]}


def test_recordings_are_made_one_at_a_time_and_leave_other_threads_alone(
    graphs: FakeGraphs,
) -> None:
    together = threading.Barrier(2)

    def record() -> None:
        recorded = _Recorded("mid", double)
        together.wait(60)
        for rows in range(1, 15):
            recorded({"x": torch.ones(rows)})

    threads = [threading.Thread(target=record) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert graphs.modes == ["thread_local"] * 2 * 14
    assert graphs.most == 1


def test_each_shape_is_recorded_once_and_so_many_are_kept(graphs: FakeGraphs) -> None:
    recorded = _Recorded("mid", double)
    for rows in (1, 2, 1, 2, 2):
        recorded({"x": torch.ones(rows)})
    assert (len(graphs.modes), graphs.replays) == (2, 5)
    for rows in range(3, 19):  # sixteen more: both are forgotten
        recorded({"x": torch.ones(rows)})
    recorded({"x": torch.ones(18)})
    recorded({"x": torch.ones(1)})
    assert len(graphs.modes) == 2 + 16 + 1


def test_what_cannot_be_recorded_runs_without(
    graphs: FakeGraphs, caplog: pytest.LogCaptureFixture
) -> None:
    def synchronizes(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if graphs.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        return double(feeds)

    recorded = _Recorded("text.0", synchronizes)
    for rows in (2, 3):
        found = recorded({"x": torch.ones(rows)})["y"]
        assert torch.equal(found, 2 * torch.ones(rows))
    assert (len(graphs.modes), graphs.replays) == (1, 0)
    assert len(graphs.set_back) == 1  # a failed capture would leave the thread on its stream
    [warning] = caplog.messages
    assert warning.startswith("text.0 cannot be recorded: operation not permitted")


def test_too_large_a_recording_is_told_as_such(graphs: FakeGraphs) -> None:
    """The loop then splits the batch; a smaller one may well be recorded."""

    def greedy(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if graphs.capturing and len(feeds["x"]) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return double(feeds)

    recorded = _Recorded("mid", greedy)
    with pytest.raises(torch.OutOfMemoryError):
        recorded({"x": torch.ones(3)})
    recorded({"x": torch.ones(2)})
    assert graphs.replays == 1
