"""TensorRT engines on torch's CUDA tensors, recorded as CUDA graphs shape by shape."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import ValidationError
from torch import Tensor

from engine.compile.manifest import PlanManifest, SegmentSpec, TensorSpec
from engine.compile.tensorrt import DATA_TYPES
from engine.compile.tensorrt_flavours import Library, load_library
from engine.compile.tensorrt_profile import EngineTarget, ShapeRange, part_of
from engine.errors import BackendUnavailableError, ExecutionError, PlanCorruptError
from engine.runtime.base import COMMON_ROWS, Graph, Runtime, failure
from engine.runtime.tensorrt_calls import (
    EngineTensor,
    bounds_of,
    check_engine,
    check_target,
    plan_call,
)
from engine.runtime.tensorrt_cuda import Cuda
from engine.runtime.tensorrt_runs import Arena, Runs


class TensorRtRuntime(Runtime):
    """Runs the engines of a plan built for backend ``tensorrt``.

    Args:
        device: ``cuda`` or ``cuda:N``.
        threads: as every runtime takes it; engines use none.
        recordings: CUDA graphs kept for one engine, each for one set of input shapes; further
            shapes run without. 0 records nothing.

    Raises:
        BackendUnavailableError: torch has no such device.
    """

    name: ClassVar[str] = "tensorrt"

    def __init__(self, device: str = "cuda", *, threads: int = 1, recordings: int = 16) -> None:
        self.threads = threads
        self._cuda = Cuda(device)
        self._recordings = recordings
        self.row_sizes = COMMON_ROWS if recordings else ()
        self._lock = threading.Lock()
        self._readers: dict[str, Any] = {}
        self._arenas: dict[str, Arena] = {}

    @property
    def device(self) -> torch.device:
        """Where the tensors of ``Graph.run`` live."""
        return self._cuda.device

    def open(self, folder: Path, manifest: PlanManifest, segment: SegmentSpec) -> Graph:
        """Open one engine; its variant with low-rank inputs is opened when first needed."""
        if manifest.backend != self.name:
            raise BackendUnavailableError(
                f"the plan was built for {manifest.backend}; build it for {self.name}"
            )
        try:
            target = EngineTarget.model_validate(manifest.target)
        except ValidationError as error:
            raise PlanCorruptError(f"the plan does not say what it is built for: {error}") from None
        library = load_library(target.flavour)
        check_target(target, library.version, self._cuda.capability())
        return TensorRtGraph(self, library, folder, segment)

    def runs(self, library: Library, path: Path, segment: SegmentSpec, *, adapted: bool) -> Runs:
        """Read one engine file, and prepare its runs.

        Raises:
            PlanCorruptError: the file is no engine, or not that of the segment.
        """
        inputs = (*segment.inputs, *segment.factors) if adapted else segment.inputs
        with self._lock, self._cuda.use():
            engine = self._read(library, path)
            part = part_of(segment.name)
            if part not in self._arenas:
                self._arenas[part] = Arena(self._cuda)
            arena = self._arenas[part]
        tensors = describe(engine, library)
        check_engine(segment.name, inputs, segment.outputs, tensors)
        return Runs(
            segment.name,
            library,
            engine,
            arena,
            dtypes={spec.name: getattr(torch, spec.dtype) for spec in (*inputs, *segment.outputs)},
            bounds=bounds_of(inputs, tensors),
            recordings=self._recordings,
        )

    def _read(self, library: Library, path: Path) -> Any:
        name = library.flavour.name
        if name not in self._readers:
            self._readers[name] = library.trt.Runtime(library.logger)
        library.errors()
        engine = self._readers[name].deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise PlanCorruptError(f"{path.name} cannot be opened: {library.errors()}")
        return engine

    def close(self) -> None:
        """Free what the engines share."""
        with self._lock:
            self._cuda.synchronize()
            self._readers.clear()
            self._arenas.clear()


class TensorRtGraph(Graph):
    """One engine, or two: without low-rank inputs, and with them."""

    def __init__(
        self, runtime: TensorRtRuntime, library: Library, folder: Path, spec: SegmentSpec
    ) -> None:
        super().__init__(spec)
        self._runtime, self._library = runtime, library
        self._adapters_path = folder / spec.adapters_file if spec.adapters_file else None
        self._lock = threading.Lock()
        self._closed = False
        self._adapters: Runs | None = None
        plain = runtime.runs(library, folder / spec.file, spec, adapted=False)
        self._plain: Runs | None = plain
        self._max_rows = plain.bounds["batch"][1] if "batch" in plain.bounds else None

    @property
    def max_rows(self) -> int | None:
        """Largest batch of the engine's profile."""
        return self._max_rows

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run once; see :meth:`Graph.run`.

        Raises:
            LimitExceededError: a size is not among those that the engine was built for.
            ExecutionError: an input does not fit the spec, or TensorRT or CUDA failed.
        """
        self.check(feeds)
        self._check_devices(feeds)
        # A factor of rank 0 adds nothing, and the engine without factors is the faster one.
        given = {name: t for name, t in feeds.items() if t.numel() or name not in self._factors}
        adapted = self.adapted(given)
        runs = self._with_adapters() if adapted else self._plain
        if runs is None:
            raise ExecutionError(f"{self.spec.name} is closed")
        inputs: Sequence[TensorSpec] = self.spec.inputs
        if adapted:
            inputs = (*inputs, *self.spec.factors)
        shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
        call = plan_call(self.spec.name, inputs, self.spec.outputs, runs.bounds, shapes)
        try:
            return runs.run(call, given)
        except RuntimeError as error:  # torch's and TensorRT's own, CUDA out of memory among them
            raise failure(self.spec.name, error) from error

    def close(self) -> None:
        """Free the engines."""
        with self._lock:
            self._closed = True
            for runs in (self._plain, self._adapters):
                if runs is not None:
                    runs.close()
            self._plain = self._adapters = None

    def _with_adapters(self) -> Runs | None:
        with self._lock:
            if self._adapters is None and self._adapters_path is not None and not self._closed:
                self._adapters = self._runtime.runs(
                    self._library, self._adapters_path, self.spec, adapted=True
                )
            return self._adapters

    def _check_devices(self, feeds: Mapping[str, Tensor]) -> None:
        for name, tensor in feeds.items():
            if tensor.device != self._runtime.device:
                raise ExecutionError(
                    f"{self.spec.name}: input {name!r} is on {tensor.device}, the engine on"
                    f" {self._runtime.device}"
                )


def describe(engine: Any, library: Library) -> list[EngineTensor]:
    """The bindings of an opened engine."""
    trt = library.trt
    names = {getattr(trt.DataType, theirs): ours for ours, theirs in DATA_TYPES.items()}
    tensors = []
    for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors)):
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        allowed = engine.get_tensor_profile_shape(name, 0) if is_input else None
        tensors.append(
            EngineTensor(
                name=name,
                dtype=names.get(engine.get_tensor_dtype(name)),
                shape=tuple(engine.get_tensor_shape(name)),
                is_input=is_input,
                on_device=engine.get_tensor_location(name) == trt.TensorLocation.DEVICE,
                range=None if allowed is None else ShapeRange(*map(tuple, allowed)),
            )
        )
    return tensors
