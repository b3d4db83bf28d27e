"""Which checkpoints Darkroom serves. Everything else is refused here, by file, key and value.

Each function returns its problems instead of raising at the first, so that one attempt shows all.
Keys and defaults are those of Diffusers' ``UNet2DConditionModel`` and ``AutoencoderKL`` and of
Transformers' ``CLIPTextConfig``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from engine.checkpoint.config import MAX_LAYERS, MAX_SIZE, Config
from engine.errors import CorruptCheckpointError, UnsupportedError
from engine.solvers import from_scheduler_config

PIPELINES = {
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
}
"""All of them open as one thing here: a request, not a class, says what is drawn from what."""

CLASSES = {
    "unet": {"UNet2DConditionModel"},
    "vae": {"AutoencoderKL"},
    "text_encoder": {"CLIPTextModel"},
    "text_encoder_2": {"CLIPTextModelWithProjection"},
    "tokenizer": {"CLIPTokenizer", "CLIPTokenizerFast"},
    "tokenizer_2": {"CLIPTokenizer", "CLIPTokenizerFast"},
}
"""Components that are loaded, with the classes that each may have; the scheduler may have any."""

IGNORED = {"safety_checker", "feature_extractor", "image_encoder"}
"""Components that are never opened: Darkroom does not screen pictures, and adapters come later."""

LIBRARIES = {"diffusers", "transformers", "stable_diffusion"}
"""Libraries whose classes a component may name; anything else would be a checkpoint's own code."""

_UNET_ALLOWED: dict[str, tuple[object, ...]] = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None, "text", "text_time"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
_UNET_FREE = {
    *("addition_embed_type_num_heads", "addition_time_embed_dim", "attention_head_dim"),
    *("block_out_channels", "cross_attention_dim", "down_block_types", "dropout"),
    *("flip_sin_to_cos", "freq_shift", "in_channels", "layers_per_block", "norm_eps"),
    *("norm_num_groups", "out_channels", "projection_class_embeddings_input_dim", "sample_size"),
    *("time_cond_proj_dim", "transformer_layers_per_block", "up_block_types"),
    *("upcast_attention", "use_linear_projection"),
}
_DOWN_BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D"}
_UP_BLOCKS = {"UpBlock2D", "CrossAttnUpBlock2D"}

_VAE_ALLOWED: dict[str, tuple[object, ...]] = {
    "act_fn": ("silu", "swish"),
    "in_channels": (3,),
    "out_channels": (3,),
    "latents_mean": (None,),
    "latents_std": (None,),
}
_VAE_FREE = {
    *("block_out_channels", "down_block_types", "force_upcast", "latent_channels"),
    *("layers_per_block", "mid_block_add_attention", "norm_num_groups", "sample_size"),
    *("scaling_factor", "shift_factor", "up_block_types", "use_post_quant_conv"),
    "use_quant_conv",
}

_PREDICTIONS = ("epsilon", "v_prediction", "sample")
_COMPONENT_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


def check_index(index: Mapping[str, Any]) -> list[str]:
    """What is wrong with ``model_index.json``.

    Raises:
        CorruptCheckpointError: a component's name is no plain folder name (a path, say).
    """
    pipeline = str(index.get("_class_name"))[:80]
    problems = []
    if pipeline not in PIPELINES:
        problems.append(
            f"model_index.json: pipeline {pipeline!r} is not supported; supported are "
            + ", ".join(sorted(PIPELINES))
        )
    if index.get("requires_aesthetics_score"):
        problems.append("model_index.json: requires_aesthetics_score (SDXL refiner) not supported")
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list):
            continue
        if not _COMPONENT_NAME.fullmatch(name):
            raise CorruptCheckpointError(
                f"model_index.json: component name {name[:80]!r} is not a plain folder name"
            )
        if name not in IGNORED and entry != [None, None]:
            problems += _check_component(name, entry)
    required = {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    if pipeline.startswith("StableDiffusionXL"):
        required |= {"text_encoder_2", "tokenizer_2"}
    problems += [
        f"model_index.json: component {name!r} is missing or null; a {pipeline} needs it here"
        for name in sorted(required)
        if index.get(name) in (None, [None, None])
    ]
    return problems


def _check_component(name: str, entry: Sequence[Any]) -> list[str]:
    library, class_name = (str(part)[:80] for part in (*entry, None, None)[:2])
    if library not in LIBRARIES:
        return [
            f"model_index.json: {name} comes from {library!r}, code of the checkpoint's "
            "own, which Darkroom never runs; only diffusers and transformers classes are supported"
        ]
    if name != "scheduler" and name not in CLASSES:
        return [f"model_index.json: component {name!r} ({class_name}) is not supported"]
    if name in CLASSES and class_name not in CLASSES[name]:
        allowed = " or ".join(sorted(CLASSES[name]))
        return [f"model_index.json: {name}={class_name!r} is not supported; supported: {allowed}"]
    return []


def check_unet(config: Config, latent_channels: int) -> list[str]:
    """What is unsupported in ``unet/config.json``."""
    problems = _check_keys(config, _UNET_ALLOWED, _UNET_FREE)
    down, up = config.names("down_block_types"), config.names("up_block_types")
    problems += _check_blocks(config, "down_block_types", down, _DOWN_BLOCKS)
    problems += _check_blocks(config, "up_block_types", up, _UP_BLOCKS)
    if len(up) != len(down):
        raise config.wrong("up_block_types", f"{len(down)} blocks, one per down block")
    for key, default, most in (
        ("block_out_channels", 1, MAX_SIZE),
        ("attention_head_dim", 8, MAX_SIZE),
        ("layers_per_block", 2, MAX_LAYERS),
        ("transformer_layers_per_block", 1, MAX_LAYERS),
    ):
        if isinstance(config.values.get(key), list) and any(
            isinstance(item, list) for item in config.values[key]
        ):
            problems.append(f"{config.label}: {key} with nested lists is not supported")
        else:
            config.integers(key, default, len(down), most=most)
    allowed = (latent_channels, 2 * latent_channels + 1)
    if config.integer("in_channels", 4) not in allowed:
        problems.append(
            f"{config.label}: in_channels={config.values['in_channels']} is not supported; "
            f"supported: {allowed[0]} (latent), {allowed[1]} (latent, mask and masked latent)"
        )
    if config.integer("out_channels", 4) != latent_channels:
        raise config.wrong("out_channels", f"{latent_channels}, the VAE's latent channels")
    return problems


def check_vae(config: Config) -> list[str]:
    """What is unsupported in ``vae/config.json``."""
    problems = _check_keys(config, _VAE_ALLOWED, _VAE_FREE)
    down, up = config.names("down_block_types"), config.names("up_block_types")
    problems += _check_blocks(config, "down_block_types", down, {"DownEncoderBlock2D"})
    problems += _check_blocks(config, "up_block_types", up, {"UpDecoderBlock2D"})
    config.integers("block_out_channels", 64, len(down))
    config.integer("layers_per_block", 1, most=MAX_LAYERS)
    return problems


def check_text_encoder(config: Config) -> list[str]:
    """What is unsupported in a text encoder's config."""
    config.integer("num_hidden_layers", 12, most=MAX_LAYERS)
    problems = []
    model_type = config.values.get("model_type")
    if model_type not in ("clip_text_model", "clip"):
        problems.append(f"{config.label}: model_type={model_type!r} is not supported; CLIP only")
    if config.values.get("use_attention_mask"):
        problems.append(f"{config.label}: use_attention_mask=True is not supported")
    if "auto_map" in config.values:
        problems.append(
            f"{config.label}: auto_map names code of the checkpoint's own, which is never run"
        )
    return problems


def check_scheduler(config: Config) -> list[str]:
    """What no solver could draw with; :mod:`engine.solvers` reads classes and settings.

    Raises:
        CorruptCheckpointError: a value is no number where one is needed, or out of range.
    """
    prediction = config.text("prediction_type", "epsilon")
    if prediction not in _PREDICTIONS:
        return [
            f"{config.label}: prediction_type={prediction!r} is not supported; "
            f"supported: {', '.join(_PREDICTIONS)}"
        ]
    try:
        from_scheduler_config(config.values).check()
    except UnsupportedError as error:
        return [str(error)]
    return []


def check_together(unet: Config, texts: Sequence[Config]) -> list[str]:
    """What does not fit between the UNet and the text encoders."""
    width = sum(text.integer("hidden_size", 512) for text in texts)
    if isinstance(unet.values.get("cross_attention_dim"), list):
        return [f"{unet.label}: a list as cross_attention_dim is not supported"]
    if unet.integer("cross_attention_dim", 1280) != width:
        raise unet.wrong("cross_attention_dim", f"{width}, the width of the text encoders")
    pooled = unet.values.get("addition_embed_type") == "text_time"
    if pooled != (len(texts) == 2):
        return [
            f"{unet.label}: addition_embed_type={unet.values.get('addition_embed_type')!r} with "
            f"{len(texts)} text encoder(s) is not supported; 'text_time' takes two, others one"
        ]
    if pooled:
        size = texts[-1].integer("projection_dim", 512)
        size += 6 * unet.integer("addition_time_embed_dim")
        if unet.integer("projection_class_embeddings_input_dim") != size:
            raise unet.wrong(
                "projection_class_embeddings_input_dim",
                f"{size}: the pooled text and six size numbers",
            )
    return []


def _check_keys(
    config: Config, allowed: Mapping[str, tuple[object, ...]], free: set[str]
) -> list[str]:
    """Keys with a value that is not served, and keys that nobody here knows."""
    problems = []
    for key, value in config.values.items():
        if key in free or key.startswith("_"):
            continue
        if key not in allowed:
            if value not in (None, False):
                problems.append(f"{config.label}: {key}={value!r} is not known, so not supported")
        elif value not in allowed[key] and (value is not None or key == "mid_block_type"):
            problems.append(f"{config.label}: {key}={value!r} is not supported")
    return problems


def _check_blocks(config: Config, key: str, found: Sequence[str], supported: set[str]) -> list[str]:
    return [
        f"{config.label}: {key}: {name!r} is not supported; supported: "
        + ", ".join(sorted(supported))
        for name in dict.fromkeys(found)
        if name not in supported
    ]
