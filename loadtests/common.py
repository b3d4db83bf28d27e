"""What the benchmarks share: the plan under test, and the conditions printed over every table."""

from __future__ import annotations

import argparse
import platform
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from engine.checkpoint import Checkpoint
from engine.compile.manifest import PlanManifest, SegmentSpec
from engine.compile.plan import Plan, PlanStore
from engine.runtime.base import Graph, Runtime
from server.settings import Settings


def settings_with_threads(threads: int) -> Settings:
    """The environment's settings with another number of threads."""
    return replace(Settings.from_environment(), threads=threads)


def model_folder(settings: Settings, model: str) -> Path:
    """A model's folder, by name or as a path."""
    return Path(model) if (Path(model) / "model_index.json").exists() else settings.models / model


def open_plan(settings: Settings, model: str, backend: str, precision: str) -> Plan:
    """The plan of a model, built first where it is not there."""
    checkpoint = Checkpoint.open(model_folder(settings, model))
    return PlanStore(settings.plans).build(checkpoint, backend=backend, precision=precision)


class TimedRuntime(Runtime):
    """A runtime that adds up the seconds spent inside the UNet's graphs.

    What a tick takes beyond them is the loop's own overhead.
    """

    name = "timed"

    def __init__(self, inner: Runtime) -> None:
        self._inner = inner
        self.threads, self.row_sizes = inner.threads, inner.row_sizes
        self.graphs_s = 0.0

    @property
    def device(self) -> torch.device:
        """The inner runtime's device."""
        return self._inner.device

    def open(self, folder: Path, manifest: PlanManifest, segment: SegmentSpec) -> Graph:
        """Open the inner runtime's graph; those of the UNet timed (others run beside ticks)."""
        graph = self._inner.open(folder, manifest, segment)
        return _TimedGraph(graph, self) if segment in manifest.unet else graph

    def close(self) -> None:
        """Close the inner runtime."""
        self._inner.close()


class _TimedGraph(Graph):
    def __init__(self, inner: Graph, owner: TimedRuntime) -> None:
        super().__init__(inner.spec)
        self._inner = inner
        self._owner = owner

    @property
    def max_rows(self) -> int | None:
        return self._inner.max_rows

    def run(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        began_s = time.perf_counter()
        outputs = self._inner.run(feeds)
        self._owner.graphs_s += time.perf_counter() - began_s
        return outputs

    def close(self) -> None:
        self._inner.close()


def conditions(options: argparse.Namespace, *, hide: Sequence[str] = ()) -> str:
    """The machine and every option that is not hidden, for a table's title."""
    shown = {key: value for key, value in sorted(vars(options).items()) if key not in hide}
    given = ", ".join(f"{key} {value}" for key, value in shown.items())
    return f"{_processor()}, python {platform.python_version()}: {given}"


def peak_memory_mb() -> float:
    """Peak resident memory of this process, in MB (10⁶ bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
