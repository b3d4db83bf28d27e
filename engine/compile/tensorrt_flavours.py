"""The two TensorRTs as data, and the one place that imports either.

TensorRT tunes its kernels on the GPU that it builds for. TensorRT for RTX compiles ahead of time,
also on a machine without a GPU, and finishes when an engine is opened. Their Python APIs are the
same; an engine is read by the flavour and release that built it, and by no other.

Sources: NVIDIA's support matrices of TensorRT and of TensorRT-RTX, and the members of
``ComputeCapability`` in ``tensorrt_rtx_bindings`` 1.7.1.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from engine.errors import BackendUnavailableError, UnsupportedError

_log = logging.getLogger(__name__)

_TURING = "RTX 20, T4"
_AMPERE_DATA_CENTER = "A100, A30"
_AMPERE = "RTX 30, A10, A40"
_ADA = "RTX 40, L4, L40S"
_HOPPER = "H100, H200, GH200"
_BLACKWELL = "RTX 50, RTX PRO Blackwell"


@dataclass(frozen=True, kw_only=True)
class Flavour:
    """What one TensorRT is called, and what it can do.

    Attributes:
        name: in plans and messages.
        modules: import names, in the order in which they are tried.
        install: what to type where it is missing.
        ahead_of_time: builds for a GPU that the building machine lacks.
        gpus: the compute capabilities that it covers, with GPUs that have them.
        lacks: compute capabilities on which a precision is missing.
        smallest_rank: of low-rank factors in a profile. TensorRT-RTX builds with rank 0; where
            that is not known to hold, rank 1 with zero factors replaces it.
    """

    name: str
    modules: tuple[str, ...]
    install: str
    ahead_of_time: bool
    gpus: Mapping[str, str]
    lacks: Mapping[str, tuple[str, ...]]
    smallest_rank: int

    def covered(self) -> str:
        """Its GPUs in words, for messages and documentation."""
        return f"{self.name} covers " + "; ".join(f"{c} ({g})" for c, g in self.gpus.items())


FLAVOURS = {
    flavour.name: flavour
    for flavour in (
        Flavour(
            name="tensorrt",
            modules=("tensorrt",),
            install="pip install tensorrt",
            ahead_of_time=False,
            gpus={
                "7.5": _TURING,
                "8.0": _AMPERE_DATA_CENTER,
                "8.6": _AMPERE,
                "8.9": _ADA,
                "9.0": _HOPPER,
                "10.0": "B200, GB200",
                "10.3": "B300, GB300",
                "12.0": _BLACKWELL,
            },
            lacks={"bf16": ("7.5",)},
            smallest_rank=1,
        ),
        Flavour(
            name="tensorrt_rtx",
            modules=("tensorrt_rtx", "tensorrt_rtx_bindings"),
            install="pip install 'darkroom[tensorrt]'",
            ahead_of_time=True,
            gpus={
                "7.5": _TURING,
                "8.0": _AMPERE_DATA_CENTER,
                "8.6": _AMPERE,
                "8.9": _ADA,
                "12.0": _BLACKWELL,
                "12.1": "GB10 (DGX Spark)",
            },
            lacks={"bf16": ("7.5",), "int8": ("7.5",)},
            smallest_rank=0,
        ),
    )
}
"""By name, in the order of preference: kernels tuned on the GPU itself come first."""


@dataclass(frozen=True)
class Library:
    """An imported flavour.

    Attributes:
        trt: its module.
        logger: the logger that all its objects of this process share, as TensorRT demands.
    """

    flavour: Flavour
    trt: Any
    logger: Any
    _errors: deque[str] = field(repr=False)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    """Held around a build, so that the errors of two builds do not mix."""

    @property
    def version(self) -> str:
        """Release of the library: an engine is read by this one only."""
        return str(self.trt.__version__)

    def errors(self) -> str:
        """What the library has complained of since the last call, on one line."""
        found = [self._errors.popleft() for _ in range(len(self._errors))]
        return "; ".join(" ".join(text.split()) for text in found) or "it gives no reason"


def gpu_capability() -> str | None:
    """Compute capability of this machine's current GPU, e.g. ``8.9``; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    return "{}.{}".format(*torch.cuda.get_device_capability())


def choose_library(capability: str, name: str | None = None) -> Library:
    """An installed flavour that can build for GPUs of ``capability``.

    Raises:
        UnsupportedError: no flavour covers such GPUs; lists those that are covered.
        BackendUnavailableError: none that covers them is installed, or can build here; says what
            to do.
    """
    if name is not None and name not in FLAVOURS:
        raise UnsupportedError(f"no TensorRT is called {name!r}; there are: {', '.join(FLAVOURS)}")
    asked = [flavour for flavour in FLAVOURS.values() if name in (None, flavour.name)]
    covering = [flavour for flavour in asked if capability in flavour.gpus]
    if not covering:
        raise UnsupportedError(
            f"compute capability {capability} is not covered:"
            f" {', and '.join(flavour.covered() for flavour in asked)}"
        )
    here = gpu_capability()
    able = [flavour for flavour in covering if flavour.ahead_of_time or capability == here]
    if not able:
        raise BackendUnavailableError(
            f"{covering[0].name} builds on the GPU itself: build on a machine with one of compute"
            f" capability {capability} ({covering[0].gpus[capability]})"
        )
    for flavour in able:
        if any(find_spec(module) for module in flavour.modules):
            return load_library(flavour.name)
    raise BackendUnavailableError(
        f"engines for compute capability {capability} need"
        f" {' or '.join(f'{flavour.name} ({flavour.install})' for flavour in able)}"
    )


@cache
def load_library(name: str) -> Library:
    """Import a flavour.

    Raises:
        BackendUnavailableError: it is not installed, or cannot be loaded; says what to install.
    """
    flavour = FLAVOURS[name]
    module = next((module for module in flavour.modules if find_spec(module)), None)
    if module is None:
        raise BackendUnavailableError(f"{name} is not installed: {flavour.install}")
    try:
        trt = import_module(module)
    except (ImportError, OSError) as error:
        raise BackendUnavailableError(
            f"{name} is installed but cannot be loaded ({error}): {flavour.install}"
        ) from error
    errors: deque[str] = deque(maxlen=8)
    return Library(flavour, trt, _make_logger(trt, errors), errors)


def _make_logger(trt: Any, errors: deque[str]) -> Any:
    severity = trt.ILogger.Severity
    levels = {severity.WARNING: logging.INFO, severity.INFO: logging.DEBUG}

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Errors are kept, to end up in exceptions; the rest goes to Python's logging."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity_: Any, text: str) -> None:
            if severity_ in (severity.INTERNAL_ERROR, severity.ERROR):
                errors.append(text)
            elif severity_ in levels:
                _log.log(levels[severity_], "%s", text)

    return Logger()
