"""Torch modules of a checkpoint, for export and for reference. Serving needs none of them.

Weights are put in place by Darkroom itself rather than by ``from_pretrained``: nothing is missing
or left over in silence, and a bad tensor is named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import safetensors.torch
import torch
from torch import nn

from engine.checkpoint.files import WeightFiles
from engine.errors import CorruptCheckpointError

_LEGACY_VAE_ATTENTION = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}
"""Names in VAE files written before Diffusers 0.18, Stable Diffusion 1.5's own among them."""


def build_unet(config: Mapping[str, Any], weights: WeightFiles, dtype: torch.dtype) -> nn.Module:
    """The UNet, in ``dtype``, in evaluation mode."""
    from diffusers import UNet2DConditionModel

    return _build(
        lambda: UNet2DConditionModel.from_config(dict(config)), weights, dtype, label="unet"
    )


def build_vae(config: Mapping[str, Any], weights: WeightFiles, dtype: torch.dtype) -> nn.Module:
    """The autoencoder, in ``dtype``, in evaluation mode."""
    from diffusers import AutoencoderKL

    return _build(
        lambda: AutoencoderKL.from_config(dict(config)),
        weights,
        dtype,
        label="vae",
        rename=_modern_vae_name,
    )


def build_text_encoder(
    config: Mapping[str, Any],
    weights: WeightFiles,
    dtype: torch.dtype,
    *,
    projected: bool,
    label: str,
) -> nn.Module:
    """A CLIP text encoder: ``CLIPTextModelWithProjection`` if ``projected``, else without."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def make() -> nn.Module:
        text_config = CLIPTextConfig.from_dict(dict(config))
        module: nn.Module = (CLIPTextModelWithProjection if projected else CLIPTextModel)(
            text_config
        )
        return module

    def rename(name: str) -> str | None:
        if name.endswith("position_ids"):
            return None  # a constant that older versions saved
        return name if projected else name.removeprefix("text_model.")

    return _build(make, weights, dtype, label=label, rename=rename)


def _build(
    make: Callable[[], nn.Module],
    weights: WeightFiles,
    dtype: torch.dtype,
    *,
    label: str,
    rename: Callable[[str], str | None] = lambda name: name,
) -> nn.Module:
    """Make a module without memory, check every tensor against it, and fill it.

    Raises:
        CorruptCheckpointError: a tensor is missing, left over, misshapen or not finite, or the
            config contradicts itself.
    """
    try:
        with torch.device("meta"):
            module = make()
    except Exception as error:  # whatever a config breaks in there is the config's fault
        raise CorruptCheckpointError(f"{label}/config.json: {error}") from error
    named = {rename(name): name for name in weights.shapes}
    named.pop(None, None)
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    _compare(expected, {new: weights.shapes[old] for new, old in named.items() if new}, label)

    state: dict[str, torch.Tensor] = {}
    for file in weights.files:
        for old, tensor in safetensors.torch.load_file(file).items():
            new = rename(old)
            if new is None:
                continue
            tensor = tensor.to(dtype)
            if not bool(torch.isfinite(tensor).all()):
                raise CorruptCheckpointError(
                    f"{label}/{file.name}: {old} holds NaN or infinite values"
                )
            state[new] = tensor
    module.load_state_dict(state, strict=True, assign=True)
    _fill_constants(module)
    return module.eval().requires_grad_(False)


def _compare(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], label: str
) -> None:
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} belongs to no layer" for name in found if name not in expected]
    problems += [
        f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CorruptCheckpointError(
            f"{label}: weights and config.json disagree: {'; '.join(problems[:5])}{more}"
        )


def _fill_constants(module: nn.Module) -> None:
    """Give buffers that no file holds their value; CLIP's position numbers are the only kind."""
    for name, buffer in list(module.named_buffers()):
        if not buffer.is_meta:
            continue
        owner, _, leaf = name.rpartition(".")
        if leaf != "position_ids":
            raise CorruptCheckpointError(f"{name}: a constant that Darkroom cannot make")
        count = torch.arange(buffer.shape[-1]).expand(buffer.shape).clone()
        module.get_submodule(owner).register_buffer(leaf, count, persistent=False)


def _modern_vae_name(name: str) -> str:
    if ".attentions." in name:
        for old, new in _LEGACY_VAE_ATTENTION.items():
            name = name.replace(old, new)
    return name
