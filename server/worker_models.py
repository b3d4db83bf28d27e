"""From the configuration to open models: folders, plans, runtimes, and what clients may know."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import torch

from engine.checkpoint import Checkpoint
from engine.compile.choices import PlanChoices
from engine.compile.manifest import PlanManifest
from engine.compile.plan import Plan, PlanStore
from engine.compile.plan_files import MANIFEST
from engine.errors import InvalidRequestError
from engine.model import Model
from engine.runtime import Runtime
from engine.runtime.choices import RuntimeChoices
from engine.solvers import from_scheduler_config
from engine.text import max_clip_skip
from server.config import ModelConfig, ServeConfig
from server.messages import ModelInfo
from server.settings import Settings

Progress = Callable[[str, str, int, int], None]
"""Told (model id, stage, done, total) while a plan is built."""


class ModelHost:
    """Builds or opens the plans of configured models, on one runtime for all that run alike.

    Safe from any thread; :meth:`close` closes the runtimes, after their models.
    """

    def __init__(self, config: ServeConfig, settings: Settings) -> None:
        self._device = config.workers.device
        self._threads = config.workers.threads_of(settings.threads)
        self._models_folder = settings.models
        self._store = PlanStore(settings.plans, max_bytes=settings.plans_max_bytes)
        self._runtimes: dict[RuntimeChoices, Runtime] = {}
        self._lock = threading.Lock()

    def plan(self, model: ModelConfig, progress: Progress | None = None) -> Plan:
        """The plan of a model, built where it is not there. A folder is read as it is now.

        Raises:
            InvalidRequestError: there is no such folder, or it cannot run as it is configured.
            CheckpointError, UnsupportedError, PlanError: it cannot be compiled; says why.
        """
        model.runtime(self._device)  # refused before anything is compiled for it
        folder = model.path or self._models_folder / model.id
        if not (folder / "model_index.json").is_file():
            raise InvalidRequestError(
                f"models.{model.id}: {folder} is no model folder in Diffusers layout", field="model"
            )

        def tell(stage: str, done: int, total: int) -> None:
            if progress is not None:
                progress(model.id, stage, done, total)

        choices = PlanChoices(
            backend=model.backend, precision=model.precision, min_snr_db=model.int8_min_snr_db
        )
        return choices.build(self._store, Checkpoint.open(folder), tell)

    def open(self, plan: Plan, model: ModelConfig) -> Model:
        """Open every graph of a plan, to run as ``model`` is configured; others of the same plan
        may run otherwise.

        Raises:
            PlanCorruptError, BackendUnavailableError: see :meth:`engine.runtime.Runtime.open`.
        """
        return Model.open(plan, self._runtime(model.runtime(self._device)))

    def close(self) -> None:
        """Close the runtimes. Closing twice is harmless."""
        with self._lock:
            for runtime in self._runtimes.values():
                runtime.close()
            self._runtimes.clear()

    def _runtime(self, wanted: RuntimeChoices) -> Runtime:
        with self._lock:
            if wanted not in self._runtimes:
                if wanted.backend != "torch":
                    # Torch only gathers and scatters beside the graphs: threads of its own would
                    # take the cores from theirs.
                    torch.set_num_threads(1)
                self._runtimes[wanted] = wanted.open(threads=self._threads)
            return self._runtimes[wanted]


def describe(model: ModelConfig, plan: Plan) -> ModelInfo:
    """What clients and admission may know of a model."""
    spec = plan.manifest.model
    defaults = from_scheduler_config(spec.scheduler_config)
    return ModelInfo(
        id=model.id,
        family=spec.family,
        native_px=spec.latent.native_px,
        size_multiple_px=spec.latent.size_multiple_px,
        min_px=spec.latent.min_px,
        max_px=spec.latent.max_px,
        guidance_default=spec.guidance_default,
        guidable=spec.guidance_embedding_size is None,
        solver_default=defaults.solver,
        schedule_default=defaults.schedule,
        precision=plan.manifest.precision,
        backend=plan.manifest.backend,
        plan_digest=plan.digest,
        created_s=int((plan.folder / MANIFEST).stat().st_mtime),
        checkpoint=spec.fingerprint,
        scheduler_class=defaults.scheduler_class,
        scheduler_stand_in=defaults.substitution,
        scheduler_note=defaults.note,
        inpainting_only=spec.in_channels == 2 * spec.latent.channels + 1,
        max_clip_skip=min(max_clip_skip(text.segment) for text in plan.manifest.text_encoders),
    )


def weights_bytes(plan: Plan) -> int:
    """Bytes of a plan's graphs on disk: a floor for what the open model takes."""
    return sum(_size_bytes(plan.folder / name) for name in _graph_files(plan.manifest))


def _graph_files(manifest: PlanManifest) -> list[str]:
    return [name for name in manifest.files if not name.endswith(".json")]


def _size_bytes(path: Path) -> int:
    return path.stat().st_size
