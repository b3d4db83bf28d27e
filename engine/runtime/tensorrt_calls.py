"""What a run of an engine needs, worked out from names and shapes alone: no GPU, no TensorRT.

A manifest says what a graph takes and gives, an engine what it was built with. Here the two are
held against each other once, when the engine is opened, and every call is planned: which inputs
get zeros, how large the outputs are, and whether the sizes are those that the engine was built for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from engine.compile.manifest import DType, TensorSpec, scale_of
from engine.compile.tensorrt_flavours import FLAVOURS
from engine.compile.tensorrt_profile import EngineTarget, Shape, ShapeRange, shape_of
from engine.errors import (
    BackendUnavailableError,
    ExecutionError,
    LimitExceededError,
    PlanCorruptError,
)

ALIGNMENT = 256
"""Bytes to which TensorRT wants memory aligned."""

_UNITS = {"batch": "rows", "height": "latent rows", "width": "latent columns"}

Bounds = Mapping[str, tuple[int, int]]
"""Smallest and largest size of each named dimension."""


@dataclass(frozen=True, kw_only=True)
class EngineTensor:
    """One binding, as an opened engine describes it.

    Attributes:
        dtype: as manifests name it; None for a type that they do not know.
        shape: -1 where it is dynamic.
        on_device: its memory is the GPU's.
        range: for an input, what the engine's profile allows.
    """

    name: str
    dtype: DType | None
    shape: Shape
    is_input: bool
    on_device: bool = True
    range: ShapeRange | None = None


@dataclass(frozen=True)
class Call:
    """One run.

    Attributes:
        inputs: the shape of every input, in the engine's order.
        zeros: inputs that were left out, and get zeros: a low-rank product with a zero factor,
            or a tap of zeros, adds nothing.
        outputs: the shape of every output.
    """

    inputs: Mapping[str, Shape]
    zeros: frozenset[str]
    outputs: Mapping[str, Shape]

    @property
    def key(self) -> tuple[tuple[str, Shape], ...]:
        """Equal for calls that one recording can serve."""
        return tuple(self.inputs.items())


def check_target(target: EngineTarget, version: str, capability: str) -> None:
    """Hold what engines were built for against this machine.

    Args:
        version: of the installed library of the target's flavour.
        capability: of the GPU that is to run them.

    Raises:
        BackendUnavailableError: another release or another kind of GPU; says what to build.
    """
    if capability != target.capability:
        flavour = FLAVOURS[target.flavour]
        kind = flavour.gpus.get(target.capability, "no known GPU")
        advice = (
            f"build the plan for {capability}" if capability in flavour.gpus else flavour.covered()
        )
        raise BackendUnavailableError(
            f"the plan's engines are for compute capability {target.capability} ({kind}), this GPU"
            f" has {capability}: {advice}"
        )
    if version != target.version:
        raise BackendUnavailableError(
            f"the plan's engines were built by {target.flavour} {target.version} and no other"
            f" release reads them; {version} is installed: build the plan again"
        )


def check_engine(
    segment: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    tensors: Iterable[EngineTensor],
) -> None:
    """Hold an engine's bindings against the manifest.

    Raises:
        PlanCorruptError: a binding is missing, unknown, or has another direction, type or shape.
    """
    found = {tensor.name: tensor for tensor in tensors}
    known = {spec.name for spec in (*inputs, *outputs)}
    if unknown := set(found) - known:
        raise PlanCorruptError(f"{segment}: its engine has an unknown binding {min(unknown)!r}")
    for specs, is_input in ((inputs, True), (outputs, False)):
        for spec in specs:
            tensor = found.get(spec.name)
            if tensor is None or tensor.is_input != is_input:
                kind = "input" if is_input else "output"
                raise PlanCorruptError(f"{segment}: its engine has no {kind} {spec.name!r}")
            if tensor.dtype != spec.dtype or not _alike(tensor.shape, spec.shape):
                raise PlanCorruptError(
                    f"{segment}: {spec.name!r} of its engine is {tensor.dtype} {tensor.shape},"
                    f" not {spec.dtype} {spec.shape}"
                )
            if not tensor.on_device:
                raise PlanCorruptError(f"{segment}: its engine wants {spec.name!r} on the host")


def _alike(shape: Shape, spec: tuple[int | str, ...]) -> bool:
    """Whether an engine's shape is that of a spec; a name with a single size may be a number."""
    return len(shape) == len(spec) and all(
        isinstance(dim, str) or got in (dim, -1) for got, dim in zip(shape, spec, strict=True)
    )


def bounds_of(inputs: Iterable[TensorSpec], tensors: Iterable[EngineTensor]) -> Bounds:
    """The sizes of each named dimension that every input of the engine allows."""
    ranges = {tensor.name: tensor.range for tensor in tensors if tensor.range is not None}
    bounds: dict[str, tuple[int, int]] = {}
    for spec in inputs:
        if (allowed := ranges.get(spec.name)) is None:
            continue
        for dim, low, high in zip(spec.shape, allowed.min, allowed.max, strict=True):
            if isinstance(dim, str):
                name, scale = scale_of(dim)
                ends = math.ceil(low / scale), math.floor(high / scale)
                known = bounds.get(name, ends)
                bounds[name] = max(known[0], ends[0]), min(known[1], ends[1])
    return bounds


def plan_call(
    segment: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    bounds: Bounds,
    fed: Mapping[str, Shape],
) -> Call:
    """Plan one run of an engine.

    Args:
        fed: shapes of the inputs that the caller gave. One without elements (a factor of rank 0)
            counts as left out.

    Raises:
        LimitExceededError: a size is not among those that the engine was built for.
        ExecutionError: shapes that contradict the manifest, or each other.
    """
    given = {name: shape for name, shape in fed.items() if 0 not in shape}
    sizes: dict[str, int] = {}
    for spec in inputs:
        if spec.name in given:
            _read_sizes(segment, spec, given[spec.name], sizes)
        elif not spec.optional:
            raise ExecutionError(f"{segment}: input {spec.name!r} is missing or empty")
    for name, size in sizes.items():
        _check_bound(segment, name, size, bounds)
    # A dimension that no given input has (the rank, when no factor is given) is as small as can be.
    complete = {name: max(low, 1) for name, (low, _) in bounds.items()} | sizes
    return Call(
        inputs={spec.name: shape_of(spec, complete) for spec in inputs},
        zeros=frozenset(spec.name for spec in inputs if spec.name not in given),
        outputs={spec.name: shape_of(spec, complete) for spec in outputs},
    )


def _read_sizes(segment: str, spec: TensorSpec, shape: Shape, sizes: dict[str, int]) -> None:
    """Add to ``sizes`` what the shape of one input says of its named dimensions."""
    if len(shape) != len(spec.shape):
        raise ExecutionError(f"{segment}: input {spec.name!r} is {shape}, not {spec.shape}")
    for dim, got in zip(spec.shape, shape, strict=True):
        if isinstance(dim, int):
            if got != dim:
                raise ExecutionError(f"{segment}: input {spec.name!r} is {shape}, not {spec.shape}")
            continue
        name, scale = scale_of(dim)
        size = got / scale
        if size.denominator != 1 or sizes.setdefault(name, int(size)) != size:
            raise ExecutionError(
                f"{segment}: input {spec.name!r} is {shape}, which does not go with"
                f" {name} {sizes.get(name, size)}"
            )


def _check_bound(segment: str, name: str, size: int, bounds: Bounds) -> None:
    low, high = bounds.get(name, (size, size))
    if not low <= size <= high:
        allowed = f"exactly {low}" if low == high else f"{low} to {high}"
        raise LimitExceededError(
            f"{segment}: {size} {_UNITS.get(name, name)} are outside of what the plan's engines"
            f" were built for: {allowed}",
            field=name,
            limit=high if size > high else low,
        )


Key = TypeVar("Key")


def lay_out(sizes: Mapping[Key, int]) -> tuple[dict[Key, int], int]:
    """Places in one buffer for blocks of ``sizes`` bytes: offset of each, and bytes of all."""
    offsets, end = {}, 0
    for key, size in sizes.items():
        offsets[key] = end
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, end
