"""Bodies of the operator routes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from server.config import ModelConfig, Name
from server.request_log import Level
from server.schemas.base import Body


class LogLevel(Body):
    """How much is logged."""

    level: Annotated[Level, Field(examples=["debug"])]


class NewModel(Body):
    """A model to serve from now on."""

    id: Annotated[Name, Field(examples=["sketch"])]
    """What clients ask for."""
    path: Annotated[str | None, Field(max_length=4096, examples=["/models/sketch"])] = None
    """A folder in Diffusers layout that every worker can read; by default that of the id's name
    in the models folder."""
    precision: Literal["fp32", "fp16", "bf16", "int8"] = "fp32"
    backend: Literal["onnxruntime", "torch", "tensorrt"] = "onnxruntime"
    compile: bool | None = None
    """With `torch`: compile with inductor, a minute or more for each shape. By default off."""
    cuda_graphs: bool | None = None
    """With `torch` or `tensorrt` on CUDA: record each shape and replay it. By default on with
    `tensorrt`, off with `torch`."""
    provider: Literal["cpu", "cuda", "tensorrt"] | None = None
    """With `onnxruntime`: its execution provider, by default the device's own."""

    def config(self) -> ModelConfig:
        """The same as the configuration file would say it."""
        return ModelConfig(
            id=self.id,
            path=None if self.path is None else Path(self.path),
            precision=self.precision,
            backend=self.backend,
            compile=self.compile,
            cuda_graphs=self.cuda_graphs,
            provider=self.provider,
        )
