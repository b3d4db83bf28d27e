"""One contract for every runtime: a new one adds its class below, with its name and config."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from engine.checkpoint import Checkpoint
from engine.compile.export import GraphSource, export_text_encoder, export_unet, export_vae
from engine.compile.manifest import SegmentSpec, TensorSpec, scale_of
from engine.compile.plan import Plan, PlanStore
from engine.errors import (
    BackendUnavailableError,
    ExecutionError,
    LimitExceededError,
    OutOfMemoryError,
    UnsupportedError,
)
from engine.runtime import RUNTIMES, Graph, Runtime, open_runtime

Feeds = dict[str, torch.Tensor]


def random_feeds(
    ports: tuple[TensorSpec, ...], *, batch: int = 2, rank: int = 2, seed: int = 0, scale: int = 1
) -> Feeds:
    """Feeds for every port; heights are twice ``scale`` cells at the least, widths three times."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"batch": batch, "height": 4 * scale, "width": 8 * scale, "tokens": 5, "rank": rank}

    def size(dim: int | str) -> int:
        if isinstance(dim, int):
            return dim
        name, factor = scale_of(dim)
        return int(sizes[name] * factor)

    feeds = {}
    for port in ports:
        shape = [size(dim) for dim in port.shape]
        if port.dtype == "int64":
            feeds[port.name] = torch.randint(3, 100, shape, generator=generator)
        else:
            feeds[port.name] = torch.randn(shape, generator=generator)
    return feeds


class RuntimeContract:
    """What :class:`Runtime` and :class:`Graph` promise."""

    backend: ClassVar[str]
    config: ClassVar[dict[str, Any]] = {}

    @pytest.fixture(scope="class")
    @classmethod
    def plan(cls, tiny_checkpoint: Callable[[str], Path], plans: Path) -> Plan:
        return PlanStore(plans).build(Checkpoint.open(tiny_checkpoint("text")), backend=cls.backend)

    @pytest.fixture(scope="class")
    @classmethod
    def runtime(cls) -> Iterator[Runtime]:
        runtime = open_runtime(cls.backend, **cls.config)
        yield runtime
        runtime.close()

    @pytest.fixture(scope="class")
    @classmethod
    def modules(cls, tiny_checkpoint: Callable[[str], Path]) -> Mapping[str, GraphSource]:
        checkpoint = Checkpoint.open(tiny_checkpoint("text"))
        sources = [
            *export_unet(checkpoint.load_unet()),
            *(export_text_encoder(e, "text.0") for e in checkpoint.load_text_encoders()),
            *export_vae(checkpoint.load_vae()),
        ]
        return {source.name: source for source in sources}

    @pytest.fixture(scope="class")
    @classmethod
    def graphs(cls, plan: Plan, runtime: Runtime) -> Iterator[dict[str, Graph]]:
        manifest = plan.manifest
        segments: list[SegmentSpec] = [
            *manifest.unet,
            *(spec.segment for spec in manifest.text_encoders),
            manifest.vae_decoder,
        ]
        assert manifest.vae_encoder is not None
        segments.append(manifest.vae_encoder)
        opened = {s.name: runtime.open(plan.folder, manifest, s) for s in segments}
        yield opened
        for graph in opened.values():
            graph.close()

    @pytest.mark.parametrize(("batch", "scale"), [(1, 1), (2, 2), (3, 1)])
    def test_agrees_with_the_module(
        self, graphs: dict[str, Graph], modules: Mapping[str, GraphSource], batch: int, scale: int
    ) -> None:
        for name, graph in graphs.items():
            feeds = random_feeds(graph.spec.inputs, batch=batch, scale=scale)
            with torch.no_grad():
                expected = modules[name].module(feeds)
            outputs = graph.run(feeds)
            assert list(outputs) == [port.name for port in graph.spec.outputs]
            for port in graph.spec.outputs:
                torch.testing.assert_close(
                    outputs[port.name], expected[port.name], rtol=1e-4, atol=1e-5
                )

    def test_factors_are_added_and_optional(
        self, graphs: dict[str, Graph], modules: Mapping[str, GraphSource]
    ) -> None:
        for name in ("context", "down.0", "text.0"):
            graph = graphs[name]
            assert graph.spec.factors
            feeds = random_feeds(graph.spec.inputs)
            factors = random_feeds(graph.spec.factors, seed=1)
            plain, adapted = graph.run(feeds), graph.run({**feeds, **factors})
            zeroed = graph.run({**feeds, **{k: torch.zeros_like(v) for k, v in factors.items()}})
            some = dict(list(factors.items())[:2])
            with torch.no_grad():
                expected = modules[name].module({**feeds, **factors})
                expected_some = modules[name].module({**feeds, **some})
            last = graph.spec.outputs[-1].name
            assert (adapted[last] - plain[last]).abs().max() > 1e-2
            torch.testing.assert_close(zeroed[last], plain[last], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(adapted[last], expected[last], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(
                graph.run({**feeds, **some})[last], expected_some[last], rtol=1e-3, atol=1e-4
            )

    @pytest.mark.parametrize("name", ["context", "down.0"])
    def test_rows_do_not_depend_on_their_mates(self, graphs: dict[str, Graph], name: str) -> None:
        graph = graphs[name]
        feeds = random_feeds((*graph.spec.inputs, *graph.spec.factors), batch=4)
        feeds = {name: tensor.clone() for name, tensor in feeds.items()}
        for tensor in feeds.values():
            tensor[3] *= 10  # a loud mate
        together = graph.run(feeds)
        for row in range(4):
            alone = graph.run({name: tensor[row : row + 1] for name, tensor in feeds.items()})
            for output, tensor in alone.items():
                close = 1e-5 * max(1.0, float(tensor.abs().max()))
                torch.testing.assert_close(together[output][row], tensor[0], rtol=0, atol=close)

    @pytest.mark.parametrize("name", ["context", "up.0"])
    def test_outputs_belong_to_the_caller(self, graphs: dict[str, Graph], name: str) -> None:
        graph = graphs[name]
        first = graph.run(random_feeds(graph.spec.inputs, seed=1))
        kept = {name: tensor.clone() for name, tensor in first.items()}
        for seed in range(2, 6):
            graph.run(random_feeds(graph.spec.inputs, seed=seed))
        for output, tensor in first.items():
            assert torch.equal(tensor, kept[output])
            tensor += 1  # and they can be written to
            assert torch.equal(tensor, kept[output] + 1)

    def test_inputs_are_left_alone(self, graphs: dict[str, Graph]) -> None:
        graph = graphs["mid"]
        feeds = random_feeds(graph.spec.inputs)
        before = {name: tensor.clone() for name, tensor in feeds.items()}
        graph.run(feeds)
        assert all(torch.equal(feeds[name], before[name]) for name in feeds)

    def test_takes_tensors_that_are_not_contiguous(self, graphs: dict[str, Graph]) -> None:
        graph = graphs["mid"]
        feeds = random_feeds(graph.spec.inputs)
        turned = {
            name: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t
            for name, t in feeds.items()
        }
        for name, tensor in graph.run(turned).items():
            torch.testing.assert_close(tensor, graph.run(feeds)[name], rtol=1e-4, atol=1e-5)

    def test_refuses_what_does_not_fit(self, graphs: dict[str, Graph]) -> None:
        graph = graphs["down.0"]
        feeds = random_feeds(graph.spec.inputs)
        with pytest.raises(ExecutionError, match=r"down\.0.*'timestep' is missing"):
            graph.run({name: t for name, t in feeds.items() if name != "timestep"})
        with pytest.raises(ExecutionError, match="no input 'colour'"):
            graph.run({**feeds, "colour": torch.zeros(1)})
        with pytest.raises(ExecutionError, match="float64"):
            graph.run({**feeds, "timestep": feeds["timestep"].double()})
        with pytest.raises(ExecutionError, match="of shape"):
            graph.run({**feeds, "timestep": feeds["timestep"][:, None]})
        with pytest.raises(ExecutionError, match=r"down\.0"):
            graph.run({**feeds, "sample": feeds["sample"][:, :1]})
        graph.run(feeds)  # and goes on

    def test_a_batch_too_large_is_told_apart(self, graphs: dict[str, Graph]) -> None:
        """Above the graph's bound, or else above the device's memory."""
        graph = graphs["mid"]
        feeds = random_feeds(graph.spec.inputs, batch=1)
        rows = 2**34
        error: type[Exception] = OutOfMemoryError
        if graph.max_rows is not None:
            rows, error = graph.max_rows + 1, LimitExceededError
        with pytest.raises(error, match="mid"):
            graph.run({name: t.expand(rows, *t.shape[1:]) for name, t in feeds.items()})
        graph.run(feeds)  # and goes on

    def test_closes_twice(self, plan: Plan, runtime: Runtime) -> None:
        graph = runtime.open(plan.folder, plan.manifest, plan.manifest.vae_decoder)
        feeds = random_feeds(graph.spec.inputs)
        graph.run(feeds)
        graph.close()
        graph.close()
        with pytest.raises(ExecutionError, match="closed"):
            graph.run(feeds)

    def test_graphs_run_at_once(self, graphs: dict[str, Graph]) -> None:
        chosen = [graphs["down.0"], graphs["vae.decoder"], graphs["down.0"]]
        feeds = [random_feeds(graph.spec.inputs, seed=i) for i, graph in enumerate(chosen)]
        expected = [graph.run(feed) for graph, feed in zip(chosen, feeds, strict=True)]
        problems: list[str] = []

        def work(i: int) -> None:
            for _ in range(10):
                for name, tensor in chosen[i].run(feeds[i]).items():
                    if not torch.allclose(tensor, expected[i][name], atol=1e-5):
                        problems.append(name)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(chosen))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not problems

    def test_refuses_a_plan_for_another_backend(self, plan: Plan, runtime: Runtime) -> None:
        other = "torch" if plan.manifest.backend != "torch" else "onnxruntime"
        manifest = plan.manifest.model_copy(update={"backend": other})
        with pytest.raises(BackendUnavailableError, match=other):
            runtime.open(plan.folder, manifest, manifest.unet[0])


class TestOnnxRuntime(RuntimeContract):
    backend = "onnxruntime"
    config: ClassVar[dict[str, Any]] = {"threads": 2}


class TestTorch(RuntimeContract):
    backend = "torch"


def test_runtimes_are_named() -> None:
    assert {"onnxruntime", "torch"} <= set(RUNTIMES)
    with pytest.raises(UnsupportedError, match="there are: onnxruntime"):
        open_runtime("abacus")


def test_a_device_that_is_not_here_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(BackendUnavailableError, match="CUDA"):
        open_runtime("torch", device="cuda")
    with pytest.raises(BackendUnavailableError, match="onnxruntime-gpu"):
        open_runtime("onnxruntime", device="cuda")
