"""ONNX segments to TensorRT engines: strongly typed, with explicit shape profiles.

The parser is helpful in ways that would change pictures without a word, so its result is never
taken on trust. An input with a default becomes a constant (the input vanishes); uint8 values
become int8 ones. What it parsed is compared with the manifest, and quantization is checked
before it sees the file.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.compile.manifest import DType, PlanManifest, SegmentSpec, TensorSpec
from engine.compile.tensorrt_flavours import Library, load_library
from engine.compile.tensorrt_profile import EngineTarget, ShapeRange, shape_profile
from engine.compile.tensorrt_quantization import refuse_quantization
from engine.errors import BackendUnavailableError, PlanError

ENGINES = "engines"
"""Folder of a plan with its engine files."""

DATA_TYPES: dict[DType, str] = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int64": "INT64",
    "int32": "INT32",
}
"""How TensorRT names the types of a manifest."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One engine to be built.

    Attributes:
        name: of the segment.
        path: its ONNX file; weights lie beside it.
        inputs, outputs: what the engine's bindings must be.
    """

    name: str
    path: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def build_engines(
    folder: Path,
    manifest: PlanManifest,
    target: EngineTarget,
    progress: Callable[[str, int, int], None],
) -> PlanManifest:
    """Replace the graphs in ``folder`` by engines, and return the manifest that says so.

    Raises:
        PlanError: TensorRT cannot build a graph; names the segment, and the node if it is one.
        UnsupportedError: a graph is quantized in a way that TensorRT does not take.
        BackendUnavailableError: the target's library is not the one that is installed.
    """
    segments = [
        *manifest.unet,
        *(text.segment for text in manifest.text_encoders),
        manifest.vae_decoder,
        *([manifest.vae_encoder] if manifest.vae_encoder is not None else []),
    ]
    (folder / ENGINES).mkdir()
    built: dict[str, SegmentSpec] = {}
    for i, segment in enumerate(segments):
        progress(f"building the engine of {segment.name}", i, len(segments))
        files: dict[str, str] = {}
        for field, source in _sources(folder, segment):
            file = f"{ENGINES}/{source.path.with_suffix('.engine').name}"
            (folder / file).write_bytes(build_engine(source, target))
            files[field] = file
        built[segment.name] = segment.model_copy(update=files)
    for graphs in {(folder / segment.file).parent for segment in segments} - {folder}:
        shutil.rmtree(graphs)
    progress("built the engines", len(segments), len(segments))
    encoder = manifest.vae_encoder
    return manifest.model_copy(
        update={
            "unet": tuple(built[segment.name] for segment in manifest.unet),
            "text_encoders": tuple(
                text.model_copy(update={"segment": built[text.segment.name]})
                for text in manifest.text_encoders
            ),
            "vae_decoder": built[manifest.vae_decoder.name],
            "vae_encoder": None if encoder is None else built[encoder.name],
        }
    )


def _sources(folder: Path, segment: SegmentSpec) -> Iterator[tuple[str, Source]]:
    """What to build for a segment, by the field that names the file."""
    yield (
        "file",
        Source(
            name=segment.name,
            path=folder / segment.file,
            inputs=segment.inputs,
            outputs=segment.outputs,
        ),
    )
    if segment.adapters_file is not None:
        yield (
            "adapters_file",
            Source(
                name=segment.name,
                path=folder / segment.adapters_file,
                inputs=(*segment.inputs, *segment.factors),
                outputs=segment.outputs,
            ),
        )


def build_engine(source: Source, target: EngineTarget) -> bytes:
    """Build one engine, as a file's content.

    Raises:
        PlanError: TensorRT cannot build it; names the node where it is one.
        UnsupportedError: it is quantized in a way that TensorRT does not take.
        BackendUnavailableError: the target's library is not the one that is installed.
    """
    shapes = shape_profile(source.inputs, target.profile(source.name))
    refuse_quantization(source.name, source.path)
    library = load_library(target.flavour)
    if library.version != target.version:
        raise BackendUnavailableError(
            f"engines of {target.flavour} {target.version} cannot be built with {library.version}"
        )
    with library.lock:
        library.errors()
        network = Network.parse(library, source)
        network.check(source)
        return network.build(source.name, target.capability, shapes)


@dataclass(frozen=True, slots=True)
class Network:
    """A parsed graph.

    Attributes:
        builder, network: TensorRT's objects.
        parser: holds the weights, and must outlive the build.
    """

    library: Library
    builder: Any
    network: Any
    parser: Any

    @classmethod
    def parse(cls, library: Library, source: Source) -> Network:
        """Read an ONNX file.

        Raises:
            PlanError: a node cannot be parsed; the message names it.
        """
        trt = library.trt
        builder = trt.Builder(library.logger)
        typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = builder.create_network(typed)
        parser = trt.OnnxParser(network, library.logger)
        if not parser.parse_from_file(str(source.path)):
            found = [parser.get_error(i) for i in range(parser.num_errors)]
            reasons = [f"{_place(error)}: {error.desc()}" for error in found]
            raise PlanError(
                f"{source.name}: TensorRT cannot parse the graph:"
                f" {'; '.join(reasons) or library.errors()}"
            )
        return cls(library, builder, network, parser)

    def check(self, source: Source) -> None:
        """Hold what was parsed against what the manifest says.

        Raises:
            PlanError: an input or output vanished, appeared, or has another type or shape.
        """
        net = self.network
        inputs = [net.get_input(i) for i in range(net.num_inputs)]
        outputs = [net.get_output(i) for i in range(net.num_outputs)]
        for kind, specs, tensors in (
            ("input", source.inputs, inputs),
            ("output", source.outputs, outputs),
        ):
            found = {tensor.name: tensor for tensor in tensors}
            if lost := [spec.name for spec in specs if spec.name not in found]:
                raise PlanError(
                    f"{source.name}: what TensorRT parsed has no {kind} {lost[0]!r}; its parser"
                    " makes a constant of an input with a default value"
                )
            if extra := set(found) - {spec.name for spec in specs}:
                raise PlanError(f"{source.name}: the graph has an unknown {kind} {min(extra)!r}")
            for spec in specs:
                self._check_tensor(source.name, kind, spec, found[spec.name])

    def _check_tensor(self, segment: str, kind: str, spec: TensorSpec, tensor: Any) -> None:
        expected = getattr(self.library.trt.DataType, DATA_TYPES[spec.dtype])
        if tensor.dtype != expected:
            raise PlanError(f"{segment}: {kind} {spec.name!r} is {tensor.dtype}, not {spec.dtype}")
        # The parser may lose a literal size of an output behind run-time arithmetic: -1 is none.
        shape = tuple(tensor.shape)
        fits = len(shape) == len(spec.shape) and all(
            got == -1 if isinstance(dim, str) else got in (dim, -1)
            for got, dim in zip(shape, spec.shape, strict=True)
        )
        if not fits:
            raise PlanError(f"{segment}: {kind} {spec.name!r} is {shape}, not {spec.shape}")

    def build(self, segment: str, capability: str, shapes: dict[str, ShapeRange]) -> bytes:
        """Compile it.

        Raises:
            PlanError: the profile does not fit, or no kernels can be had; gives TensorRT's reason.
        """
        profile = self.builder.create_optimization_profile()
        for name, shape in shapes.items():
            try:
                profile.set_shape(name, shape.min, shape.opt, shape.max)
            except ValueError as error:
                raise PlanError(f"{segment}: no profile {shape} for {name!r}: {error}") from error
        config = self._config(capability)
        if config.add_optimization_profile(profile) < 0:
            raise PlanError(f"{segment}: the profile is refused: {self.library.errors()}")
        engine = self.builder.build_serialized_network(self.network, config)
        if engine is None:
            raise PlanError(f"{segment}: TensorRT built no engine: {self.library.errors()}")
        return bytes(engine)

    def _config(self, capability: str) -> Any:
        trt = self.library.trt
        config = self.builder.create_builder_config()
        if self.library.flavour.ahead_of_time:
            config.num_compute_capabilities = 1
            kind = getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}")
            config.set_compute_capability(kind, 0)
        # fp32 means fp32: TF32 keeps 10 bits of each factor.
        config.clear_flag(trt.BuilderFlag.TF32)
        if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
            # Nothing is allocated during a run, so that it can be recorded as a CUDA graph.
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        return config


def _place(error: Any) -> str:
    """Which node a parser's error is about; errors before the first node have none."""
    name, operator = error.node_name(), error.node_operator()
    return f"node {name!r} ({operator})" if name or operator else "the file"
