"""What is measured during a soak: every process of the service, and the service's own gauges."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import requests

from loadtests.traffic.scrape import sum_samples

GAUGES = (
    "darkroom_event_loop_tasks",
    "darkroom_http_requests_in_flight",
    "darkroom_jobs",
    "darkroom_live_tasks",
    "darkroom_router_queued",
    "darkroom_router_running",
)
"""What must be back where it was once the load has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSample:
    """One process at one time. Memory in MB (10⁶ bytes), of its own pages alone (USS).

    Shared pages would count in part by PSS, and in smaller parts as soon as anything else on the
    machine loads the same libraries: steps that say nothing of the process.
    """

    at_s: float
    name: str
    memory_mb: float
    open_files: int
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """All processes and gauges at one time."""

    at_s: float
    processes: Sequence[ProcessSample]
    gauges: Mapping[str, float]

    def line(self) -> str:
        """As a line of JSON."""
        return json.dumps(asdict(self))


class Sampler:
    """Looks at a server and all that it has started.

    Args:
        kind: what a process is, from its command line.
    """

    def __init__(
        self, root: psutil.Process, base: str, kind: Callable[[Sequence[str]], str]
    ) -> None:
        self._root = root
        self._url = f"{base}/metrics"
        self._kind = kind
        self._began_s = time.perf_counter()

    def take(self) -> Sample:
        """One sample, without processes that end meanwhile and gauges that nobody answers for."""
        at_s = time.perf_counter() - self._began_s
        found = []
        for process in [self._root, *self._root.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                found.append(self._process(process, at_s))
        return Sample(at_s=at_s, processes=found, gauges=self._gauges())

    def _process(self, process: psutil.Process, at_s: float) -> ProcessSample:
        kind = self._kind(process.cmdline())
        with process.oneshot():
            return ProcessSample(
                at_s=at_s,
                name=f"{kind} {process.pid}",
                memory_mb=process.memory_full_info().uss / 1e6,
                open_files=process.num_fds(),
                threads=process.num_threads(),
            )

    def _gauges(self) -> dict[str, float]:
        try:
            response = requests.get(self._url, timeout=4)
            response.raise_for_status()
        except requests.RequestException:
            return {}
        sums = sum_samples(response.text)
        return {name: sums[name] for name in GAUGES if name in sums}


def read_samples(path: Path) -> list[Sample]:
    """What was written line by line."""
    samples = []
    for line in path.read_text().splitlines():
        content = json.loads(line)
        processes = [ProcessSample(**process) for process in content["processes"]]
        samples.append(Sample(at_s=content["at_s"], processes=processes, gauges=content["gauges"]))
    return samples
