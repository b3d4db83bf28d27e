"""What a person may choose of how a plan runs; each choice checked against the others."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from engine.errors import InvalidRequestError
from engine.runtime import Runtime, open_runtime

PROVIDERS = {"cpu": ("cpu",), "cuda": ("cuda", "tensorrt")}
"""ONNX Runtime's execution providers by the device that they run on; the first is the default."""

_DEVICE = re.compile(r"cpu|cuda(:\d{1,3})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeChoices:
    """Which runtime is wanted, where, and with which of its switches.

    Whether the device and the libraries are here is found out by :meth:`open`.

    Attributes:
        device: ``cpu``, ``cuda`` or ``cuda:N``; None: ``cuda`` for ``tensorrt``, which has no
            other, else ``cpu``.
        compile: for ``torch``: compile every segment with inductor, for each shape that comes. That
            takes a minute or more each, so by default it is off everywhere.
        cuda_graphs: for ``torch`` and ``tensorrt`` on CUDA: record every segment once for each
            shape and replay the recording. None: on for ``tensorrt``; off for ``torch``, where
            nobody has measured it on a GPU yet.
        provider: for ``onnxruntime``: ``cpu``, ``cuda`` or ``tensorrt``; None: the device's own.

    Raises:
        InvalidRequestError: a choice that the backend or the device does not have; says which do.
    """

    backend: str = "onnxruntime"
    device: str | None = None
    compile: bool | None = None
    cuda_graphs: bool | None = None
    provider: str | None = None

    def __post_init__(self) -> None:
        if not _DEVICE.fullmatch(self.place):
            _refuse("device", f"device is {self.place!r}; allowed: cpu, cuda, cuda:N")
        if self.backend == "tensorrt" and self._kind == "cpu":
            _refuse("device", "backend tensorrt runs on cuda; on cpu run onnxruntime and torch")
        if self.compile and self.backend != "torch":
            _refuse("compile", f"compile goes with backend torch, not {self.backend}")
        if self.cuda_graphs and self.backend not in ("torch", "tensorrt"):
            _refuse(
                "cuda_graphs",
                f"cuda_graphs goes with backend torch or tensorrt, not {self.backend}",
            )
        if self.cuda_graphs and self._kind == "cpu":
            _refuse("cuda_graphs", "cuda_graphs needs device cuda; on cpu leave it out")
        if self.provider is not None:
            self._check_provider(self.provider)

    @property
    def place(self) -> str:
        """The device, as chosen or as it follows from the backend."""
        return self.device or ("cuda" if self.backend == "tensorrt" else "cpu")

    @property
    def options(self) -> dict[str, Any]:
        """What the runtime's constructor takes beside device and threads."""
        match self.backend:
            case "torch":
                return {"compile": bool(self.compile), "cuda_graphs": bool(self.cuda_graphs)}
            case "tensorrt":
                return {"recordings": 0} if self.cuda_graphs is False else {}
            case "onnxruntime":
                return {"tensorrt": self.provider == "tensorrt"}
            case _:
                return {}

    def open(self, *, threads: int) -> Runtime:
        """The runtime.

        Raises:
            UnsupportedError: there is no such backend.
            BackendUnavailableError: it, its device or its provider is not here; says what to do.
        """
        return open_runtime(self.backend, device=self.place, threads=threads, **self.options)

    @property
    def _kind(self) -> str:
        return self.place.partition(":")[0]

    def _check_provider(self, provider: str) -> None:
        if self.backend != "onnxruntime":
            _refuse("provider", f"provider goes with backend onnxruntime, not {self.backend}")
        allowed = PROVIDERS[self._kind]
        if provider not in allowed:
            _refuse(
                "provider",
                f"provider is {provider!r}; allowed on {self._kind}: {', '.join(allowed)}",
            )


def _refuse(field: str, message: str) -> None:
    raise InvalidRequestError(message, field=field)
