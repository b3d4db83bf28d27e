"""The runtime seam: how one graph of a plan is run, and nothing else.

A runtime knows no UNet, prompt, guidance or schedule. It opens graphs and runs them on torch
tensors that live on its ``device``; ``tests/contracts/test_runtime.py`` runs one contract against
every implementation.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from engine.errors import ExecutionError, OutOfMemoryError

if TYPE_CHECKING:
    import torch

    from engine.compile.manifest import PlanManifest, SegmentSpec


COMMON_ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32)
"""``Runtime.row_sizes`` of those that prepare for each: a third of a batch is padding at most."""

_OUT_OF_MEMORY = re.compile(
    r"out of (?:\w+ )?memory|not enough memory|can't allocate memory|bad.?alloc"
    r"|failed to allocate|ALLOC_FAILED|smaller than requested bytes",
    re.IGNORECASE,
)


def failure(segment: str, error: Exception) -> ExecutionError:
    """A backend's exception as ours, naming the segment."""
    message = f"{segment} failed: {error}"
    return OutOfMemoryError(message) if isinstance(error, MemoryError) else execution_error(message)


def execution_error(message: str) -> ExecutionError:
    """Tell running out of memory apart, because a smaller batch may succeed.

    Backends tell it only by their message.
    """
    kind = OutOfMemoryError if _OUT_OF_MEMORY.search(message) else ExecutionError
    return kind(message)


class Graph(ABC):
    """One opened graph."""

    def __init__(self, spec: SegmentSpec) -> None:
        self.spec = spec
        self._known = {port.name: port for port in (*spec.inputs, *spec.factors)}
        self._required = [port.name for port in spec.inputs if not port.optional]
        self._factors = {port.name for port in spec.factors}

    def check(self, feeds: Mapping[str, torch.Tensor]) -> None:
        """Hold ``feeds`` against the spec, the same way for every runtime.

        Raises:
            ExecutionError: naming an input that is missing, unknown, or of the wrong dtype.
        """
        for name in self._required:
            if name not in feeds:
                raise ExecutionError(f"{self.spec.name}: input {name!r} is missing")
        for name, tensor in feeds.items():
            port = self._known.get(name)
            if port is None:
                raise ExecutionError(f"{self.spec.name} has no input {name!r}")
            if str(tensor.dtype) != f"torch.{port.dtype}" or tensor.ndim != len(port.shape):
                raise ExecutionError(
                    f"{self.spec.name}: input {name!r} is {tensor.dtype} of shape"
                    f" {tuple(tensor.shape)}; it takes {port.dtype} {port.shape}"
                )

    @property
    def max_rows(self) -> int | None:
        """Largest batch that the graph takes; None for any."""
        return None

    def adapted(self, feeds: Mapping[str, torch.Tensor]) -> bool:
        """Whether ``feeds`` brings low-rank factors, so that the variant with them must run."""
        return not self._factors.isdisjoint(feeds)

    @abstractmethod
    def run(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run once.

        Args:
            feeds: by ``TensorSpec.name``: every input that is not optional, and any of the
                optional ones and of the factors (both factors of a site), on the runtime's device
                and of the spec's dtype. The caller keeps ownership and does not write to them
                during the call.

        Returns:
            By ``TensorSpec.name``, every output. The tensors belong to the caller: a later run
            never writes to them.

        Raises:
            ExecutionError: an input does not fit the spec, or the backend failed; the message
                names the segment.
            OutOfMemoryError: the batch does not fit into the device's memory.
        """

    @abstractmethod
    def close(self) -> None:
        """Free what the graph holds. Closing twice is harmless."""


class Runtime(ABC):
    """Opens graphs on one device."""

    name: ClassVar[str]
    threads: int = 1
    """CPU threads of one graph; part of what a time measurement holds for."""
    row_sizes: tuple[int, ...] = ()
    """Batches to pad to, ascending, where every new one costs a compilation or a recording."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the tensors of ``Graph.run`` live."""

    @abstractmethod
    def open(self, folder: Path, manifest: PlanManifest, segment: SegmentSpec) -> Graph:
        """Open one graph of the plan in ``folder``, whose files the caller has verified.

        Raises:
            PlanCorruptError: the backend cannot read the file.
            BackendUnavailableError: the plan needs something that this machine lacks.
        """

    def close(self) -> None:  # noqa: B027 - most runtimes share nothing
        """Free what the graphs share. Call after closing the graphs."""
