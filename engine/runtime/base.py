"""The runtime seam: how one graph of a plan is run, and nothing else.

A runtime knows no UNet, prompt, guidance or schedule. It opens graphs and runs them on torch
tensors that live on its ``device``; ``tests/contracts/test_runtime.py`` runs one contract against
every implementation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch

    from engine.compile.manifest import PlanManifest, SegmentSpec


class Graph(ABC):
    """One opened graph."""

    def __init__(self, spec: SegmentSpec) -> None:
        self.spec = spec

    @abstractmethod
    def run(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run once.

        Args:
            feeds: by ``TensorSpec.name``: every input that is not optional, on the runtime's
                device and of the spec's dtype. The caller keeps ownership and does not write to
                them during the call.

        Returns:
            By ``TensorSpec.name``, every output. The tensors belong to the caller: a later run
            never writes to them.

        Raises:
            ExecutionError: the backend failed; the message names the segment.
        """

    @abstractmethod
    def close(self) -> None:
        """Free what the graph holds. Closing twice is harmless."""


class Runtime(ABC):
    """Opens graphs on one device."""

    name: ClassVar[str]

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

    def close(self) -> None:
        """Free what the graphs share. Call after closing the graphs."""
