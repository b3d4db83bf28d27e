"""Which quantized graphs TensorRT can be given: symmetric static int8, and nothing else.

Its parser refuses most of the rest by itself, but it takes uint8 values with a zero point of 0,
or without one, for int8: everything above 127 would be cut off without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from engine.errors import PlanError, UnsupportedError

_REFUSED = {
    "DynamicQuantizeLinear",
    "MatMulInteger",
    "ConvInteger",
    "QLinearMatMul",
    "QLinearConv",
}


def refuse_quantization(segment: str, path: Path) -> None:
    """Let symmetric static int8 QuantizeLinear and DequantizeLinear pass, and nothing else.

    Args:
        segment: its name, for the message.
        path: its ONNX file.

    Raises:
        UnsupportedError: naming the node, and what is wrong with it.
        PlanError: the file is no graph.
    """
    import onnx

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # protobuf's, which has no types
        raise PlanError(f"{segment}: {path.name} is no ONNX graph: {error}") from error
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].HasField("t"):
            constants[node.output[0]] = node.attribute[0].t
    for node in graph.node:
        if (reason := _refusal(node, constants, path.parent)) is not None:
            raise UnsupportedError(
                f"{segment}: node {node.name!r} ({node.op_type}) {reason}; TensorRT takes"
                " symmetric static int8 only: constant scales and zero points of 0"
            )


def _refusal(node: Any, constants: dict[str, Any], folder: Path) -> str | None:
    from onnx import TensorProto, numpy_helper

    if node.op_type in _REFUSED:
        return "is no static quantization"
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return None
    value, scale, zero_point = _padded(node.input, 3)
    if scale not in constants:
        return "has a scale that is computed in the graph"
    if zero_point:
        if zero_point not in constants:
            return "has a zero point that is computed in the graph"
        stored = constants[zero_point]
        if numpy_helper.to_array(stored, base_dir=str(folder)).any():
            return "has a zero point that is not 0"
        kind = stored.data_type
    elif node.op_type == "QuantizeLinear":
        given = {attribute.name: attribute.i for attribute in node.attribute}
        kind = given.get("output_dtype") or TensorProto.UINT8
    elif value in constants:
        kind = constants[value].data_type
    else:  # what it reads was quantized by a node that has been checked
        return None
    if kind != TensorProto.INT8:
        return f"is {TensorProto.DataType.Name(kind).lower()}"
    return None


def _padded(names: Iterable[str], length: int) -> Sequence[str]:
    """Optional trailing inputs that were left out, as empty names."""
    found = list(names)
    return found + [""] * (length - len(found))
