"""Runs of one engine: bind memory, execute, and record what comes again.

A recording is a CUDA graph with an execution context and addresses of its own, since TensorRT
forbids changing a context that was recorded. What recordings need in memory, they share: inputs,
outputs and scratch of all recordings of one network lie in the same :class:`Arena`, because nothing
in there outlives a run. So every run copies inputs in and outputs out, which costs far less than
launching hundreds of kernels one by one.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from engine.compile.tensorrt_flavours import Library
from engine.errors import ExecutionError
from engine.runtime.base import execution_error
from engine.runtime.tensorrt_calls import Bounds, Call, lay_out
from engine.runtime.tensorrt_cuda import Cuda

_log = logging.getLogger(__name__)


class Arena:
    """Device memory that engines use in turns: the scratch of runs, and all of recordings.

    Engines share one when they never need to run at once: those of one network.
    """

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self._users: WeakSet[Runs] = WeakSet()
        self._lock = threading.Lock()
        self._done = cuda.event()
        self._memory: Tensor | None = None

    def turn(self) -> AbstractContextManager[None]:
        """A ``with`` block that has the memory for itself, on host and device."""
        return self.cuda.turn(self._lock, self._done)

    def join(self, user: Runs) -> None:
        """Let ``user`` make recordings here; it will be told to forget them."""
        with self._lock:
            self._users.add(user)

    def reserve(self, size: int) -> Tensor:
        """At least ``size`` bytes, to be used until the turn ends.

        Where the memory must grow, it moves, and every recording in it is forgotten. That happens
        a few times, until the largest run has been seen.
        """
        if self._memory is None or self._memory.numel() < size:
            self.cuda.synchronize()  # what is about to be freed may still be read
            for user in self._users:
                user.forget()
            self._memory = None
            self._memory = self.cuda.empty((size,), torch.uint8)
        return self._memory


@dataclass(frozen=True)
class _Recording:
    """What replays a run with certain shapes.

    Attributes:
        context: it belongs to the recording, and must live as long.
        inputs, outputs: views into the arena.
    """

    context: Any
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    replay: Callable[[], None]


class Runs:
    """Runs an opened engine, one call at a time.

    Args:
        segment: its name, for messages.
        engine: TensorRT's.
        dtypes: of its inputs and outputs, by name.
        bounds: sizes of dimensions that it was built for.
        recordings: how many to keep; calls with other shapes run without.
    """

    def __init__(
        self,
        segment: str,
        library: Library,
        engine: Any,
        arena: Arena,
        *,
        dtypes: Mapping[str, torch.dtype],
        bounds: Bounds,
        recordings: int,
    ) -> None:
        self.bounds = bounds
        self._segment = segment
        self._library, self._engine, self._arena = library, engine, arena
        self._cuda = arena.cuda
        self._dtypes = dtypes
        self._limit = recordings
        self._recordings: dict[object, _Recording] = {}
        self._context: Any = None
        arena.join(self)

    def run(self, call: Call, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run once, in line with torch's current stream.

        Returns:
            Every output, in memory of its own.

        Raises:
            ExecutionError: TensorRT failed; gives its reason.
        """
        with self._arena.turn():
            if self._engine is None:
                raise ExecutionError(f"{self._segment} is closed")
            recording = self._recording(call)
            if recording is None:
                return self._direct(call, feeds)
            return _replay(recording, call, feeds)

    def forget(self) -> None:
        """Drop every recording; the next runs make them anew."""
        self._recordings.clear()

    def close(self) -> None:
        """Free the engine and its recordings. Closing twice is harmless."""
        with self._arena.turn():
            self._cuda.synchronize()
            self._recordings.clear()
            self._context = self._engine = None

    def _direct(self, call: Call, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Execute on the caller's own memory."""
        if self._context is None:
            self._context = self._new_context()
        inputs = {
            name: self._cuda.zeros(shape, self._dtypes[name])
            if name in call.zeros
            else feeds[name].contiguous()
            for name, shape in call.inputs.items()
        }
        outputs = {
            name: self._cuda.empty(shape, self._dtypes[name])
            for name, shape in call.outputs.items()
        }
        size = self._set_shapes(self._context, call)
        scratch = self._arena.reserve(size)
        self._bind(self._context, {**inputs, **outputs}, scratch, size)
        with self._cuda.execution() as stream:
            self._execute(self._context, stream)
        return outputs

    def _recording(self, call: Call) -> _Recording | None:
        """The recording for this call, made now if there is room for one more."""
        known = self._recordings.get(call.key)
        if known is not None or len(self._recordings) >= self._limit:
            return known
        recording = self._record(call)
        if recording is None:
            self._limit = 0
        else:
            self._recordings[call.key] = recording
        return recording

    def _record(self, call: Call) -> _Recording | None:
        """Record a run; None where the engine cannot be recorded."""
        context = self._new_context()
        scratch = self._set_shapes(context, call)
        shapes = {**call.inputs, **call.outputs}
        sizes = {
            name: math.prod(shape) * self._dtypes[name].itemsize for name, shape in shapes.items()
        }
        offsets, total = lay_out({**sizes, None: scratch})
        memory = self._arena.reserve(total)
        tensors = {
            name: memory[offsets[name] : offsets[name] + size]
            .view(self._dtypes[name])
            .view(shapes[name])
            for name, size in sizes.items()
        }
        inputs = {name: tensors[name].zero_() for name in call.inputs}  # token ids must be valid
        self._bind(context, tensors, memory[offsets[None] :], scratch)
        # A run after its shapes are set does work that is not to be recorded.
        with self._cuda.execution() as stream:
            self._execute(context, stream)
            recordable = getattr(context, "is_stream_capturable", None)
            if recordable is not None and not recordable(stream):
                _log.warning("%s cannot be recorded: %s", self._segment, self._library.errors())
                return None
        self._cuda.synchronize()
        try:
            replay = self._cuda.record(lambda stream: self._execute(context, stream))
        except (RuntimeError, ExecutionError) as error:
            _log.warning("%s cannot be recorded: %s", self._segment, error)
            return None
        outputs = {name: tensors[name] for name in call.outputs}
        return _Recording(context, inputs, outputs, replay)

    def _new_context(self) -> Any:
        trt = self._library.trt
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            # Lazily, kernels would be swapped some time later: equal runs would differ in bits,
            # and a recording would keep the slow ones.
            config.dynamic_shapes_kernel_specialization_strategy = (
                trt.DynamicShapesKernelSpecializationStrategy.EAGER
            )
        context = self._engine.create_execution_context(config)
        if context is None:
            raise self._failure("no execution context")
        return context

    def _set_shapes(self, context: Any, call: Call) -> int:
        """Tell TensorRT the shapes; returns the bytes of scratch that it needs for them."""
        for name, shape in call.inputs.items():
            if not context.set_input_shape(name, shape):
                raise self._failure(f"no shape {shape} for {name!r}")
        return int(context.update_device_memory_size_for_shapes())

    def _bind(
        self, context: Any, tensors: Mapping[str, Tensor], scratch: Tensor, size: int
    ) -> None:
        for name, tensor in tensors.items():
            if not context.set_tensor_address(name, tensor.data_ptr()):
                raise self._failure(f"no address for {name!r}")
        if size:
            context.set_device_memory(scratch.data_ptr(), size)

    def _execute(self, context: Any, stream: int) -> None:
        if not context.execute_async_v3(stream):
            raise self._failure("no run")

    def _failure(self, what: str) -> ExecutionError:
        return execution_error(f"{self._segment}: {what}: {self._library.errors()}")


def _replay(recording: _Recording, call: Call, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name, tensor in recording.inputs.items():
        if name in call.zeros:
            tensor.zero_()
        else:
            tensor.copy_(feeds[name])
    recording.replay()
    return {name: tensor.clone() for name, tensor in recording.outputs.items()}
