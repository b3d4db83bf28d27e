"""Runtimes by name. A runtime's own imports happen when it is opened, not before."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from engine.errors import BackendUnavailableError, UnsupportedError
from engine.runtime.base import Graph, Runtime

_RUNTIMES = {
    "onnxruntime": ("engine.runtime.onnxruntime", "OnnxRuntime", "darkroom[engine]"),
    "tensorrt": ("engine.runtime.tensorrt", "TensorRtRuntime", "darkroom[tensorrt]"),
    "torch": ("engine.runtime.torch", "TorchRuntime", "darkroom[compile]"),
}

RUNTIMES = tuple(_RUNTIMES)
"""Names that :func:`open_runtime` takes."""


def open_runtime(name: str, **config: Any) -> Runtime:
    """A runtime of that name; ``config`` goes to its constructor.

    Raises:
        UnsupportedError: there is no such runtime; lists those there are.
        BackendUnavailableError: it is not installed, or its device is not here; says what to do.
    """
    if name not in _RUNTIMES:
        raise UnsupportedError(f"no runtime {name!r}; there are: {', '.join(RUNTIMES)}")
    module, kind, extra = _RUNTIMES[name]
    try:
        factory = getattr(import_module(module), kind)
    except ImportError as error:
        raise BackendUnavailableError(
            f"the {name} runtime needs {error.name}: pip install '{extra}'"
        ) from error
    runtime: Runtime = factory(**config)
    return runtime


__all__ = ["RUNTIMES", "Graph", "Runtime", "open_runtime"]
