"""A Diffusers UNet as a flat list of units: the smallest pieces between which a graph may be cut.

::

    context.embedding, context.down.0.attn.0, … context.mid.attn.0, …
    temb, conv_in, down.0.resnet.0, down.0.attn.0, … down.0.downsample, …
    mid.resnet.0, mid.attn.0, mid.resnet.1,
    up.0.resnet.0, up.0.attn.0, … up.0.upsample, … prediction

A unit produces one tensor, which carries the unit's name, and reads tensors by name. A skip
connection is nothing but a second read of an earlier tensor, marked with its place in the list of
residuals that a ControlNet gives: 0 is ``conv_in``, and the output of mid comes last.

The units of ``context`` read the prompt alone: the added embedding, and for each attention the keys
and values of its text. As a segment of their own they need not run again at every step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from engine.compile.attention import split
from engine.errors import UnsupportedError

CONTEXT = "context"
"""Name of the text conditioning that enters, and of the block of units that read it alone."""
PREDICTION = "prediction"
"""Name of the UNet's output."""


@dataclass(frozen=True, slots=True)
class Read:
    """One input of a unit: a tensor by name.

    Attributes:
        source: name of the tensor.
        skip: its index among a ControlNet's residuals, where they are added; None elsewhere.
    """

    source: str
    skip: int | None = None

    @property
    def name(self) -> str:
        """Name as a graph input: a skip gets its own, so that residuals reach only the skip."""
        return self.source if self.skip is None else f"skip.{self.skip}"


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of the UNet that is never cut.

    Attributes:
        name: of the unit and of the tensor that it produces.
        block: ``context``, ``down.0`` … ``mid`` … ``up.2``; default cuts fall between blocks.
        module: takes the tensors of ``reads`` in order and returns one tensor.
    """

    name: str
    block: str
    module: nn.Module
    reads: tuple[Read, ...]


def flatten(unet: UNet2DConditionModel) -> tuple[Unit, ...]:
    """Every unit of ``unet`` in execution order; they share its weights.

    Raises:
        UnsupportedError: naming a block or embedding that has no unit here.
    """
    _refuse_unknown(unet)
    texts: list[Unit] = []
    units: list[Unit] = []

    def add(block: str, name: str, module: nn.Module, *reads: Read) -> Read:
        (texts if block == CONTEXT else units).append(Unit(name, block, module, reads))
        return Read(name)

    def attend(block: str, name: str, attention: nn.Module, hidden: Read) -> Read:
        projections, attention = split(attention)
        text = add(CONTEXT, f"{CONTEXT}.{name}", projections, Read(CONTEXT))
        return add(block, name, _Attention(attention), hidden, text)

    embedding = _Embedding(unet)
    if unet.config["addition_embed_type"] is not None:
        extra = _AddedEmbedding(unet)
        add(CONTEXT, _ADDED, extra, *map(Read, extra.reads))
    temb = add("down.0", "temb", embedding, *map(Read, embedding.reads))
    hidden = add("down.0", "conv_in", _ConvIn(unet), Read("sample"))
    skips = [hidden]

    for i, block in enumerate(unet.down_blocks):
        name = f"down.{i}"
        for j, (resnet, attention) in enumerate(_pairs(block)):
            hidden = add(name, f"{name}.resnet.{j}", _Resnet(resnet), hidden, temb)
            if attention is not None:
                hidden = attend(name, f"{name}.attn.{j}", attention, hidden)
            skips.append(hidden)
        for downsample in block.downsamplers or ():
            hidden = add(name, f"{name}.downsample", downsample, hidden)
            skips.append(hidden)

    if (mid := unet.mid_block) is not None:
        hidden = add("mid", "mid.resnet.0", _Resnet(mid.resnets[0]), hidden, temb)
        for j, (attention, resnet) in enumerate(zip(mid.attentions, mid.resnets[1:], strict=True)):
            if attention is not None:
                hidden = attend("mid", f"mid.attn.{j}", attention, hidden)
            hidden = add("mid", f"mid.resnet.{j + 1}", _Resnet(resnet), hidden, temb)

    hidden = Read(hidden.source, skip=len(skips))
    for i, block in enumerate(unet.up_blocks):
        name = f"up.{i}"
        for j, (resnet, attention) in enumerate(_pairs(block)):
            skip = Read(skips.pop().source, skip=len(skips))
            hidden = add(name, f"{name}.resnet.{j}", _Resnet(resnet), hidden, temb, skip)
            if attention is not None:
                hidden = attend(name, f"{name}.attn.{j}", attention, hidden)
        for upsample in block.upsamplers or ():
            hidden = add(name, f"{name}.upsample", upsample, hidden)

    add(name, PREDICTION, _ConvOut(unet), hidden)
    return (*texts, *units)


_ADDED = f"{CONTEXT}.embedding"


def _pairs(block: nn.Module) -> Iterator[tuple[nn.Module, nn.Module | None]]:
    """The (resnet, attention) pairs of a down or up block; some blocks have no attention."""
    resnets = cast(nn.ModuleList, block.resnets)
    attentions = getattr(block, "attentions", None) or [None] * len(resnets)
    return zip(resnets, attentions, strict=True)


def _refuse_unknown(unet: UNet2DConditionModel) -> None:
    """What the units below do not reproduce; a checkpoint is normally refused before this."""
    config: Any = unet.config
    allowed: dict[str, tuple[object, ...]] = {
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "encoder_hid_dim_type": (None,),
        "addition_embed_type": (None, "text", "text_time"),
        "time_embedding_type": ("positional",),
        "attention_type": ("default",),
        "mid_block_type": (None, "UNetMidBlock2D", "UNetMidBlock2DCrossAttn"),
    }
    for field, values in allowed.items():
        if config[field] not in values:
            raise UnsupportedError(f"unet/config.json: {field}={config[field]!r} is not supported")
    for field, values in (
        ("down_block_types", ("DownBlock2D", "CrossAttnDownBlock2D")),
        ("up_block_types", ("UpBlock2D", "CrossAttnUpBlock2D")),
    ):
        for kind in config[field]:
            if kind not in values:
                raise UnsupportedError(f"unet/config.json: {field}: {kind!r} is not supported")
    for attention in getattr(unet.mid_block, "attentions", None) or ():
        if config.mid_block_type == "UNetMidBlock2D" and attention is not None:
            raise UnsupportedError(
                "unet/config.json: mid_block_type='UNetMidBlock2D' with attention"
            )


class _Embedding(nn.Module):
    """Timestep and added embedding to one vector per row, (batch, time embedding size)."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        config: Any = unet.config
        self.time_proj = _Sinusoid(unet.time_proj)
        self.time_embedding = unet.time_embedding
        self.activation = unet.time_embed_act
        reads = ["timestep"]
        if config.time_cond_proj_dim is not None:
            reads.append("added.timestep_cond")
        if config.addition_embed_type is not None:
            reads.append(_ADDED)
        self.reads = tuple(reads)

    def forward(self, timestep: Tensor, *rest: Tensor) -> Tensor:
        dtype = self.time_embedding.linear_1.weight.dtype
        given = dict(zip(self.reads[1:], rest, strict=True))
        emb: Tensor = self.time_embedding(
            self.time_proj(timestep).to(dtype), given.get("added.timestep_cond")
        )
        if _ADDED in given:
            emb = emb + given[_ADDED]
        return emb if self.activation is None else self.activation(emb)


class _AddedEmbedding(nn.Module):
    """What the prompt adds to the time embedding: (batch, time embedding size)."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        config: Any = unet.config
        self.embedding = unet.add_embedding
        self.reads: tuple[str, ...] = (CONTEXT,)
        self.time_proj: nn.Module | None = None
        if config.addition_embed_type == "text_time":
            self.reads = ("added.text_embeds", "added.time_ids")
            self.time_proj = _Sinusoid(unet.add_time_proj)

    def forward(self, text: Tensor, time_ids: Tensor | None = None) -> Tensor:
        if self.time_proj is not None and time_ids is not None:
            times = self.time_proj(time_ids).flatten(1).to(text.dtype)
            text = torch.cat([text, times], dim=-1)
        return cast(Tensor, self.embedding(text))


class _Sinusoid(nn.Module):
    """Sines and cosines of (…,) numbers, (…, size), in float32 whatever the model's precision.

    The frequencies are stored, not computed in the graph: at timestep 999 an exponential that is
    one unit in the last place off would move the phase by 6e-5.
    """

    frequencies: Tensor

    def __init__(self, timesteps: nn.Module) -> None:
        super().__init__()
        settings: Any = timesteps
        half = settings.num_channels // 2
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32)
        frequencies = torch.exp(exponent / (half - settings.downscale_freq_shift))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.scale = float(settings.scale)
        self.cosine_first = bool(settings.flip_sin_to_cos)

    def forward(self, numbers: Tensor) -> Tensor:
        phase = numbers.float()[..., None] * self.frequencies
        phase = phase if self.scale == 1 else self.scale * phase
        waves = [torch.cos(phase), torch.sin(phase)]
        return torch.cat(waves if self.cosine_first else waves[::-1], dim=-1)


class _ConvIn(nn.Module):
    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.center = bool(unet.config["center_input_sample"])
        self.conv = unet.conv_in

    def forward(self, sample: Tensor) -> Tensor:
        return cast(Tensor, self.conv(2 * sample - 1.0 if self.center else sample))


class _Resnet(nn.Module):
    def __init__(self, resnet: nn.Module) -> None:
        super().__init__()
        self.resnet = resnet

    def forward(self, hidden: Tensor, temb: Tensor, skip: Tensor | None = None) -> Tensor:
        joined = hidden if skip is None else torch.cat([hidden, skip], dim=1)
        return cast(Tensor, self.resnet(joined, temb))


class _Attention(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden: Tensor, keys_and_values: Tensor) -> Tensor:
        output = self.attention(hidden, encoder_hidden_states=keys_and_values, return_dict=False)
        return cast(Tensor, output[0])


class _ConvOut(nn.Module):
    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.norm, self.activation, self.conv = unet.conv_norm_out, unet.conv_act, unet.conv_out

    def forward(self, hidden: Tensor) -> Tensor:
        if self.norm is not None:
            hidden = self.activation(self.norm(hidden))
        return cast(Tensor, self.conv(hidden))
