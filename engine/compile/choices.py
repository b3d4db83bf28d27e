"""What a person may choose of a plan, in plain words; each choice checked against the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.errors import InvalidRequestError

if TYPE_CHECKING:
    from engine.checkpoint import Checkpoint
    from engine.compile.plan import Plan, PlanStore, Transform
    from engine.compile.tensorrt_profile import EngineTarget


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanChoices:
    """Which plan of a checkpoint is wanted.

    Attributes:
        capability: for ``tensorrt``, the compute capability of the GPUs that will run the engines,
            e.g. ``8.9``; None: that of this machine's GPU.
        min_snr_db: for ``int8``, the signal over quantization noise to keep, in dB; None: the
            default of :class:`engine.compile.quantize.Int8Config`.

    Raises:
        InvalidRequestError: a choice that the backend or the precision does not have.
    """

    backend: str = "onnxruntime"
    precision: str = "fp32"
    capability: str | None = None
    min_snr_db: float | None = None

    def __post_init__(self) -> None:
        if self.capability is not None and self.backend != "tensorrt":
            raise InvalidRequestError(
                f"{self.backend} plans run on every GPU; a compute capability goes with tensorrt",
                field="gpu",
            )
        if self.min_snr_db is not None and self.precision != "int8":
            raise InvalidRequestError(
                f"{self.precision} has no quantization noise; min_snr_db goes with int8",
                field="min_snr_db",
            )

    def build(
        self,
        store: PlanStore,
        checkpoint: Checkpoint,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Plan:
        """The plan, built where it is not in ``store``.

        Raises:
            InvalidRequestError, UnsupportedError, BackendUnavailableError, PlanError: what is
                wrong, and what could be chosen.
        """
        return store.build(
            checkpoint,
            backend=self.backend,
            precision=self.precision,
            transform=self._transform(),
            target=self._target(checkpoint),
            progress=progress,
        )

    def _transform(self) -> Transform | None:
        if self.min_snr_db is None:
            return None
        from engine.compile.quantize import Int8Config, int8_transform

        return int8_transform(self.backend, Int8Config(min_snr_db=self.min_snr_db))

    def _target(self, checkpoint: Checkpoint) -> EngineTarget | None:
        if self.capability is None:
            return None
        from engine.compile.tensorrt_profile import EngineTarget

        texts = checkpoint.text_encoders
        return EngineTarget.choose(
            checkpoint.model_spec(),
            max_tokens=max(part.config.integer("max_position_embeddings") for part in texts),
            precision=self.precision,
            capability=self.capability,
        )
