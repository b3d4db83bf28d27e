"""PyTorch: the reference on CPU; on CUDA channels-last, compiled and recorded if wanted."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import ClassVar, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from engine.checkpoint import Checkpoint
from engine.compile.build import CHECKPOINT, DTYPES
from engine.compile.export import GraphSource, export_text_encoder, export_unet, export_vae
from engine.compile.manifest import PlanManifest, SegmentSpec
from engine.errors import BackendUnavailableError, CheckpointError, ExecutionError, PlanCorruptError
from engine.runtime.base import COMMON_ROWS, Graph, Runtime, failure

_log = logging.getLogger(__name__)

_CAPTURING = threading.Lock()
"""Captures of one process share a stream: one at a time."""
_MAX_CAPTURES = 16
"""CUDA graphs kept for one segment; each holds the memory of its inputs."""

_Function = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
_P = ParamSpec("_P")
_R = TypeVar("_R")


class TorchRuntime(Runtime):
    """Rebuilds the modules of a plan and runs them.

    Args:
        device: any device of torch.
        threads: of the whole process, on CPU; None leaves them alone. With more than one, graphs
            run on a thread of the runtime's own, one at a time: see :class:`_Crew`.
        compile: compile each segment with inductor for each shape (a minute or more each).
        cuda_graphs: record each segment for each shape, and replay the recording; what cannot be
            recorded runs without, with a warning in the log.

    Raises:
        BackendUnavailableError: torch has no such device here.
    """

    name: ClassVar[str] = "torch"

    def __init__(
        self,
        device: str = "cpu",
        *,
        threads: int | None = None,
        compile: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        self._device = torch.device(device)
        if self._device.type == "cuda" and not torch.cuda.is_available():
            raise BackendUnavailableError(
                "torch finds no CUDA device; install a CUDA build of torch, or use device cpu"
            )
        if self._device.type == "cuda" and (self._device.index or 0) >= torch.cuda.device_count():
            raise BackendUnavailableError(
                f"there is no {device}; torch finds {torch.cuda.device_count()} CUDA device(s)"
            )
        if cuda_graphs and self._device.type != "cuda":
            raise BackendUnavailableError(f"CUDA graphs need a CUDA device, not {device}")
        if threads is not None and self._device.type == "cpu":
            torch.set_num_threads(threads)
        self.threads = torch.get_num_threads() if self._device.type == "cpu" else 1
        self._crew = _Crew(self.threads) if self.threads > 1 else None
        self._compile = compile
        self._cuda_graphs = cuda_graphs
        self.row_sizes = COMMON_ROWS if compile or cuda_graphs else ()
        self._lock = threading.Lock()
        self._parts: dict[tuple[Path, str], dict[str, GraphSource]] = {}

    @property
    def device(self) -> torch.device:
        """Where the tensors of ``Graph.run`` live."""
        return self._device

    def open(self, folder: Path, manifest: PlanManifest, segment: SegmentSpec) -> Graph:
        """Open one graph. Segments of one network share its weights."""
        if manifest.backend != self.name:
            raise BackendUnavailableError(
                f"the plan was built for {manifest.backend}; build it for {self.name}"
            )
        part = segment.name.partition(".")[0]
        key = folder, part if part in ("text", "vae") else "unet"
        with self._lock:
            if key not in self._parts:
                # Splitting a network runs it once: that, too, is the crew's work.
                load = self._load if self._crew is None else self._crew.hand(self._load)
                self._parts[key] = {s.name: s for s in load(*key, manifest)}
            module = self._parts[key][segment.name].module
        function: _Function = module
        if self._compile:
            function = torch.compile(module, dynamic=False, mode="max-autotune-no-cudagraphs")
        if self._cuda_graphs:
            function = _Recorded(segment.name, function)
        if self._device.type == "cuda":
            function = partial(_on, self._device, function)
        function = partial(_without_gradients, function)
        return TorchGraph(segment, function if self._crew is None else self._crew.hand(function))

    def close(self) -> None:
        """Let go of the modules, and of the thread."""
        with self._lock:
            self._parts.clear()
        if self._crew is not None:
            self._crew.close()

    def _load(self, folder: Path, part: str, manifest: PlanManifest) -> list[GraphSource]:
        dtype = DTYPES[manifest.precision]
        try:
            checkpoint = Checkpoint.open(folder / CHECKPOINT)
            match part:
                case "unet":
                    unet = checkpoint.load_unet(dtype)
                    sources = export_unet(unet, manifest.cuts, manifest.taps)
                case "vae":
                    vae_dtype = torch.float32 if checkpoint.vae_needs_fp32 else dtype
                    sources = [*export_vae(checkpoint.load_vae(vae_dtype))]
                case _:
                    encoders = checkpoint.load_text_encoders(dtype)
                    sources = [export_text_encoder(e, f"text.{i}") for i, e in enumerate(encoders)]
        except CheckpointError as error:
            raise PlanCorruptError(f"plan {manifest.digest[:12]}: {error}") from error
        for source in sources:
            _place(source.module, self._device)
        return sources


class _Crew:
    """One thread that runs every graph, so that graphs share one team of OpenMP threads.

    OpenMP keeps a team for each thread that ever ran a parallel loop. With two such threads (this
    one, and whoever split the network, say) two teams of N share N cores; they then sleep instead
    of spin between loops, and a small UNet has thousands of these: it ran half as fast. The loop
    and the decoder have no team (:func:`engine.threads.compute_alone`); whatever else uses torch in
    the process brings one.
    """

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix="darkroom-torch",
            initializer=torch.set_num_threads,
            initargs=(threads,),
        )

    def hand(self, function: Callable[_P, _R]) -> Callable[_P, _R]:
        """``function``, run on the crew's thread."""

        def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            return self._pool.submit(function, *args, **kwargs).result()

        return run

    def close(self) -> None:
        """Wait for what runs, and end the thread. Closing twice is harmless."""
        self._pool.shutdown()


def _without_gradients(function: _Function, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():  # holds for the thread that it is entered on
        return function(feeds)


class TorchGraph(Graph):
    """One segment as a torch function."""

    def __init__(self, spec: SegmentSpec, function: _Function) -> None:
        super().__init__(spec)
        self._function: _Function | None = function
        # Low-rank factors pass through the module while it runs: one run at a time.
        self._lock = threading.Lock()

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run once; see :meth:`Graph.run`."""
        self.check(feeds)
        with self._lock:
            if self._function is None:
                raise ExecutionError(f"{self.spec.name} is closed")
            try:
                return self._function(feeds)
            except (RuntimeError, ValueError, KeyError, MemoryError) as error:
                raise failure(self.spec.name, error) from error

    def close(self) -> None:
        """Let go of the function."""
        with self._lock:
            self._function = None


def _place(module: nn.Module, device: torch.device) -> None:
    module.eval().requires_grad_(False).to(device)
    if device.type == "cuda":
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _on(
    device: torch.device, function: _Function, feeds: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Run with streams and recordings of ``device``, which may not be torch's current one."""
    with torch.cuda.device(device):
        return function(feeds)


class _Recorded:
    """A function on CUDA tensors, recorded once for each set of shapes and then replayed.

    A segment that cannot be recorded runs as it is from then on, with a warning in the log.
    """

    def __init__(self, segment: str, function: _Function) -> None:
        self._segment = segment
        self._function = function
        self._recordable = True
        self._recordings: OrderedDict[object, _Recording] = OrderedDict()

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        key = tuple((name, tensor.shape) for name, tensor in sorted(feeds.items()))
        if key not in self._recordings and self._recordable:
            self._record(key, feeds)
        if key not in self._recordings:
            return self._function(feeds)
        self._recordings.move_to_end(key)
        return self._recordings[key].replay(feeds)

    def _record(self, key: object, feeds: Mapping[str, Tensor]) -> None:
        recording = _Recording(self._function, feeds)
        try:
            recording.capture()
        except torch.OutOfMemoryError:
            raise  # a smaller batch may fit
        except RuntimeError as error:
            _log.warning("%s cannot be recorded: %s", self._segment, error)
            self._recordable = False
            return
        self._recordings[key] = recording
        if len(self._recordings) > _MAX_CAPTURES:
            self._recordings.popitem(last=False)


class _Recording:
    """One CUDA graph with the tensors that it reads and writes. Runs the function a few times."""

    def __init__(self, function: _Function, feeds: Mapping[str, Tensor]) -> None:
        self._function = function
        self._inputs = {name: tensor.clone() for name, tensor in feeds.items()}
        self._outputs: dict[str, Tensor] = {}
        # Libraries choose kernels and allocate workspaces on first use, which must not be recorded.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                function(self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()

    def capture(self) -> None:
        """Record one run.

        Raises:
            RuntimeError: something in it cannot be recorded, or does not fit into the memory.
        """
        stream = torch.cuda.current_stream()
        try:
            # thread_local: another thread may allocate meanwhile, as the decoder's does.
            with _CAPTURING, torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._outputs = self._function(self._inputs)
        except BaseException:
            # A capture that failed leaves its thread on the stream of the capture.
            torch.cuda.set_stream(stream)
            raise

    def replay(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies go in, so that the caller's tensors may move; and out, so that they stay."""
        for name, tensor in feeds.items():
            self._inputs[name].copy_(tensor)
        self._graph.replay()
        return {name: tensor.clone() for name, tensor in self._outputs.items()}
