"""The section ``models`` of the configuration, and what every section is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from engine.runtime.choices import RuntimeChoices

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
"""Models, tenants and adapters are ids, never paths."""
Positive = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """Base of every section: frozen, and nothing unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(Section):
    """One model to serve."""

    id: Name
    path: Path | None = None
    """A folder in Diffusers layout; by default the folder of that name in the models folder."""
    precision: Literal["fp32", "fp16", "bf16", "int8"] = "fp32"
    backend: Literal["onnxruntime", "torch", "tensorrt"] = "onnxruntime"
    aliases: tuple[Name, ...] = ()
    """Other ids under which clients may ask for it (``dall-e-2``, ``gpt-image-1``, …)."""
    int8_min_snr_db: Annotated[float, Field(ge=0, le=100)] | None = None
    """The dial of int8 (``darkroom compile --min-snr-db``); by default 30."""
    compile: bool | None = None
    """With ``torch``: compile with inductor, a minute or more for each shape; by default off."""
    cuda_graphs: bool | None = None
    """With ``torch`` or ``tensorrt`` on CUDA: record each shape and replay it; by default on with
    ``tensorrt``, off with ``torch``."""
    provider: Literal["cpu", "cuda", "tensorrt"] | None = None
    """With ``onnxruntime``: its execution provider; by default the device's own."""

    @model_validator(mode="after")
    def _dial_has_int8(self) -> ModelConfig:
        if self.int8_min_snr_db is not None and self.precision != "int8":
            raise ValueError(f"int8_min_snr_db goes with precision int8, not {self.precision}")
        return self

    def runtime(self, device: str) -> RuntimeChoices:
        """How the model's plan runs on ``device``.

        Raises:
            InvalidRequestError: backend, device and switches do not go together.
        """
        return RuntimeChoices(
            backend=self.backend,
            device=device,
            compile=self.compile,
            cuda_graphs=self.cuda_graphs,
            provider=self.provider,
        )
