"""The runtime contract for TensorRT: on a GPU where there is one, and on a fake of TensorRT.

The fake's engines compute what the modules of the segments compute, so that all of the contract
holds for our half: what is bound, left out, recorded and copied. The other half needs a GPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from engine.checkpoint import Checkpoint
from engine.compile.export import GraphSource
from engine.compile.manifest import PlanManifest, SegmentSpec, TextEncoderSpec
from engine.compile.plan import Plan, PlanStore
from engine.compile.tensorrt_flavours import choose_library, gpu_capability
from engine.compile.tensorrt_profile import EngineTarget, Profile, Range
from engine.runtime import Graph, Runtime, open_runtime
from tests.contracts.test_runtime import RuntimeContract
from tests.unit.tensorrt_fake import ICudaEngine, install, target

PROFILE = Profile(
    batch=Range.of(1, 2, 4),
    height=Range.of(4, 4, 8),
    width=Range.of(8, 8, 16),
    tokens=Range.of(5, 5, 16),
    rank=Range.of(0, 2, 8),
)


class TestOnAFake(RuntimeContract):
    backend = "tensorrt"
    recordings: ClassVar[int] = 0

    @pytest.fixture(scope="class")
    @classmethod
    def plan(
        cls, modules: Mapping[str, GraphSource], tmp_path_factory: pytest.TempPathFactory
    ) -> Plan:
        specs = {
            name: source.segment(f"{name}.engine", f"{name}.adapters.engine")
            for name, source in modules.items()
        }
        folder = tmp_path_factory.mktemp("plan")
        for spec in specs.values():
            for file in filter(None, (spec.file, spec.adapters_file)):
                (folder / file).write_bytes(file.encode())
        unet = [spec for name, spec in specs.items() if name.partition(".")[0] not in _OTHERS]
        manifest = PlanManifest.model_construct(
            backend="tensorrt",
            target=target(PROFILE),
            unet=tuple(unet),
            text_encoders=(TextEncoderSpec.model_construct(segment=specs["text.0"]),),
            vae_decoder=specs["vae.decoder"],
            vae_encoder=specs["vae.encoder"],
        )
        return Plan(folder, manifest)

    @pytest.fixture(scope="class")
    @classmethod
    def runtime(cls, modules: Mapping[str, GraphSource], plan: Plan) -> Iterator[Runtime]:
        errors: deque[str] = deque()
        engines = {}
        for name, source in modules.items():
            spec = source.segment(f"{name}.engine", f"{name}.adapters.engine")
            for file, adapted in ((spec.file, False), (spec.adapters_file, True)):
                if file is not None:
                    engines[file.encode()] = ICudaEngine(
                        spec, source.module, errors, adapted=adapted, profile=PROFILE
                    )
        with pytest.MonkeyPatch.context() as monkeypatch:
            install(monkeypatch, engines, errors)
            runtime = open_runtime("tensorrt", recordings=cls.recordings)
            yield runtime
            runtime.close()


class TestOnAFakeWithRecordings(TestOnAFake):
    recordings = 16


_OTHERS = ("text", "vae")


class OnDevice(Graph):
    """A graph on a GPU for callers with tensors on the CPU."""

    def __init__(self, graph: Graph, device: torch.device) -> None:
        super().__init__(graph.spec)
        self._graph, self._device = graph, device

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = self._graph.run({name: t.to(self._device) for name, t in feeds.items()})
        return {name: tensor.cpu() for name, tensor in outputs.items()}

    def close(self) -> None:
        self._graph.close()


class OnDeviceRuntime(Runtime):
    """A runtime on a GPU for callers with tensors on the CPU."""

    name: ClassVar[str] = "tensorrt"

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def open(self, folder: Path, manifest: PlanManifest, segment: SegmentSpec) -> Graph:
        return OnDevice(self._runtime.open(folder, manifest, segment), self._runtime.device)

    def close(self) -> None:
        self._runtime.close()


@pytest.mark.full
@pytest.mark.skipif(not torch.cuda.is_available(), reason="engines run on a GPU only")
class TestOnAGpu(RuntimeContract):
    backend = "tensorrt"

    @pytest.fixture(scope="class")
    @classmethod
    def plan(cls, tiny_checkpoint: Callable[[str], Path], plans: Path) -> Plan:
        capability = gpu_capability()
        assert capability is not None
        library = choose_library(capability)
        chosen = EngineTarget(
            flavour=library.flavour.name,
            version=library.version,
            capability=capability,
            unet=PROFILE,
            text=PROFILE,
            vae=PROFILE,
        )
        checkpoint = Checkpoint.open(tiny_checkpoint("text"))
        return PlanStore(plans).build(checkpoint, backend="tensorrt", target=chosen)

    @pytest.fixture(scope="class")
    @classmethod
    def runtime(cls) -> Iterator[Runtime]:
        runtime = OnDeviceRuntime(open_runtime("tensorrt"))
        yield runtime
        runtime.close()
