"""From a checkpoint to the files of a plan, in the folder that :mod:`engine.compile.plan` gives."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from engine.compile.export import GraphSource, export_text_encoder, export_unet, export_vae
from engine.compile.manifest import (
    PLAN_FORMAT,
    Backend,
    PlanManifest,
    Precision,
    SegmentSpec,
    Tap,
    TextEncoderSpec,
)
from engine.errors import BackendUnavailableError, UnsupportedError
from engine.vae import fit_preview, preview_latents

if TYPE_CHECKING:
    from engine.checkpoint import Checkpoint
    from engine.compile.plan import Progress
    from engine.compile.tensorrt_profile import EngineTarget

CHECKPOINT = "checkpoint"
"""Folder of a torch plan with what its runtime rebuilds modules from."""

_PRECISIONS: dict[str, tuple[str, ...]] = {
    "onnxruntime": ("fp32", "fp16", "int8"),
    "torch": ("fp32", "fp16", "bf16"),
    "tensorrt": ("fp32", "fp16", "bf16", "int8"),
}
DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.float32,  # quantized after export
}
_EXPORTER = ("attention", "units", "segments", "lowrank", "export", "onnx_graph", "build")
"""Modules whose source decides what is in a graph, and so is part of every digest."""
_ENGINE_BUILDER = ("tensorrt", "tensorrt_profile", "tensorrt_quantization")
"""And those that decide what is in an engine."""
_PACKAGES: dict[str, tuple[str, ...]] = {
    "onnxruntime": ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime"),
    "torch": ("torch", "diffusers", "transformers"),
    "tensorrt": ("torch", "diffusers", "transformers", "onnx", "onnxscript"),
}


@dataclass(frozen=True, kw_only=True)
class Ingredients:
    """Everything that decides what a plan holds; its digest is the plan's address."""

    checkpoint: Checkpoint
    backend: Backend
    precision: Precision
    cuts: tuple[str, ...] | None
    taps: tuple[Tap, ...]
    recipe: dict[str, object]
    versions: dict[str, str]
    target: EngineTarget | None = None

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        *,
        backend: str,
        precision: str,
        cuts: tuple[str, ...] | None,
        taps: tuple[Tap, ...],
        recipe: dict[str, object],
        target: EngineTarget | None = None,
    ) -> Ingredients:
        """Checked, and with the versions that are installed here.

        Raises:
            UnsupportedError: the backend or its precision is unknown; lists those there are.
            BackendUnavailableError: a package that builds such plans is not installed.
        """
        if backend not in _PRECISIONS:
            raise UnsupportedError(f"no backend {backend!r}; there are: {', '.join(_PRECISIONS)}")
        if precision not in _PRECISIONS[backend]:
            raise UnsupportedError(
                f"{backend} has no precision {precision!r}; it has:"
                f" {', '.join(_PRECISIONS[backend])}"
            )
        if (precision == "int8") != bool(recipe):
            raise UnsupportedError("int8, and no other precision, needs a quantization recipe")
        return cls(
            checkpoint=checkpoint,
            backend=cast(Backend, backend),
            precision=cast(Precision, precision),
            cuts=cuts,
            taps=taps,
            recipe=recipe,
            versions=_versions(backend),
            target=_target(checkpoint, backend, precision, target),
        )

    @cached_property
    def digest(self) -> str:
        """sha256 over all of them."""
        parts = {
            "format": PLAN_FORMAT,
            "model": self.checkpoint.model_spec().model_dump(mode="json"),
            "backend": self.backend,
            "precision": self.precision,
            "cuts": self.cuts,
            "taps": [tap.model_dump() for tap in self.taps],
            "recipe": self.recipe,
            "versions": self.versions,
            "target": self.target and self.target.model_dump(mode="json"),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _versions(backend: str) -> dict[str, str]:
    versions = {}
    for package in _PACKAGES[backend]:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            raise BackendUnavailableError(
                f"building {backend} plans needs {package}: pip install 'darkroom[compile]'"
            ) from None
    folder = Path(__file__).parent
    modules = (*_EXPORTER, *_ENGINE_BUILDER) if backend == "tensorrt" else _EXPORTER
    digest = hashlib.sha256(b"\0".join((folder / f"{m}.py").read_bytes() for m in modules))
    return {**versions, "exporter": digest.hexdigest()[:16]}


def _target(
    checkpoint: Checkpoint, backend: str, precision: str, target: EngineTarget | None
) -> EngineTarget | None:
    """For what engines are built: as asked, or for the GPU of this machine."""
    if backend != "tensorrt":
        if target is not None:
            raise UnsupportedError(f"{backend} plans run everywhere: they take no target")
        return None
    from engine.compile.tensorrt_profile import EngineTarget

    if target is not None:
        return target
    parts = checkpoint.text_encoders
    tokens = max(part.config.integer("max_position_embeddings") for part in parts)
    return EngineTarget.choose(checkpoint.model_spec(), max_tokens=tokens, precision=precision)


def build_plan(ingredients: Ingredients, folder: Path, progress: Progress) -> PlanManifest:
    """Write every file but the manifest into ``folder``, and return it without hashes.

    Raises:
        PlanError: a cut or tap names no unit, or a module cannot be exported.
        CorruptCheckpointError: its weights are not what its configs say.
    """
    checkpoint = ingredients.checkpoint
    progress("reading the checkpoint", 0, 1)
    dtype = DTYPES[ingredients.precision]
    vae = checkpoint.load_vae(torch.float32 if checkpoint.vae_needs_fp32 else dtype)
    unet = export_unet(checkpoint.load_unet(dtype), ingredients.cuts, ingredients.taps)
    texts = [
        export_text_encoder(encoder, f"text.{i}")
        for i, encoder in enumerate(checkpoint.load_text_encoders(dtype))
    ]
    decoder, encoder = export_vae(vae)

    sources = [*unet, *texts, decoder, encoder]
    specs = {spec.name: spec for spec in _write(ingredients, folder, sources, progress)}
    for tokenizer in checkpoint.tokenizers:
        _copy_folder(tokenizer, folder / tokenizer.name)
    return PlanManifest(
        digest=ingredients.digest,
        backend=ingredients.backend,
        precision=ingredients.precision,
        versions=ingredients.versions,
        cuts=ingredients.cuts,
        taps=ingredients.taps,
        recipe=ingredients.recipe,
        target=ingredients.target.model_dump(mode="json") if ingredients.target else {},
        model=checkpoint.model_spec(),
        unet=tuple(specs[source.name] for source in unet),
        text_encoders=tuple(
            TextEncoderSpec(
                segment=specs[source.name],
                tokenizer=tokenizer.name,
                max_tokens=part.config.integer("max_position_embeddings"),
                hidden_size=part.config.integer("hidden_size"),
                adapter_sites=source.adapter_sites(),
            )
            for source, tokenizer, part in zip(
                texts, checkpoint.tokenizers, checkpoint.text_encoders, strict=True
            )
        ),
        vae_decoder=specs[decoder.name],
        vae_encoder=specs[encoder.name],
        adapter_sites=tuple(site for source in unet for site in source.adapter_sites()),
        preview=_fit_preview(ingredients, decoder.module),
    )


def _write(
    ingredients: Ingredients, folder: Path, sources: list[GraphSource], progress: Progress
) -> Iterator[SegmentSpec]:
    if ingredients.backend == "torch":
        progress("copying the checkpoint", 0, 1)
        _copy_checkpoint(ingredients.checkpoint, folder / CHECKPOINT)
        yield from (source.segment() for source in sources)
        return

    from engine.compile.onnx_graph import adapters_path, write_graphs

    for i, source in enumerate(sources):
        progress(f"exporting {source.name}", i, len(sources))
        file = Path("graphs") / f"{source.name}.onnx"
        write_graphs(source, folder / file, plain_factors=ingredients.backend == "tensorrt")
        yield source.segment(file.as_posix(), adapters_path(file).as_posix())
    progress("exported", len(sources), len(sources))


def _copy_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Link what the checkpoint is made of into ``folder``, or copy it across file systems."""
    parts = [checkpoint.unet, checkpoint.vae, *checkpoint.text_encoders]
    names = [part.name for part in parts] + [path.name for path in checkpoint.tokenizers]
    for name in (*names, "scheduler"):
        _copy_folder(checkpoint.path / name, folder / name, link=True)
    shutil.copyfile(checkpoint.path / "model_index.json", folder / "model_index.json")


def _copy_folder(source: Path, target: Path, *, link: bool = False) -> None:
    """Like ``shutil.copytree``, whose errors hide what the system refused."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if not (link and _link(path.resolve(), copy)):
                shutil.copyfile(path, copy)


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        return False
    return True


def _fit_preview(ingredients: Ingredients, decoder: nn.Module) -> tuple[tuple[float, ...], ...]:
    latent = ingredients.checkpoint.model_spec().latent
    dtype = next(decoder.parameters()).dtype

    def decode(latents: Tensor) -> Tensor:
        with torch.no_grad():
            unscaled = (latents / latent.scaling + latent.shift).to(dtype)
            picture: Tensor = decoder({"latent": unscaled})["picture"]
            return (picture.float() * 0.5 + 0.5).clamp(0, 1)

    return fit_preview(decode, preview_latents(latent))
