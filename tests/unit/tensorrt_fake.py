"""A strict fake of TensorRT's runtime API, and of CUDA, that executes on CPU memory by address.

It refuses what TensorRT refuses (a changed context that was recorded, a missing address, too
little scratch), and overwrites its scratch at every run, so that memory which overlaps shows in
the result.
"""

from __future__ import annotations

import ctypes
import enum
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.compile.manifest import SegmentSpec
from engine.compile.tensorrt import DATA_TYPES
from engine.compile.tensorrt_flavours import FLAVOURS, Library
from engine.compile.tensorrt_profile import EngineTarget, Profile, ShapeRange, shape_profile
from engine.runtime import tensorrt as runtime_module

Function = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


class DataType(enum.Enum):
    FLOAT, HALF, BF16, INT64, INT32 = range(5)


class TensorIOMode(enum.Enum):
    INPUT, OUTPUT = range(2)


class TensorLocation(enum.Enum):
    DEVICE, HOST = range(2)


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC, USER_MANAGED = range(2)


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    LAZY, EAGER = range(2)


class IRuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
    strategy = ExecutionContextAllocationStrategy.STATIC

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy


_RECORDING = 9
"""Handle of the stream on which nothing is executed, only recorded."""


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory = (0, 0)
        self._recorded = False

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert not self._recorded, "a recorded context must not change"
        allowed = self._engine.ranges[name]
        self._shapes[name] = shape
        return all(
            low <= size <= high
            for low, size, high in zip(allowed.min, shape, allowed.max, strict=True)
        )

    def update_device_memory_size_for_shapes(self) -> int:
        assert self._shapes.keys() == self._engine.ranges.keys()
        return 100 * max(math.prod(shape) for shape in self._shapes.values())

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return memory != 0

    def set_device_memory(self, memory: int, size: int) -> None:
        self._memory = memory, size

    def is_stream_capturable(self, stream: int) -> bool:
        return self._engine.recordable

    def execute_async_v3(self, stream: int) -> bool:
        assert self._addresses.keys() == self._engine.dtypes.keys()
        assert self._memory[1] >= self.update_device_memory_size_for_shapes()
        if stream == _RECORDING and self._engine.fails_in_recording:
            return False
        if self._engine.failure:
            self._engine.errors.append(self._engine.failure)
            return False
        if stream == _RECORDING:
            self._recorded = True
            FakeCuda.launched.append(self._launch)
        else:
            self._launch()
        return True

    def _launch(self) -> None:
        ctypes.memset(self._memory[0], 0xFF, self._memory[1])
        feeds = {name: self._tensor(name, shape) for name, shape in self._shapes.items()}
        with torch.no_grad():
            outputs = self._engine.function(feeds)
        for name, value in outputs.items():
            self._tensor(name, tuple(value.shape)).copy_(value)

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        dtype = getattr(torch, self._engine.dtypes[name])
        size = math.prod(shape) * dtype.itemsize
        memory = (ctypes.c_char * size).from_address(self._addresses[name])
        return torch.frombuffer(memory, dtype=dtype).view(shape)


class ICudaEngine:
    """An engine of ``segment`` that computes ``function``."""

    def __init__(
        self,
        segment: SegmentSpec,
        function: Function,
        errors: deque[str],
        *,
        profile: Profile,
        adapted: bool = False,
    ) -> None:
        inputs = (*segment.inputs, *segment.factors) if adapted else segment.inputs
        self.function = function
        self.ranges = shape_profile(inputs, profile)
        self.specs = {port.name: port for port in (*inputs, *segment.outputs)}
        self.dtypes = {name: port.dtype for name, port in self.specs.items()}
        self.errors = errors
        self.failure = ""
        self.recordable = True
        self.fails_in_recording = False
        self.contexts = 0
        self.num_io_tensors = len(self.specs)

    def get_tensor_name(self, index: int) -> str:
        return list(self.specs)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.ranges else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[DATA_TYPES[self.dtypes[name]]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(dim if isinstance(dim, int) else -1 for dim in self.specs[name].shape)

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        allowed: ShapeRange = self.ranges[name]
        return [allowed.min, allowed.opt, allowed.max]

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, config: IRuntimeConfig) -> IExecutionContext:
        assert config.strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        strategy = config.dynamic_shapes_kernel_specialization_strategy
        assert strategy is DynamicShapesKernelSpecializationStrategy.EAGER
        self.contexts += 1
        return IExecutionContext(self)


class FakeCuda:
    """CPU memory, and recordings that are lists of functions."""

    launched: list[Callable[[], None]]

    def __init__(self, device: str) -> None:
        self.device = torch.device("cpu")
        self.recorded = 0

    def capability(self) -> str:
        return "8.9"

    def use(self) -> Any:
        return nullcontext()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(tuple(shape), dtype=dtype)
        tensor.view(-1).view(torch.uint8).fill_(0xFF)
        return tensor

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype)

    def event(self) -> object:
        return object()

    def synchronize(self) -> None:
        pass

    @contextmanager
    def turn(self, lock: threading.Lock, done: object) -> Iterator[None]:
        with lock:
            yield

    @contextmanager
    def execution(self) -> Iterator[int]:
        yield 7

    def record(self, body: Callable[[int], None]) -> Callable[[], None]:
        self.recorded += 1
        FakeCuda.launched = []
        body(_RECORDING)
        launched = FakeCuda.launched

        def replay() -> None:
            for launch in launched:
                launch()

        return replay


def install(
    monkeypatch: pytest.MonkeyPatch, engines: dict[bytes, ICudaEngine], errors: deque[str]
) -> None:
    """Let the runtime find the fake, whose engines are read from files with those contents."""
    trt = SimpleNamespace(
        __version__="1.7",
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=engines.get),
        DataType=DataType,
        TensorIOMode=TensorIOMode,
        TensorLocation=TensorLocation,
        ExecutionContextAllocationStrategy=ExecutionContextAllocationStrategy,
        DynamicShapesKernelSpecializationStrategy=DynamicShapesKernelSpecializationStrategy,
    )
    library = Library(FLAVOURS["tensorrt_rtx"], trt, None, errors)
    monkeypatch.setattr(runtime_module, "load_library", lambda name: library)
    monkeypatch.setattr(runtime_module, "Cuda", FakeCuda)


def target(profile: Profile) -> dict[str, object]:
    """What the fake's engines are built for, as a manifest has it."""
    chosen = EngineTarget(
        flavour="tensorrt_rtx",
        version="1.7",
        capability="8.9",
        unet=profile,
        text=profile,
        vae=profile,
    )
    return chosen.model_dump(mode="json")
