"""The TensorRT runtime on a machine without a GPU: against a strict fake of TensorRT's API.

That the real bindings have every name which the fake offers is tested where they are installed.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from engine.errors import (
    BackendUnavailableError,
    ExecutionError,
    LimitExceededError,
    OutOfMemoryError,
    PlanCorruptError,
)
from engine.runtime.tensorrt import TensorRtRuntime
from tests.unit.tensorrt_bench import SEGMENT, Bench, compute, factors_of, feeds_of, manifest
from tests.unit.tensorrt_fake import FakeCuda, ICudaEngine, IExecutionContext, IRuntimeConfig


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def assert_equal(outputs: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert outputs.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(outputs[name], tensor, rtol=0, atol=0)


# ------------------------------------------------------------------------------ runs

both = pytest.mark.parametrize("recordings", [0, 4], ids=["direct", "recorded"])


@both
def test_a_graph_gives_what_its_engine_computes(bench: Bench, recordings: int) -> None:
    graph = bench.open(recordings)

    for batch, side, seed in [(2, 4, 0), (1, 8, 1), (2, 4, 2), (8, 2, 3), (1, 8, 4), (2, 4, 5)]:
        feeds = feeds_of(batch, side, seed)
        assert_equal(graph.run(feeds), compute(feeds))


@both
def test_outputs_belong_to_the_caller(bench: Bench, recordings: int) -> None:
    graph = bench.open(recordings)
    first, second = feeds_of(seed=1), feeds_of(seed=2)

    outputs = graph.run(first)
    graph.run(second)

    assert_equal(outputs, compute(first))


@both
def test_inputs_need_not_be_contiguous_and_are_left_alone(bench: Bench, recordings: int) -> None:
    feeds = feeds_of()
    feeds["x"] = feeds["x"].mT
    before = {name: tensor.contiguous().clone() for name, tensor in feeds.items()}

    assert_equal(bench.open(recordings).run(feeds), compute(before))
    assert_equal(feeds, before)


@both
def test_a_tap_that_is_left_out_adds_nothing(bench: Bench, recordings: int) -> None:
    graph, feeds = bench.open(recordings), feeds_of()
    tapped = {**feeds, "tap.y": torch.ones(2, 3, 4, 4)}

    assert_equal(graph.run(tapped), compute(tapped))
    assert_equal(graph.run(feeds), compute(feeds))


@both
def test_factors_go_through_the_engine_that_takes_them(bench: Bench, recordings: int) -> None:
    graph, feeds = bench.open(recordings), feeds_of()
    every = {**feeds, **factors_of("a"), **factors_of("b")}
    one = {**feeds, **factors_of("b", rank=3)}

    assert bench.engines[b"adapters"].contexts == 0
    for given in (every, one, feeds):
        assert_equal(graph.run(given), compute(given))
    assert bench.engines[b"adapters"].contexts > 0


def test_factors_of_rank_0_need_no_engine_of_their_own(bench: Bench) -> None:
    feeds = feeds_of()

    outputs = bench.open().run({**feeds, **factors_of("a", rank=0)})

    assert_equal(outputs, compute(feeds))
    assert bench.engines[b"adapters"].contexts == 0


def test_recordings_are_bounded(bench: Bench) -> None:
    runtime = bench.runtime(recordings=2)
    graph = runtime.open(bench.folder, manifest(), SEGMENT)
    cuda = cast(FakeCuda, runtime._cuda)
    graph.run(feeds_of(batch=8, side=8))  # the largest first, so that the memory never moves

    for batch in (1, 2, 3, 1, 2, 3):
        feeds = feeds_of(batch)
        assert_equal(graph.run(feeds), compute(feeds))

    assert cuda.recorded == 2
    assert bench.engines[b"plain"].contexts == 3  # of the recordings, and of all other shapes


def test_engines_share_memory_and_forget_recordings_when_it_moves(bench: Bench) -> None:
    runtime = bench.runtime()
    small = runtime.open(bench.folder, manifest(), SEGMENT)
    large = runtime.open(bench.folder, manifest(), SEGMENT)
    cuda = cast(FakeCuda, runtime._cuda)

    for _ in range(3):
        assert_equal(small.run(feeds_of(1)), compute(feeds_of(1)))
        assert_equal(large.run(feeds_of(8)), compute(feeds_of(8)))

    assert cuda.recorded == 3  # the small one's first was lost when the large one came
    assert len(runtime._arenas) == 1


@pytest.mark.parametrize(
    ("attribute", "value"), [("recordable", False), ("fails_in_recording", True)]
)
def test_an_engine_that_cannot_be_recorded_runs_without(
    bench: Bench, caplog: pytest.LogCaptureFixture, attribute: str, value: bool
) -> None:
    setattr(bench.engines[b"plain"], attribute, value)
    runtime = bench.runtime()
    graph = runtime.open(bench.folder, manifest(), SEGMENT)

    for seed in range(3):
        assert_equal(graph.run(feeds_of(seed=seed)), compute(feeds_of(seed=seed)))

    assert bench.engines[b"plain"].contexts == 2  # of the one attempt, and of all runs
    assert ["mid cannot be recorded" in record.getMessage() for record in caplog.records] == [True]


def test_threads_take_turns(bench: Bench) -> None:
    graph = bench.open()
    failed: list[int] = []

    def work(seed: int) -> None:
        feeds = feeds_of(1 + seed % 3, seed=seed)
        outputs = [graph.run(feeds)["y"] for _ in range(20)]
        if not all(torch.equal(y, compute(feeds)["y"]) for y in outputs):
            failed.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not failed


# ------------------------------------------------------------------------------ refusals


def test_a_size_outside_of_the_profile_is_named(bench: Bench) -> None:
    with pytest.raises(
        LimitExceededError, match=r"mid: 9 rows are outside of .*: 1 to 8"
    ) as raised:
        bench.open().run(feeds_of(batch=9))
    assert (raised.value.field, raised.value.limit) == ("batch", 8)


@both
def test_a_failed_run_names_the_segment_and_the_reason(bench: Bench, recordings: int) -> None:
    bench.engines[b"plain"].failure = "illegal\n  memory"

    with pytest.raises(ExecutionError, match="mid: no run: illegal memory"):
        bench.open(recordings).run(feeds_of())


@both
def test_running_out_of_memory_is_told_apart(bench: Bench, recordings: int) -> None:
    bench.engines[b"plain"].failure = "Cuda Runtime (out of memory)"

    with pytest.raises(OutOfMemoryError, match="mid: no run"):
        bench.open(recordings).run(feeds_of())


def test_the_largest_batch_is_that_of_the_profile(bench: Bench) -> None:
    assert bench.open().max_rows == 8


def test_inputs_elsewhere_are_refused(bench: Bench) -> None:
    feeds = feeds_of() | {"x": torch.empty(2, 3, 4, 4, device="meta")}

    with pytest.raises(ExecutionError, match="mid: input 'x' is on meta"):
        bench.open().run(feeds)


def test_a_closed_graph_says_so(bench: Bench) -> None:
    graph = bench.open()
    graph.run({**feeds_of(), **factors_of("a")})
    graph.close()
    graph.close()

    with pytest.raises(ExecutionError, match="mid is closed"):
        graph.run(feeds_of())


def test_a_file_that_is_no_engine_is_corrupt(bench: Bench) -> None:
    (bench.folder / SEGMENT.file).write_bytes(b"half an eng")
    bench.errors.append("left over from before")

    with pytest.raises(PlanCorruptError, match=r"mid\.engine cannot be opened: it gives no reason"):
        bench.open()


def test_an_engine_of_another_segment_is_corrupt(bench: Bench) -> None:
    (bench.folder / SEGMENT.file).write_bytes(b"adapters")

    with pytest.raises(PlanCorruptError, match=r"unknown binding 'lora\.a\.down'"):
        bench.open()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"backend": "torch"}, BackendUnavailableError, "built for torch; build it for tensorrt"),
        ({"target": {}}, PlanCorruptError, "does not say what it is built for"),
    ],
)
def test_a_plan_of_another_backend_is_refused(
    bench: Bench, changes: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        bench.runtime().open(bench.folder, manifest(**changes), SEGMENT)


def test_without_a_gpu_the_error_says_what_is_needed() -> None:
    with pytest.raises(BackendUnavailableError, match="needs an NVIDIA GPU"):
        TensorRtRuntime("cpu")


@pytest.mark.parametrize("kind", [IExecutionContext, ICudaEngine, IRuntimeConfig])
def test_the_fake_offers_nothing_that_the_real_library_lacks(kind: type) -> None:
    trt = pytest.importorskip("tensorrt_rtx_bindings", reason="tensorrt_rtx is not installed")
    real = dir(getattr(trt, kind.__name__))

    own = {"strategy"}
    assert [n for n in vars(kind) if not n.startswith("_") and n not in {*real, *own}] == []
