"""Graph surgery for int8: which nodes can be quantized, and how the quantized ones are written.

A quantized node reads its activation through QuantizeLinear and DequantizeLinear with one static
scale, and its weights from int8 with one scale per output channel. A runtime fuses that into an
integer product. Nothing here decides which nodes; see :mod:`engine.compile.sensitivity`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import external_data_helper, helper, numpy_helper

from engine.compile.quantize_scales import FloatArray, Scale, quantized_weights
from engine.errors import PlanError

_INLINE_BYTES = 1024
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """What one backend's integer kernels take.

    Attributes:
        signed: activations are symmetric int8 with zero point 0; else uint8 with any zero point.
        weight_bits: 8, or 7 where u8 x s8 products saturate at 16 bits (x86 without VNNI).
        outputs: a convolution gives uint8 too, and its bias is int32: the only form that ONNX
            Runtime fuses. Matrix products give float everywhere.
    """

    signed: bool
    weight_bits: Literal[7, 8]
    outputs: bool


@dataclass(frozen=True, slots=True)
class Site:
    """A node that can be quantized: a convolution or a product with a constant matrix.

    Attributes:
        node: its name; the same in both variants of a segment.
        x, y: its activation and its output, by tensor name.
        fan_in: multiply-adds for one element of ``y``.
    """

    node: str
    kind: Literal["conv", "matmul"]
    x: str
    y: str
    weight: str
    bias: str | None
    fan_in: int


@dataclass
class GraphFile:
    """One ONNX file, its weights left on disk until they are asked for."""

    path: Path
    model: Any = field(init=False)

    def __post_init__(self) -> None:
        self.model = onnx.load(str(self.path), load_external_data=False)

    def copy(self) -> GraphFile:
        """One more, to be changed."""
        return GraphFile(self.path)

    @cached_property
    def initializers(self) -> dict[str, Any]:
        """Constants by name, as they lie in the file."""
        return {tensor.name: tensor for tensor in self.model.graph.initializer}

    def array(self, name: str) -> npt.NDArray[Any]:
        """A constant's values."""
        tensor = onnx.TensorProto()
        tensor.CopyFrom(self.initializers[name])
        if external_data_helper.uses_external_data(tensor):
            external_data_helper.load_external_data_for_tensor(tensor, str(self.path.parent))
        return np.asarray(numpy_helper.to_array(tensor))

    def sites(self) -> list[Site]:
        """Every node that can be quantized, in graph order.

        Products of two activations (attention) are none: in int8 they took 1.03 to 1.2 times as
        long at 16 to 256 tokens, as long at 1024. Nor is Gemm: one vector a row, time embedding.
        """
        found = []
        for node in self.model.graph.node:
            weight = self.initializers.get(node.input[1]) if len(node.input) > 1 else None
            if weight is None or weight.data_type != onnx.TensorProto.FLOAT:
                continue
            shape = list(weight.dims)
            if node.op_type == "Conv":
                bias = node.input[2] if len(node.input) > 2 else None
                fan_in = math.prod(shape[1:])
                kind: Literal["conv", "matmul"] = "conv"
            elif node.op_type == "MatMul" and len(shape) == 2:
                bias, fan_in, kind = None, shape[0], "matmul"
            else:
                continue
            x, w = node.input[:2]
            found.append(Site(node.name, kind, x, node.output[0], w, bias, fan_in))
        return found

    def save(self, path: Path) -> None:
        """Write the graph alone; it must lie in the folder of its weights."""
        onnx.save(self.model, str(path))


def insert_qdq(
    graph: GraphFile, sites: Iterable[Site], scales: Mapping[str, Scale], scheme: Scheme
) -> None:
    """Quantize ``sites`` of ``graph`` in place, in memory; float weights become unused.

    Args:
        scales: of every site's ``x``, and of ``y`` where the scheme quantizes outputs.
    """
    _Surgery(graph, {site.node: site for site in sites}, scales, scheme).run()


class _Surgery:
    """One rewriting of one graph."""

    def __init__(
        self,
        graph: GraphFile,
        sites: Mapping[str, Site],
        scales: Mapping[str, Scale],
        scheme: Scheme,
    ) -> None:
        self._graph = graph
        self._sites = sites
        self._scales = scales
        self._scheme = scheme
        self._nodes: list[Any] = []
        self._added: dict[str, Any] = {}
        self._activations: dict[str, str] = {}

    def run(self) -> None:
        proto = self._graph.model.graph
        for node in list(proto.node):
            site = self._sites.get(node.name)
            if site is None:
                self._nodes.append(node)
            else:
                self._quantize(node, site)
        proto.ClearField("node")
        proto.node.extend(self._nodes)
        used = {name for node in proto.node for name in node.input}
        inputs = {value.name for value in proto.input}  # their initializers are defaults
        kept = [t for t in proto.initializer if t.name in used or t.name in inputs]
        proto.ClearField("initializer")
        proto.initializer.extend([*kept, *self._added.values()])

    def _quantize(self, node: Any, site: Site) -> None:
        scheme = self._scheme
        node.input[0] = self._activation(site.x)
        weight_scales = self._weight(node, site)
        if site.kind == "matmul" or not scheme.outputs:
            self._nodes.append(node)
            return
        if site.bias is not None:
            self._bias(node, site, weight_scales)
        raw = f"{site.y}.float"
        node.output[0] = raw
        self._nodes.append(node)
        self._round_trip(raw, site.y, self._scales[site.y])

    def _activation(self, x: str) -> str:
        if x not in self._activations:
            self._activations[x] = f"{x}.dequantized"
            self._round_trip(x, self._activations[x], self._scales[x])
        return self._activations[x]

    def _round_trip(self, source: str, target: str, scale: Scale) -> None:
        stem = f"{source}.quantized"
        kind = np.int8 if self._scheme.signed else np.uint8
        names = [
            self._constant(f"{stem}.scale", np.float32(scale.scale)),
            self._constant(f"{stem}.zero", kind(scale.zero)),
        ]
        self._add("QuantizeLinear", [source, *names], stem)
        self._add("DequantizeLinear", [stem, *names], target)

    def _weight(self, node: Any, site: Site) -> FloatArray:
        axis = 0 if site.kind == "conv" else 1
        weights = np.asarray(self._graph.array(site.weight), np.float32)
        stored, scales = quantized_weights(weights, axis, self._scheme.weight_bits)
        node.input[1] = f"{site.node}.weight"
        self._dequantize(node.input[1], f"{site.weight}.int8", stored, scales, axis)
        return scales

    def _bias(self, node: Any, site: Site, weight_scales: FloatArray) -> None:
        assert site.bias is not None
        scales = np.float32(self._scales[site.x].scale) * weight_scales
        limit = 2**31 - 1
        stored = np.clip(
            np.rint(self._graph.array(site.bias) / scales.astype(np.float64)), -limit, limit
        )
        node.input[2] = f"{site.node}.bias"
        self._dequantize(
            node.input[2], f"{site.node}.bias.int32", stored.astype(np.int32), scales, 0
        )

    def _dequantize(
        self, target: str, name: str, stored: npt.NDArray[Any], scales: FloatArray, axis: int
    ) -> None:
        names = [
            self._constant(name, stored),
            self._constant(f"{name}.scale", scales),
            self._constant(f"{name}.zero", np.zeros(len(scales), stored.dtype)),
        ]
        self._add("DequantizeLinear", names, target, axis=axis)

    def _constant(self, name: str, value: Any) -> str:
        if name not in self._added:
            self._added[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def _add(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> None:
        self._nodes.append(
            helper.make_node(kind, inputs, [output], name=f"{output}.{kind}", **attributes)
        )


def write_together(graphs: Sequence[GraphFile], weights: Path) -> None:
    """Write graphs that share constants: one new file of weights, and the graph files over it.

    Every constant of more than 1 kB goes into ``weights``, once; the old file is replaced, so
    constants that no graph uses any more are gone.
    """
    temporary = weights.with_suffix(".part")
    places: dict[str, tuple[int, int]] = {}
    with temporary.open("wb") as file:
        for graph in graphs:
            for tensor in graph.model.graph.initializer:
                if tensor.name not in places and _bytes(tensor) > _INLINE_BYTES:
                    file.write(b"\0" * (-file.tell() % _ALIGNMENT))
                    data = _values(graph, tensor).tobytes()
                    places[tensor.name] = (file.tell(), len(data))
                    file.write(data)
    for graph in graphs:
        for tensor in graph.model.graph.initializer:
            if tensor.name in places:
                _point(tensor, weights.name, *places[tensor.name])
    temporary.replace(weights)
    for graph in graphs:
        graph.save(graph.path)
        try:
            onnx.checker.check_model(str(graph.path))
        except onnx.checker.ValidationError as error:
            raise PlanError(f"{graph.path.name} is not valid ONNX: {error}") from error


def _bytes(tensor: Any) -> int:
    return int(math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _values(graph: GraphFile, tensor: Any) -> npt.NDArray[Any]:
    if external_data_helper.uses_external_data(tensor):
        return graph.array(tensor.name)
    return np.asarray(numpy_helper.to_array(tensor))


def _point(tensor: Any, file: str, offset: int, length: int) -> None:
    for part in ("raw_data", "float_data", "int32_data", "int64_data", "external_data"):
        tensor.ClearField(part)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", file), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
