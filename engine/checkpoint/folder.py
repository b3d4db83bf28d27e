"""A model folder in Diffusers layout, opened and judged as a whole."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from engine.checkpoint import support
from engine.checkpoint.config import Config
from engine.checkpoint.files import (
    WeightFiles,
    file_sha256,
    find_weights,
    read_json,
    refuse_pickles,
)
from engine.compile.manifest import LatentSpec, ModelSpec
from engine.errors import CorruptCheckpointError, UnsupportedError

if TYPE_CHECKING:
    import torch
    from torch import nn

_NOT_CONTENT = {"_name_or_path", "_diffusers_version", "_commit_hash", "transformers_version"}
"""Keys that say where a file came from and not what it does; no part of a fingerprint."""
_MAX_PX_PER_NATIVE = 4
"""Pictures may be this many times as wide as those the checkpoint was trained on."""
_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}


@dataclass(frozen=True)
class Component:
    """One network of the checkpoint: its config and the files that hold its weights."""

    name: str
    config: Config
    weights: WeightFiles


@dataclass(frozen=True)
class Checkpoint:
    """A model folder that Darkroom can serve. Made by :meth:`open`; holds no open files.

    Attributes:
        path: the folder.
        name: an id of ``[a-z0-9._-]``, from the folder's name.
        fingerprint: sha256 over everything that decides what it draws.
        text_encoders: one, or two for SDXL.
        tokenizers: folders, one for each text encoder.
        zero_empty_negative: an absent negative prompt is embedded as zeros (SDXL's
            ``force_zeros_for_empty_prompt``).
    """

    path: Path
    name: str
    fingerprint: str
    unet: Component
    vae: Component
    text_encoders: tuple[Component, ...]
    tokenizers: tuple[Path, ...]
    scheduler_config: Mapping[str, Any]
    zero_empty_negative: bool

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read and judge all configs and weight headers. Loads no weights and imports no torch.

        Raises:
            UnsafeCheckpointError: it holds pickled weights.
            CorruptCheckpointError: a file is missing, broken, or outside of the folder.
            UnsupportedError: it needs something that Darkroom does not serve; lists everything.
        """
        path = path.absolute()
        index = read_json(path / "model_index.json", "model_index.json")
        for name in ("", *support.CLASSES):
            refuse_pickles(path / name, name)
        problems = support.check_index(index)
        used = [n for n in support.CLASSES if index.get(n) not in (None, [None, None])]
        for name in (*used, "scheduler"):
            _refuse_escapes(path, name)

        # A foreign pipeline may lack our files: then the classes are the problem, not the files.
        present = [
            n for n in (*used, "scheduler") if not problems or (path / _config_file(n)).is_file()
        ]
        configs = {n: _config(path, n) for n in present if not n.startswith("tokenizer")}
        problems += _check_configs(configs, complete=not problems)
        if problems:
            raise UnsupportedError("\n".join(problems))

        scheduler = configs.pop("scheduler")
        texts = tuple(name for name in configs if name.startswith("text_encoder"))
        tokenizers = tuple(path / n for n in used if n.startswith("tokenizer"))
        _check_tokenizers(tokenizers)
        parts = {
            name: Component(
                name, config, find_weights(path / name, _STEMS.get(name, "model"), name)
            )
            for name, config in configs.items()
        }
        zero = bool(index.get("force_zeros_for_empty_prompt", len(texts) == 2))
        return cls(
            path=path,
            name=_id_of(path),
            fingerprint=_fingerprint(parts, tokenizers, scheduler, zero=zero),
            unet=parts["unet"],
            vae=parts["vae"],
            text_encoders=tuple(parts[name] for name in texts),
            tokenizers=tokenizers,
            scheduler_config=scheduler.values,
            zero_empty_negative=zero and len(texts) == 2,
        )

    @property
    def family(self) -> Literal["sd1", "sd2", "sdxl", "custom"]:
        """Told from the UNet: SD 2 is SD 1 with linear projections, SDXL embeds sizes."""
        config = self.unet.config
        match config.values.get("addition_embed_type"):
            case "text_time":
                return "sdxl"
            case "text":
                return "custom"
        return "sd2" if config.flag("use_linear_projection", False) else "sd1"

    @property
    def vae_needs_fp32(self) -> bool:
        """The VAE overflows in half precision (SDXL's first one) and must not be narrowed."""
        return self.vae.config.flag("force_upcast", True)

    def model_spec(self) -> ModelSpec:
        """What the engine must know once the modules are gone."""
        unet = self.unet.config
        scheduler = Config("scheduler/scheduler_config.json", self.scheduler_config)
        return ModelSpec(
            name=self.name,
            family=self.family,
            fingerprint=self.fingerprint,
            in_channels=unet.integer("in_channels", 4),
            prediction_type=scheduler.text("prediction_type", "epsilon"),  # type: ignore[arg-type]
            scheduler_config=dict(self.scheduler_config),
            text_conditioning="sdxl" if len(self.text_encoders) == 2 else "clip",
            addition_embed_type=unet.values.get("addition_embed_type"),
            guidance_embedding_size=unet.optional_integer("time_cond_proj_dim"),
            guidance_default=self._guidance_default(scheduler),
            zero_empty_negative=self.zero_empty_negative,
            latent=self._latent_spec(),
            context_size=unet.integer("cross_attention_dim", 1280),
        )

    def load_unet(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Diffusers' ``UNet2DConditionModel``; ``dtype`` is float32 unless given.

        Raises:
            CorruptCheckpointError: naming the tensor that is missing, misshapen or not finite.
        """
        import torch

        from engine.checkpoint.modules import build_unet

        return build_unet(self.unet.config.values, self.unet.weights, dtype or torch.float32)

    def load_text_encoders(self, dtype: torch.dtype | None = None) -> tuple[nn.Module, ...]:
        """Transformers' CLIP text models, the last of two with its projection."""
        import torch

        from engine.checkpoint.modules import build_text_encoder

        return tuple(
            build_text_encoder(
                part.config.values,
                part.weights,
                dtype or torch.float32,
                projected=part.name == "text_encoder_2",
                label=part.name,
            )
            for part in self.text_encoders
        )

    def load_vae(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Diffusers' ``AutoencoderKL``; ``dtype`` is float32 unless given."""
        import torch

        from engine.checkpoint.modules import build_vae

        return build_vae(self.vae.config.values, self.vae.weights, dtype or torch.float32)

    def _guidance_default(self, scheduler: Config) -> float:
        """The scale for a request that names none, as the families' own pipelines have it.

        A scheduler is all that tells a distilled checkpoint: LCM and TCD by class, Turbo and
        Lightning by trailing Euler steps on a model that was not trained for v.
        """
        if self.unet.config.optional_integer("time_cond_proj_dim") is not None:
            return 8.5  # embedded as w, not extrapolated
        kind = scheduler.text("_class_name", "")
        trailing = scheduler.text("timestep_spacing", "") == "trailing"
        euler = kind in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
        noisy_end = scheduler.flag("rescale_betas_zero_snr", False)
        predicts_v = scheduler.text("prediction_type", "epsilon") == "v_prediction"
        if kind in ("LCMScheduler", "TCDScheduler"):
            return 1.0
        if euler and trailing and not (noisy_end or predicts_v):
            return 1.0
        return {"sdxl": 5.0, "custom": 4.0}.get(self.family, 7.5)

    def _latent_spec(self) -> LatentSpec:
        vae, unet = self.vae.config, self.unet.config
        factor = 2 ** (len(vae.names("down_block_types")) - 1)
        multiple = factor * 2 ** (len(unet.names("down_block_types")) - 1)
        native = max(unet.integers("sample_size", 64, 2)) * factor
        return LatentSpec(
            channels=vae.integer("latent_channels", 4),
            factor_px=factor,
            scaling=vae.number("scaling_factor", 0.18215),
            shift=vae.number("shift_factor", 0.0),
            size_multiple_px=multiple,
            native_px=native,
            min_px=multiple,
            max_px=_MAX_PX_PER_NATIVE * native,
        )


def _config_file(component: str) -> str:
    return f"{component}/{'scheduler_config' if component == 'scheduler' else 'config'}.json"


def _config(path: Path, component: str) -> Config:
    label = _config_file(component)
    return Config(label, read_json(path / label, label))


def _check_configs(configs: Mapping[str, Config], *, complete: bool) -> list[str]:
    problems: list[str] = []
    if "scheduler" in configs:
        problems += support.check_scheduler(configs["scheduler"])
    texts = [config for name, config in configs.items() if name.startswith("text_encoder")]
    for text in texts:
        problems += support.check_text_encoder(text)
    if "vae" in configs and "unet" in configs:
        problems += support.check_vae(configs["vae"])
        channels = configs["vae"].integer("latent_channels", 4)
        problems += support.check_unet(configs["unet"], channels)
        # Widths are compared only where everything is of a kind that has them.
        if complete and not problems:
            problems += support.check_together(configs["unet"], texts)
    return problems


def _check_tokenizers(folders: tuple[Path, ...]) -> None:
    for folder in folders:
        whole = (folder / "tokenizer.json").is_file()
        if not whole and not all((folder / f).is_file() for f in ("vocab.json", "merges.txt")):
            raise CorruptCheckpointError(
                f"{folder.name}: holds neither tokenizer.json nor vocab.json with merges.txt"
            )


def _refuse_escapes(path: Path, component: str) -> None:
    """Refuse links that lead out of the checkpoint; the hub's cache links to its own blobs."""
    homes = [path.resolve()]
    if path.parent.name == "snapshots":
        homes.append((path.parent.parent / "blobs").resolve())
    folder = path / component
    for entry in (folder, *(folder.iterdir() if folder.is_dir() else ())):
        if not any(entry.resolve().is_relative_to(home) for home in homes):
            raise CorruptCheckpointError(
                f"{component}: {entry.name} is a link that leads out of the model folder; "
                "copy the file into it"
            )


def _id_of(path: Path) -> str:
    """The folder's name as an id; in the hub's cache, the repository's name."""
    name = path.name
    if path.parent.name == "snapshots":
        name = path.parent.parent.name.rpartition("--")[2]
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-.") or "model"


def _fingerprint(
    parts: Mapping[str, Component],
    tokenizers: tuple[Path, ...],
    scheduler: Config,
    *,
    zero: bool,
) -> str:
    """Digest of canonical configs, weights and tokenizers; file names and origins do not count."""
    content: dict[str, Any] = {"scheduler": _canonical(scheduler), "zero": zero}
    for name, part in parts.items():
        content[name] = [_canonical(part.config), *map(file_sha256, part.weights.files)]
    for folder in tokenizers:
        files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".txt"))
        content[folder.name] = {p.name: file_sha256(p) for p in files}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _canonical(config: Config) -> dict[str, Any]:
    return {key: value for key, value in config.values.items() if key not in _NOT_CONTENT}
