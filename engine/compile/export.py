"""What of a checkpoint becomes a graph: UNet segments, text encoders, VAE decoder and encoder.

Each function here takes Diffusers or Transformers modules and returns :class:`GraphSource`, which
holds everything that a manifest says of a graph and everything that a trace needs. Both kinds of
plan come from it: ONNX files by :mod:`engine.compile.onnx_graph`, and torch modules directly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from engine.compile.lowrank import Site, using, wrap_text_encoder, wrap_unet
from engine.compile.manifest import (
    AdapterSite,
    SegmentSpec,
    Tap,
    TensorSpec,
    dtype_name,
    scale_of,
    scaled,
)
from engine.compile.segments import Segment, segments

_BATCH, _TOKENS = 2, 7
_ROOT_HEIGHT, _ROOT_WIDTH = 3, 5
"""Sizes of a trace. All differ, and none is 1, so that no dimension is taken for constant."""


@dataclass(frozen=True, kw_only=True)
class GraphSource:
    """One graph before it is compiled.

    Attributes:
        name: of the segment.
        module: its ``forward`` takes a mapping of named tensors and returns one.
        inputs, outputs: as the manifest lists them.
        examples: one tensor for each input.
        sites: layers of ``module`` that take low-rank factors.
        granularity: ``height`` and ``width`` are always multiples of it.
        max_tokens: that the module takes.
    """

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    examples: Mapping[str, Tensor]
    sites: tuple[Site, ...] = ()
    granularity: int = 1
    max_tokens: int = 2**16

    def segment(self, file: str = "", adapters_file: str | None = None) -> SegmentSpec:
        """As the manifest lists it, with files still to be hashed."""
        return SegmentSpec(
            name=self.name,
            file=file,
            sha256="",
            inputs=self.inputs,
            outputs=self.outputs,
            adapters_file=adapters_file if self.sites else None,
            factors=tuple(factor for site in self.sites for factor in site.factors()),
        )

    def adapter_sites(self) -> tuple[AdapterSite, ...]:
        """Its low-rank sites as the manifest lists them."""
        return tuple(site.listed(self.name) for site in self.sites)


def export_unet(
    unet: nn.Module, cuts: Sequence[str] | None = None, taps: Sequence[Tap] = ()
) -> list[GraphSource]:
    """The UNet as a chain of graphs, in the order in which they run.

    Args:
        unet: Diffusers' ``UNet2DConditionModel``; its low-rank sites are wrapped in place.
        cuts: units after which to cut (see :mod:`engine.compile.units`); None: between blocks.
        taps: inner tensors to let out or in.

    Raises:
        PlanError: a cut or tap names no unit.
        UnsupportedError: the UNet holds something that has no unit.
    """
    unet = cast(UNet2DConditionModel, unet)
    sites = wrap_unet(unet)
    granularity = 2 ** (len(cast(nn.ModuleList, unet.down_blocks)) - 1)
    known = _unet_examples(unet, granularity)
    sources = []
    for part in segments(unet, cuts, taps, sites):
        with torch.no_grad():
            known |= part.run_units({read.name: known[read.source] for read in part.all_reads})
        feeds = {read.name: known[read.source] for read in part.reads}
        sources.append(_unet_graph(part, feeds, known, granularity))
    return sources


def _unet_examples(unet: UNet2DConditionModel, granularity: int) -> dict[str, Tensor]:
    """The tensors that enter the UNet from outside, by the names that units read."""
    config: Any = unet.config
    dtype = unet.conv_in.weight.dtype

    def random(*shape: int) -> Tensor:
        return torch.randn(_BATCH, *shape, generator=generator, dtype=torch.float32).to(dtype)

    generator = torch.Generator().manual_seed(0)
    size = (_ROOT_HEIGHT * granularity, _ROOT_WIDTH * granularity)
    examples = {
        "sample": random(config.in_channels, *size),
        "timestep": torch.tensor([999.0, 3.5]),
        "context": random(_TOKENS, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        ids = 6
        width = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
        examples["added.text_embeds"] = random(width)
        examples["added.time_ids"] = torch.full((_BATCH, ids), 512.0)
    if config.time_cond_proj_dim is not None:
        examples["added.timestep_cond"] = random(config.time_cond_proj_dim)
    return examples


def _unet_graph(
    part: Segment, feeds: Mapping[str, Tensor], known: Mapping[str, Tensor], granularity: int
) -> GraphSource:
    height = _ROOT_HEIGHT * granularity

    def spec(name: str, source: str, tensor: Tensor, **more: Any) -> TensorSpec:
        shape: tuple[int | str, ...]
        match tensor.ndim:
            case 4:
                scale = Fraction(tensor.shape[2], height)
                shape = ("batch", tensor.shape[1], scaled("height", scale), scaled("width", scale))
            case 3:
                shape = ("batch", "tokens", tensor.shape[2])
            case _:
                shape = ("batch", *tensor.shape[1:])
        return TensorSpec(
            name=name, source=source, dtype=dtype_name(tensor.dtype), shape=shape, **more
        )

    inputs = [spec(r.name, r.source, feeds[r.name], skip=r.skip) for r in part.reads]
    for tap in part.input_taps.values():
        name = tap.input_name
        inputs.append(spec(name, name, known[tap.tensor], optional=tap.mode == "add"))
    taps = {tap.input_name: known[tap.tensor] for tap in part.input_taps.values()}
    return GraphSource(
        name=part.name,
        module=part,
        inputs=tuple(inputs),
        outputs=tuple(spec(name, name, known[name]) for name in part.gives),
        examples={**feeds, **taps},
        sites=part.sites,
        granularity=_granularity(part, inputs, granularity),
    )


def _granularity(part: Segment, inputs: Sequence[TensorSpec], whole: int) -> int:
    """What heights must be multiples of for the trace: of less than the UNet's, where they may.

    A segment that goes down and up again joins tensors that fit only if nothing was rounded. In
    others the inputs alone must be whole numbers, and torch reasons faster about smaller factors.
    """
    kinds = {name.rpartition(".")[2] for name in part.unit_names}
    if {"downsample", "upsample"} <= kinds:
        return whole
    scales = [scale_of(str(spec.shape[2]))[1] for spec in inputs if len(spec.shape) == 4]
    return max((scale.denominator for scale in scales), default=1)


def export_text_encoder(encoder: nn.Module, name: str) -> GraphSource:
    """A CLIP text encoder: token ids (batch, tokens) int64 to hidden states and pooled vector.

    Outputs are ``normed.-k`` and ``hidden.-k``, the state k layers from the end with and without
    the final norm, for every k that leaves a layer, and ``pooled`` (projected, where the encoder
    has a projection). Stable Diffusion takes ``normed.-1``, SDXL ``hidden.-2``.
    """
    sites = wrap_text_encoder(encoder)
    module = _TextEncoder(encoder, sites)
    examples = {"input_ids": torch.arange(_BATCH * _TOKENS).view(_BATCH, _TOKENS)}
    with torch.no_grad():
        outputs = module(examples)
    shapes = {3: ("batch", "tokens"), 2: ("batch",)}
    return GraphSource(
        name=name,
        module=module,
        inputs=(
            TensorSpec(
                name="input_ids", source="input_ids", dtype="int64", shape=("batch", "tokens")
            ),
        ),
        outputs=tuple(
            TensorSpec(
                name=key,
                source=key,
                dtype=dtype_name(tensor.dtype),
                shape=(*shapes[tensor.ndim], tensor.shape[-1]),
            )
            for key, tensor in outputs.items()
        ),
        examples=examples,
        sites=sites,
        max_tokens=module.embeddings.position_embedding.num_embeddings,
    )


class _TextEncoder(nn.Module):
    """Transformers' CLIP text model, walked by hand for the states that Diffusers takes from it."""

    def __init__(self, encoder: nn.Module, sites: Sequence[Site]) -> None:
        super().__init__()
        model: Any = getattr(encoder, "text_model", encoder)
        self.embeddings, self.layers = model.embeddings, model.encoder.layers
        self.final_norm = model.final_layer_norm
        self.projection = getattr(encoder, "text_projection", None)
        self.end_token = int(model.eos_token_id)
        self.sites = sites

    def forward(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ids = feeds["input_ids"]
        hidden: Tensor = self.embeddings(input_ids=ids)
        ahead = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).triu(1)
        mask = torch.zeros_like(ahead, dtype=hidden.dtype)
        mask = mask.masked_fill(ahead, torch.finfo(hidden.dtype).min)[None, None]
        states: list[Tensor] = []
        with using(self.sites, feeds):
            for layer in self.layers:
                states.append(hidden)
                hidden = layer(hidden, attention_mask=mask)
        last: Tensor = self.final_norm(hidden)
        pooled = last.gather(1, self._end(ids)[:, None, None].expand(-1, 1, last.shape[2]))[:, 0]
        if self.projection is not None:
            pooled = self.projection(pooled)
        outputs = {"normed.-1": last}
        for k, state in enumerate(reversed(states), start=2):
            outputs |= {f"hidden.-{k}": state}
            if k <= len(self.layers):
                outputs |= {f"normed.-{k}": self.final_norm(state)}
        return outputs | {"pooled": pooled}

    def _end(self, ids: Tensor) -> Tensor:
        """Place of the token whose state is pooled, (batch,).

        Configs from before Transformers 4.30 name token 2, which is not in the text: there it is
        the largest id, as OpenAI's own code has it.
        """
        return (ids if self.end_token == 2 else (ids == self.end_token)).int().argmax(dim=1)


def export_vae(vae: nn.Module) -> tuple[GraphSource, GraphSource]:
    """VAE decoder and encoder of Diffusers' ``AutoencoderKL``.

    The decoder takes an unscaled ``latent`` and gives a ``picture`` (batch, 3, H, W) in -1 … 1;
    the encoder takes such a picture and gives ``moments``, mean and log-variance side by side.
    """
    config: Any = vae.config
    dtype = next(vae.parameters()).dtype
    factor = 2 ** (len(config.block_out_channels) - 1)
    latent = torch.randn(_BATCH, config.latent_channels, _ROOT_HEIGHT, _ROOT_WIDTH).to(dtype)
    picture = torch.randn(_BATCH, 3, _ROOT_HEIGHT * factor, _ROOT_WIDTH * factor).to(dtype)

    def spec(name: str, channels: int, scale: int) -> TensorSpec:
        size = (scaled("height", Fraction(scale)), scaled("width", Fraction(scale)))
        return TensorSpec(
            name=name, source=name, dtype=dtype_name(dtype), shape=("batch", channels, *size)
        )

    decoder = GraphSource(
        name="vae.decoder",
        module=_VaeDecoder(vae),
        inputs=(spec("latent", config.latent_channels, 1),),
        outputs=(spec("picture", 3, factor),),
        examples={"latent": latent},
    )
    encoder = GraphSource(
        name="vae.encoder",
        module=_VaeEncoder(vae),
        inputs=(spec("picture", 3, factor),),
        outputs=(spec("moments", 2 * config.latent_channels, 1),),
        examples={"picture": picture},
    )
    return decoder, encoder


class _VaeDecoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.convolution, self.decoder = vae.post_quant_conv or nn.Identity(), vae.decoder

    def forward(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"picture": self.decoder(self.convolution(feeds["latent"]))}


class _VaeEncoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.encoder, self.convolution = vae.encoder, vae.quant_conv or nn.Identity()

    def forward(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"moments": self.convolution(self.encoder(feeds["picture"]))}
