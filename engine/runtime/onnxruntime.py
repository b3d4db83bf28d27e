"""ONNX Runtime: on CPU, and on GPUs through its CUDA and TensorRT execution providers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import onnxruntime
import torch
from onnxruntime.capi import _pybind_state as native
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from engine.compile.manifest import PlanManifest, SegmentSpec
from engine.errors import BackendUnavailableError, ExecutionError, PlanCorruptError
from engine.runtime.base import Graph, Runtime, failure

_log = logging.getLogger(__name__)

_PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}


class OnnxRuntime(Runtime):
    """Runs ONNX graphs.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        threads: for one graph; graphs that run at once share them. A process has one pool: the
            first runtime with several threads sets its size for all that come after.
        tensorrt: prefer ONNX Runtime's TensorRT provider to its CUDA one.

    Raises:
        BackendUnavailableError: this build of ONNX Runtime lacks the provider.
    """

    name: ClassVar[str] = "onnxruntime"

    def __init__(self, device: str = "cpu", *, threads: int = 1, tensorrt: bool = False) -> None:
        self._device = torch.device(device)
        kind = "tensorrt" if tensorrt else self._device.type
        if kind not in _PROVIDERS:
            raise BackendUnavailableError(f"onnxruntime runs on cpu and cuda, not on {device}")
        wanted, present = _PROVIDERS[kind], onnxruntime.get_available_providers()
        if wanted[0] not in present:
            raise BackendUnavailableError(
                f"this onnxruntime has no {wanted[0]} (it has: {', '.join(present)});"
                " pip install onnxruntime-gpu in its place"
            )
        self._providers = [(name, self._provider_options(name)) for name in wanted]
        self.threads = _share_threads(threads)
        if kind == "cpu":
            _share_arena()

    @property
    def device(self) -> torch.device:
        """Where the tensors of ``Graph.run`` live."""
        return self._device

    def open(self, folder: Path, manifest: PlanManifest, segment: SegmentSpec) -> Graph:
        """Open one graph; its variant with adapters is opened when first needed."""
        if manifest.backend != self.name:
            raise BackendUnavailableError(
                f"the plan was built for {manifest.backend}; build it for {self.name}"
            )
        return OnnxGraph(self, folder, segment)

    def session(self, path: Path) -> onnxruntime.InferenceSession:
        """A session on the shared threads and memory.

        Raises:
            PlanCorruptError: the file is no graph that this version can run.
        """
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; warnings speak of optimisations
        set_threads(options, self.threads)
        # Idle threads that spin take the cores from whatever runs between two graphs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self._device.type == "cpu":
            options.add_session_config_entry("session.use_env_allocators", "1")
        try:
            return onnxruntime.InferenceSession(str(path), options, providers=self._providers)
        except Exception as error:  # its exceptions share no base class
            raise PlanCorruptError(f"{path.name} cannot be opened: {error}") from error

    def _provider_options(self, provider: str) -> dict[str, str]:
        if provider == "CPUExecutionProvider":
            return {}
        options = {"device_id": str(self._device.index or 0)}
        if provider == "CUDAExecutionProvider":
            # On torch's own stream, so that neither has to wait for the other on the host.
            options["user_compute_stream"] = str(torch.cuda.current_stream().cuda_stream)
        return options


class OnnxGraph(Graph):
    """One graph, or two: without low-rank inputs, and with them."""

    def __init__(self, runtime: OnnxRuntime, folder: Path, spec: SegmentSpec) -> None:
        super().__init__(spec)
        self._runtime = runtime
        self._outputs = [output.name for output in spec.outputs]
        self._adapters_path = folder / spec.adapters_file if spec.adapters_file else None
        self._lock = threading.Lock()
        self._closed = False
        self._adapters: onnxruntime.InferenceSession | None = None
        self._plain: onnxruntime.InferenceSession | None = runtime.session(folder / spec.file)

    def run(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run once; see :meth:`Graph.run`."""
        self.check(feeds)
        session = self._with_adapters() if self.adapted(feeds) else self._plain
        if session is None:
            raise ExecutionError(f"{self.spec.name} is closed")
        try:
            return _run(session, self._runtime.device, self._outputs, feeds)
        except Exception as error:  # its exceptions share no base class
            raise failure(self.spec.name, error) from error

    def close(self) -> None:
        """Free the sessions."""
        with self._lock:
            self._closed = True
            self._plain = self._adapters = None

    def _with_adapters(self) -> onnxruntime.InferenceSession | None:
        with self._lock:
            if self._adapters is None and self._adapters_path is not None and not self._closed:
                self._adapters = self._runtime.session(self._adapters_path)
            return self._adapters


def _run(
    session: onnxruntime.InferenceSession,
    device: torch.device,
    outputs: Sequence[str],
    feeds: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """One run without copies: tensors go in and come out as views of one memory."""
    binding = session.io_binding()
    held = []  # inputs must live until the run is over
    for name, tensor in feeds.items():
        # As capsules both ways: between two tensor objects, more time goes into the protocol.
        value = onnxruntime.OrtValue.from_dlpack(to_dlpack(tensor.detach().contiguous()))
        held.append(value)
        binding.bind_ortvalue_input(name, value)
    for name in outputs:
        binding.bind_output(name, device.type, device.index or 0)
    session.run_with_iobinding(binding)
    return {
        name: from_dlpack(value.__dlpack__())
        for name, value in zip(outputs, binding.get_outputs(), strict=True)
    }


# ---------------------------------------------------------------- one pool, one arena per process

_shared = threading.Lock()
_pool_threads: int | None = None
_arena_made = False


def set_threads(options: onnxruntime.SessionOptions, threads: int) -> None:
    """Give a session the process's pool where there is one: it must use it, and takes its size.

    To be asked for each session anew, since a pool may have been made since the last.
    """
    options.use_per_session_threads = _pool_threads is None
    if _pool_threads is None:
        options.inter_op_num_threads = 1
        options.intra_op_num_threads = threads


def _share_threads(threads: int) -> int:
    """Make the process's one pool of graph threads, if it is not there; returns its size.

    With a pool for each session, the threads of seven segments would fight for the cores. One
    thread needs no pool.
    """
    global _pool_threads
    with _shared:
        if _pool_threads is None and threads > 1:
            onnxruntime.set_global_thread_pool_sizes(threads, 1)
            _pool_threads = threads
        # A single thread is a floor, not a wish: whoever asks for it is well served by more.
        if threads > 1 and _pool_threads != threads:
            _log.warning(
                "this process runs graphs on %d threads already; %d were asked for",
                _pool_threads,
                threads,
            )
        return _pool_threads or threads


def _share_arena() -> None:
    """One arena for all sessions of the process, grown by what is asked for.

    By default each session keeps an arena of its own, grown in powers of two: with a session per
    segment that is several times the memory of the largest one.
    """
    global _arena_made
    with _shared:
        if _arena_made:
            return
        kind = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
        place = onnxruntime.OrtMemoryInfo("Cpu", kind, 0, onnxruntime.OrtMemType.DEFAULT)
        growth: Any = {"max_mem": 0, "arena_extend_strategy": 1}
        native.create_and_register_allocator(place, onnxruntime.OrtArenaCfg(growth))
        _arena_made = True
