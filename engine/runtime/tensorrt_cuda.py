"""The few things that the TensorRT runtime asks of CUDA, through torch.

Apart, so that everything else about running an engine is tested on machines without a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from engine.errors import BackendUnavailableError


class Cuda:
    """One CUDA device, as torch sees it.

    Raises:
        BackendUnavailableError: torch has no such device.
    """

    def __init__(self, device: str) -> None:
        found = torch.device(device)
        if found.type != "cuda" or not torch.cuda.is_available():
            raise BackendUnavailableError(
                f"the tensorrt runtime needs an NVIDIA GPU and a torch that can use it; {device!r}"
                " is none here: install a CUDA build of torch, or use the onnxruntime backend"
            )
        index = torch.cuda.current_device() if found.index is None else found.index
        if index >= torch.cuda.device_count():
            raise BackendUnavailableError(
                f"there is no {device}: this machine has {torch.cuda.device_count()} GPUs"
            )
        self.device = torch.device("cuda", index)
        self._side = torch.cuda.Stream(self.device)

    def capability(self) -> str:
        """Compute capability of the device, e.g. ``8.9``."""
        return "{}.{}".format(*torch.cuda.get_device_capability(self.device))

    def use(self) -> torch.cuda.device:
        """Make the device the current one inside a ``with`` block."""
        return torch.cuda.device(self.device)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory on the device, its content undefined."""
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Zeros on the device."""
        return torch.zeros(tuple(shape), dtype=dtype, device=self.device)

    def event(self) -> torch.cuda.Event:
        """A mark in a stream; waiting for one that was never recorded is no wait."""
        return torch.cuda.Event()

    def synchronize(self) -> None:
        """Wait for everything on the device."""
        torch.cuda.synchronize(self.device)

    @contextmanager
    def turn(self, lock: threading.Lock, done: torch.cuda.Event) -> Iterator[None]:
        """Let blocks with the same lock and event run one after the other, on host and device.

        The streams of the blocks may differ: a block's device work begins when that of the one
        before has ended.
        """
        with lock, self.use():
            stream = torch.cuda.current_stream()
            stream.wait_event(done)
            try:
                yield
            finally:
                done.record(stream)

    @contextmanager
    def execution(self) -> Iterator[int]:
        """A stream for TensorRT, in line with torch's current one: its handle.

        On the default stream TensorRT would synchronize the whole device at every run, so another
        one stands in for it.
        """
        current = torch.cuda.current_stream()
        if current != torch.cuda.default_stream():
            yield current.cuda_stream
            return
        self._side.wait_stream(current)
        try:
            yield self._side.cuda_stream
        finally:
            current.wait_stream(self._side)

    def record(self, body: Callable[[int], None]) -> Callable[[], None]:
        """Record what ``body`` launches on the stream that it is given, as a CUDA graph.

        Nothing may be allocated in ``body``. The result launches it all again, on torch's current
        stream.

        Raises:
            RuntimeError: something in ``body`` cannot be recorded.
        """
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread may allocate meanwhile, as the decoder's does.
        with torch.cuda.graph(graph, stream=self._side, capture_error_mode="thread_local"):
            body(self._side.cuda_stream)
        return graph.replay
