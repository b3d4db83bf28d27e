"""Tiny checkpoints with random weights, made at test time: one of each family that Darkroom serves.

Each is a real Diffusers folder of about 1 MB that ``DiffusionPipeline.from_pretrained`` opens
offline. Sizes are unlike each other on purpose (text widths, heads, layers), so that a mix-up of
two of them fails. Gains are chosen so that fifty solver steps stay finite and another prompt
gives a clearly different picture.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

FAMILIES = ("sd15", "sd21-v", "sdxl", "lcm", "inpaint9", "text")
"""Names that :func:`write_checkpoint` takes."""

PICTURE_PX = 32
"""Side of the pictures that every tiny checkpoint draws by default."""

_WORDS = ("red", "blue", "green", "umbrella", "cat", "dog", "house", "photo", "of", "the")
_MAX_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """What makes one family differ from a small Stable Diffusion 1.x."""

    pipeline: str = "StableDiffusionPipeline"
    scheduler: str
    scheduler_options: dict[str, Any] = field(default_factory=dict)
    unet: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    text_2: dict[str, Any] | None = None


_LATENT_BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}

_RECIPES = {
    "sd15": _Recipe(
        scheduler="PNDMScheduler",
        scheduler_options={"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1},
    ),
    "sd21-v": _Recipe(
        scheduler="DDIMScheduler",
        scheduler_options={
            "prediction_type": "v_prediction",
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "clip_sample": False,
        },
        unet={
            "use_linear_projection": True,
            "attention_head_dim": [2, 4],
            "cross_attention_dim": 40,
        },
        text={"hidden_size": 40, "hidden_act": "gelu", "num_hidden_layers": 3},
    ),
    "sdxl": _Recipe(
        pipeline="StableDiffusionXLPipeline",
        scheduler="EulerDiscreteScheduler",
        scheduler_options={"timestep_spacing": "leading", "steps_offset": 1},
        unet={
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "use_linear_projection": True,
            "attention_head_dim": [2, 4],
            "transformer_layers_per_block": [1, 2],
            "cross_attention_dim": 72,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24 + 6 * 8,
        },
        text={"num_hidden_layers": 2},
        # As in SDXL's own files, eos_token_id 2 selects the pooling by highest token id.
        text_2={
            "hidden_size": 40,
            "hidden_act": "gelu",
            "num_hidden_layers": 3,
            "projection_dim": 24,
            "eos_token_id": 2,
        },
    ),
    "lcm": _Recipe(
        pipeline="LatentConsistencyModelPipeline",
        scheduler="LCMScheduler",
        scheduler_options={"original_inference_steps": 50, "clip_sample": False},
        unet={"time_cond_proj_dim": 16},
    ),
    "inpaint9": _Recipe(
        pipeline="StableDiffusionInpaintPipeline",
        scheduler="DDIMScheduler",
        scheduler_options={"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False},
        unet={"in_channels": 9},
    ),
    "text": _Recipe(
        scheduler="DPMSolverMultistepScheduler",
        scheduler_options={
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
            "steps_offset": 1,
            "beta_schedule": "squaredcos_cap_v2",
        },
        unet={"addition_embed_type": "text", "addition_embed_type_num_heads": 4},
    ),
}


def write_checkpoint(family: str, folder: Path, *, seed: int = 0) -> Path:
    """Write the tiny checkpoint ``family`` into ``folder``; the same seed gives the same bytes.

    Args:
        family: one of :data:`FAMILIES`.
        folder: made if it is missing; files in it are overwritten.

    Returns:
        ``folder``.
    """
    import diffusers

    recipe = _RECIPES[family]
    tokenizer = _tokenizer(pad="<|endoftext|>")
    parts: dict[str, Any] = {
        "tokenizer": tokenizer,
        "text_encoder": _text_encoder(recipe.text, tokenizer, projected=False),
        "unet": _unet(recipe.unet),
        "vae": _vae(),
        "scheduler": getattr(diffusers, recipe.scheduler)(
            **{**_LATENT_BETAS, **recipe.scheduler_options}
        ),
    }
    if recipe.text_2 is not None:
        parts["tokenizer_2"] = _tokenizer(pad="!")
        parts["text_encoder_2"] = _text_encoder(recipe.text_2, parts["tokenizer_2"], projected=True)
    else:
        parts |= {"safety_checker": None, "feature_extractor": None}
        parts["requires_safety_checker"] = False
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            _randomize(part, seed=zlib.crc32(f"{family}/{name}/{seed}".encode()))
    getattr(diffusers, recipe.pipeline)(**parts).save_pretrained(folder, safe_serialization=True)
    return folder


def _tokenizer(*, pad: str) -> Any:
    """A byte-level CLIP tokenizer: all bytes, and a few whole words made by merges."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    pieces = letters + [f"{letter}</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in _WORDS:
        left = word[0]
        for i, letter in enumerate(word[1:], start=1):
            right = letter if i < len(word) - 1 else f"{letter}</w>"
            merges.append((left, right))
            left += right
            pieces.append(left)
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    return CLIPTokenizer(
        vocab=vocab,
        merges=list(dict.fromkeys(merges)),
        pad_token=pad,
        model_max_length=_MAX_TOKENS,
    )


def _text_encoder(options: dict[str, Any], tokenizer: Any, *, projected: bool) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    defaults = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_act": "quick_gelu",
        "projection_dim": 32,
        "max_position_embeddings": _MAX_TOKENS,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPTextConfig(**{**defaults, **options})
    module: nn.Module = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
    return module


def _unet(options: dict[str, Any]) -> nn.Module:
    from diffusers import UNet2DConditionModel

    defaults = {
        "sample_size": PICTURE_PX // 4,
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    module: nn.Module = UNet2DConditionModel(**{**defaults, **options})
    return module


def _vae() -> nn.Module:
    from diffusers import AutoencoderKL

    module: nn.Module = AutoencoderKL(
        block_out_channels=[8, 8, 16],
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=PICTURE_PX,
        scaling_factor=0.18215,
    )
    return module


@torch.no_grad()
def _randomize(module: nn.Module, *, seed: int) -> None:
    """Give every parameter a value that matters: no zero bias, no norm weight of exactly one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "embedding.weight" in name or name.endswith("positional_embedding"):
            # Unit size, so that the raw penultimate state that SDXL takes is not vanishing.
            parameter.copy_(noise)
        elif parameter.ndim == 1:
            parameter.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))
        else:
            fan_in = math.prod(parameter.shape[1:])
            parameter.copy_(noise * _gain(name) / math.sqrt(fan_in))


def _gain(name: str) -> float:
    """A quiet output keeps guidance from blowing latents up; attention is as loud as the rest."""
    return 0.5 if name == "conv_out.weight" else 1.0
