"""``plan.json``: what a compiled plan holds, as data that the walker follows.

Nothing outside this package knows the name of a UNet block. A segment lists the tensors that it
takes and gives; an input's ``source`` says who produces it, so that cuts and taps are data.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import TYPE_CHECKING, Literal, cast

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch

PLAN_FORMAT = 1
"""Raised when the meaning of a field changes; part of every digest."""

Precision = Literal["fp32", "fp16", "bf16", "int8"]
Backend = Literal["onnxruntime", "torch", "tensorrt"]
DType = Literal["float32", "float16", "bfloat16", "int64", "int32"]


class _Frozen(BaseModel):
    # A scheduler config may hold -Infinity, which plain JSON would turn into null.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Tap(_Frozen):
    """An inner tensor of the UNet that becomes an input or output of its segment's graph.

    An input tap takes hold where the tensor is produced, so every reader sees it. T2I-Adapters
    add to ``down.0.attn.1`` before the downsampler; step reuse takes a tensor out here and puts
    it back there.
    """

    tensor: str
    direction: Literal["in", "out"]
    mode: Literal["add", "replace"] = "add"
    """For an input: added to the tensor (default: nothing is), or given in its place."""

    @property
    def input_name(self) -> str:
        """Graph input of an input tap; an output tap carries the tensor's own name."""
        return f"tap.{self.tensor}"


class TensorSpec(_Frozen):
    """One input or output of a graph.

    ``shape`` holds ints, and names for dynamic dimensions: ``batch``, ``height``, ``width``
    (latent rows and columns), ``tokens``, ``rank``, or a multiple: ``height//2``, ``height*8``.
    """

    name: str
    """Name in the graph file."""
    source: str
    """For an input: the producer's tensor name, or an external name (``sample``, ``timestep``,
    ``context``, ``added.text_embeds``, ``tap.<tensor>`` …). For an output: its tensor name in the
    whole UNet, e.g. ``down.0.attn.1``; a later input with that source receives it."""
    dtype: DType
    shape: tuple[int | str, ...]
    optional: bool = False
    """May be left out; the graph then uses its default (rank-0 factors, zero taps)."""
    skip: int | None = None
    """For an input to which a ControlNet adds: the index among its residuals. 0 is the skip from
    ``conv_in``; the last is the output of mid, as ControlNet lists it. None otherwise."""


def scale_of(dim: str) -> tuple[str, Fraction]:
    """Split a dynamic dimension: ``height//2`` is (``height``, 1/2), ``height*8`` is 8 times it."""
    name, sign, factor = dim.partition("//") if "//" in dim else dim.partition("*")
    if not sign:
        return name, Fraction(1)
    return name, Fraction(1, int(factor)) if sign == "//" else Fraction(int(factor))


def scaled(name: str, scale: Fraction) -> str:
    """The dimension that :func:`scale_of` splits into these."""
    if scale == 1:
        return name
    return f"{name}*{scale}" if scale > 1 else f"{name}//{1 / scale}"


def dtype_name(dtype: torch.dtype) -> DType:
    """How a manifest names a torch dtype."""
    return cast(DType, str(dtype).removeprefix("torch."))


class SegmentSpec(_Frozen):
    """A part of a network as its own graph."""

    name: str
    """Unique in the plan: ``context``, ``down.0`` … ``mid`` … ``up.2``, ``text.0``,
    ``vae.decoder``."""
    file: str
    """Path of the graph inside the plan folder ("" when the runtime rebuilds it from modules)."""
    sha256: str
    """Of ``file``; ``PlanManifest.files`` has every file."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    adapters_file: str | None = None
    """The same graph on the same weights with ``factors`` as further inputs; None without sites."""
    factors: tuple[TensorSpec, ...] = ()
    """Low-rank inputs of its adapter sites. A run that feeds any of them uses ``adapters_file``;
    those it leaves out add nothing. All are optional."""


def constant_segments(segments: Iterable[SegmentSpec]) -> frozenset[str]:
    """Names of those that give the same at every step: they depend on the conditioning alone.

    None of their inputs is, or is made from, the latent, its timestep, a tap's tensor or what a
    ControlNet adds to. The walk runs them when the conditioning changes; int8 leaves them alone.
    """
    changing, constant = {"sample", "timestep"}, set()
    for segment in segments:
        if any(
            port.source in changing or port.source.startswith("tap.") or port.skip is not None
            for port in segment.inputs
        ):
            changing |= {port.source for port in segment.outputs}
        else:
            constant.add(segment.name)
    return frozenset(constant)


class AdapterSite(_Frozen):
    """A linear or 1x1 convolution that takes per-row low-rank factors.

    The graph adds ``up @ (down @ x)`` to the layer's output. ``down_input`` is (batch, rank,
    in_features), ``up_input`` (batch, out_features, rank); scale and alpha are folded into ``up``.
    """

    module: str
    """Path in the Diffusers / Transformers module tree, e.g.
    ``down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q``."""
    segment: str
    in_features: int
    out_features: int
    down_input: str
    up_input: str


class TextEncoderSpec(_Frozen):
    """One text encoder: token ids (batch, tokens) int64 in, hidden states and pooled vector out."""

    segment: SegmentSpec
    tokenizer: str
    """Folder of the tokenizer inside the plan folder (copied there: a plan stands alone)."""
    max_tokens: int
    hidden_size: int
    adapter_sites: tuple[AdapterSite, ...] = ()


class LatentSpec(_Frozen):
    """The latent space: picture = decode(latent / scaling + shift)."""

    channels: int
    factor_px: int
    """Picture pixels per latent cell, each way."""
    scaling: float
    shift: float = 0.0
    size_multiple_px: int
    """Widths and heights must be multiples of this."""
    native_px: int
    """Side of the picture that the checkpoint was trained for."""
    min_px: int
    max_px: int


class ModelSpec(_Frozen):
    """What the engine must know of the checkpoint once its modules are gone."""

    name: str
    family: Literal["sd1", "sd2", "sdxl", "custom"]
    fingerprint: str
    """Digest of weights and configs of the checkpoint."""
    in_channels: int
    """4 for text to image, 9 for inpainting UNets, or whatever the latent space says."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"]
    scheduler_config: dict[str, object]
    """``scheduler/scheduler_config.json`` as found; :mod:`engine.solvers` maps it."""
    text_conditioning: Literal["clip", "sdxl"]
    addition_embed_type: Literal["text", "text_time"] | None
    guidance_embedding_size: int | None
    """``time_cond_proj_dim`` of a guidance-distilled UNet, else None."""
    guidance_default: float
    zero_empty_negative: bool = False
    """An absent negative prompt is embedded as zeros (SDXL's ``force_zeros_for_empty_prompt``)."""
    latent: LatentSpec
    context_size: int
    """Width of the cross-attention context."""


class PlanManifest(_Frozen):
    """Everything in ``plan.json``."""

    format: int = PLAN_FORMAT
    digest: str
    """Digest of everything that went in: weights, configs, exporter and backend versions,
    precision, cuts, taps, quantization recipe."""
    backend: Backend
    precision: Precision
    versions: dict[str, str]
    """Exporter and backend versions, part of the digest."""
    cuts: tuple[str, ...] | None = None
    """Units after which the UNet is cut; None: between blocks."""
    taps: tuple[Tap, ...] = ()
    """Inner tensors that are inputs or outputs of the UNet's segments."""
    recipe: dict[str, object] = Field(default_factory=dict)
    """What changed the graphs after export (quantization), with its dials; part of the digest."""
    target: dict[str, object] = Field(default_factory=dict)
    """What a backend that compiles ahead of time compiled for: library, GPUs and shapes
    (:class:`engine.compile.tensorrt_profile.EngineTarget`); part of the digest."""
    files: dict[str, str] = Field(default_factory=dict)
    """sha256 of every file of the plan but ``plan.json``, by path inside the folder."""
    model: ModelSpec
    unet: tuple[SegmentSpec, ...]
    """In the order in which the walker runs them; the last one gives ``prediction``."""
    text_encoders: tuple[TextEncoderSpec, ...]
    vae_decoder: SegmentSpec
    vae_encoder: SegmentSpec | None
    adapter_sites: tuple[AdapterSite, ...] = Field(default=())
    """Sites of the UNet."""
    preview: tuple[tuple[float, ...], ...] | None = None
    """Linear map from a latent cell to RGB, (channels + 1, 3), from ``engine.vae.fit_preview``;
    the last row is the offset. None: the plan draws no previews."""
