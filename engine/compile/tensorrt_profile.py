"""Which shapes an engine is built for, as data, and the arithmetic between names and sizes.

A :class:`Profile` gives each named dimension (``batch``, ``height`` …) a range. From it and the
symbolic shapes of a graph's inputs come the shapes that TensorRT is told: tensor by tensor the
smallest, the one to be fast for, and the largest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from engine.compile.manifest import ModelSpec, TensorSpec, scale_of
from engine.compile.tensorrt_flavours import choose_library, gpu_capability
from engine.errors import BackendUnavailableError, PlanError, UnsupportedError

Shape = tuple[int, ...]
Part = Literal["unet", "text", "vae"]

_MAX_RANK = 128
_ROWS, _TEXT_ROWS, _DECODE_ROWS = (1, 8, 32), (1, 1, 8), (1, 1, 4)
_CONTEXT_CHUNKS = 4


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Range(_Frozen):
    """Sizes of one dimension, both ends included; engines are fastest at ``opt``."""

    min: int = Field(ge=0)
    opt: int
    max: int

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.min <= self.opt <= self.max or self.max < 1:
            raise ValueError(f"{self.min} <= {self.opt} <= {self.max} does not hold")
        return self

    @classmethod
    def of(cls, low: int, opt: int, high: int) -> Range:
        """In this order."""
        return cls(min=low, opt=opt, max=high)


class Profile(_Frozen):
    """A range for every named dimension of a graph."""

    batch: Range
    """Rows; a guided trajectory is two."""
    height: Range
    """Latent rows, also of graphs whose tensors are multiples of them."""
    width: Range
    tokens: Range
    rank: Range
    """Of low-rank factors."""

    def sizes(self, end: Literal["min", "opt", "max"]) -> dict[str, int]:
        """One end of every range, by dimension."""
        return {name: getattr(getattr(self, name), end) for name in type(self).model_fields}


class EngineTarget(_Frozen):
    """Everything that decides what engines are built from a graph; part of a plan's digest."""

    flavour: str
    version: str
    """Release of the library that builds; no other reads the engines."""
    capability: str
    """Compute capability of the GPUs that run them, e.g. ``8.9``."""
    unet: Profile
    text: Profile
    vae: Profile

    @classmethod
    def choose(
        cls,
        model: ModelSpec,
        *,
        max_tokens: int,
        precision: str,
        capability: str | None = None,
        flavour: str | None = None,
    ) -> EngineTarget:
        """A target for GPUs of ``capability``, with profiles as wide as the model allows.

        Args:
            max_tokens: tokens of one prompt.
            capability: None: that of this machine's GPU.
            flavour: None: the preferred one of those installed.

        Raises:
            UnsupportedError: no flavour covers these GPUs, or not with this precision.
            BackendUnavailableError: no capability was given and there is no GPU, or nothing that
                can build for it is installed; says what to do.
        """
        capability = capability or gpu_capability()
        if capability is None:
            raise BackendUnavailableError(
                "there is no GPU here to build engines for; name a compute capability, e.g. 8.9"
            )
        library = choose_library(capability, flavour)
        if capability in library.flavour.lacks.get(precision, ()):
            raise UnsupportedError(
                f"{library.flavour.name} has no {precision} on compute capability {capability}"
                f" ({library.flavour.gpus[capability]}); use fp16 or fp32"
            )
        return cls(
            flavour=library.flavour.name,
            version=library.version,
            capability=capability,
            **default_profiles(model, max_tokens, library.flavour.smallest_rank),
        )

    def profile(self, segment: str) -> Profile:
        """That of the network to which a segment belongs."""
        profile: Profile = getattr(self, part_of(segment))
        return profile


def part_of(segment: str) -> Part:
    """The network to which a segment belongs, by its name."""
    match segment.partition(".")[0]:
        case "text":
            return "text"
        case "vae":
            return "vae"
        case _:
            return "unet"


def default_profiles(model: ModelSpec, max_tokens: int, smallest_rank: int) -> dict[Part, Profile]:
    """Every picture that the model draws; batches and ranks up to this module's bounds."""
    latent = model.latent
    side = Range.of(
        *(px // latent.factor_px for px in (latent.min_px, latent.native_px, latent.max_px))
    )
    prompt = Range.of(max_tokens, max_tokens, max_tokens)
    unet = Profile(
        batch=Range.of(*_ROWS),
        height=side,
        width=side,
        tokens=Range.of(max_tokens, max_tokens, _CONTEXT_CHUNKS * max_tokens),
        rank=Range.of(smallest_rank, 16, _MAX_RANK),
    )
    return {
        "unet": unet,
        "text": unet.model_copy(update={"batch": Range.of(*_TEXT_ROWS), "tokens": prompt}),
        "vae": unet.model_copy(update={"batch": Range.of(*_DECODE_ROWS)}),
    }


@dataclass(frozen=True, slots=True)
class ShapeRange:
    """The smallest, best and largest shape of one input."""

    min: Shape
    opt: Shape
    max: Shape


def shape_profile(inputs: Iterable[TensorSpec], profile: Profile) -> dict[str, ShapeRange]:
    """The shapes of every input that ``profile`` allows.

    Raises:
        PlanError: the profile has a size that the graph cannot take, e.g. an odd number of latent
            rows where a segment halves them.
    """
    low, best, high = profile.sizes("min"), profile.sizes("opt"), profile.sizes("max")
    return {
        spec.name: ShapeRange(shape_of(spec, low), shape_of(spec, best), shape_of(spec, high))
        for spec in inputs
    }


def shape_of(spec: TensorSpec, sizes: Mapping[str, int]) -> Shape:
    """The shape of a tensor when its named dimensions have these sizes.

    Raises:
        PlanError: a size is not a multiple of what the shape divides it by.
    """
    return tuple(_size_of(spec.name, dim, sizes) for dim in spec.shape)


def _size_of(tensor: str, dim: int | str, sizes: Mapping[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    name, scale = scale_of(dim)
    size = sizes[name] * scale
    if size.denominator != 1:
        raise PlanError(
            f"{tensor} has {dim}: {name} must be a multiple of {scale.denominator},"
            f" not {sizes[name]}"
        )
    return int(size)
