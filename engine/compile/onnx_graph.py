"""One torch module to ONNX graph files, with dynamic shapes and, at its sites, low-rank inputs.

A module is traced once. Its low-rank sites leave markers in the graph, from which two files are
written that share one file of weights: ``x.onnx``, without the markers, and ``x.adapters.onnx``,
where each of them adds ``up @ (down @ x)``. Two files because a site costs time even while its
factors are empty, and markers because tracing each factor as an input takes minutes.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnxscript import opset20 as op
from torch import Tensor, nn
from torch._dynamo.exc import UserError
from torch.fx.experimental import _config as config

from engine.compile.export import GraphSource
from engine.compile.lowrank import MARKER, Site, marking
from engine.compile.manifest import TensorSpec, scale_of
from engine.errors import PlanError, UnsupportedError

OPSET = 20
_INLINE_BYTES = 1024
"""Smaller constants stay in the graph file, where shape inference sees them."""


def write_graphs(source: GraphSource, path: Path, *, plain_factors: bool = False) -> None:
    """Trace ``source`` and write ``path`` and, if it has sites, ``adapters_path(path)``.

    Args:
        plain_factors: make low-rank factors and added taps required inputs; TensorRT's parser
            would fold an input that has a default into a constant.

    Raises:
        PlanError: the module cannot be traced, or the result is no valid ONNX.
        UnsupportedError: it has attention of a kind that is not exported.
    """
    model = _trace(source, plain=plain_factors)
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = path.with_suffix(".weights")
    model = ir.external_data.unload_from_model(
        model, path.parent, weights.name, size_threshold_bytes=_INLINE_BYTES
    )
    if source.sites:
        adapters = model.clone()
        _expand_markers(adapters, source.sites, plain=plain_factors)
        _save(adapters, adapters_path(path))
    _drop_markers(model)
    _save(model, path)


def adapters_path(path: Path) -> Path:
    """Where the variant with low-rank inputs lies, beside ``path``."""
    return path.with_suffix(".adapters.onnx")


# ------------------------------------------------------------------------------ tracing


def _trace(source: GraphSource, *, plain: bool) -> ir.Model:
    names = [spec.name for spec in source.inputs]
    dims = _Dimensions(source)
    try:
        with torch.no_grad(), marking(source.sites), _sizes_of_one(), _quiet():
            program = torch.export.export(
                _Positional(source.module, names).eval(),
                tuple(source.examples[name] for name in names),
                dynamic_shapes=(tuple(dims.of(spec.shape) for spec in source.inputs),),
            )
            _refuse_attention(source.name, program)
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=names,
                output_names=[spec.name for spec in source.outputs],
                custom_translation_table={_SDPA: _attention},
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, UserError, RuntimeError) as error:
        raise PlanError(f"{source.name} cannot be exported to ONNX: {error}") from error
    assert exported is not None
    model: ir.Model = exported.model
    for value, spec in zip(model.graph.outputs, source.outputs, strict=True):
        value.shape = ir.Shape(spec.shape)
    for value, spec in zip(model.graph.inputs, source.inputs, strict=True):
        value.shape = ir.Shape(spec.shape)
        if spec.optional and not plain:
            _default_to_zero(model.graph, value, spec)
    model.producer_name, model.producer_version, model.doc_string = "darkroom", "", None
    return model


class _Positional(nn.Module):
    """Named tensors as positional ones, which is what the exporter names itself."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.module = module
        self.names = names

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.module(dict(zip(self.names, tensors, strict=True))).values())


class _Dimensions:
    """The exporter's symbols for named dimensions: multiples of one root for each name.

    The bounds hold for the trace alone: Diffusers takes another, equal path from a batch of 64,
    and a graph for sizes from 2 also runs at 1, as tests show.
    """

    def __init__(self, source: GraphSource) -> None:
        self._source = source
        self._roots: dict[str, Any] = {}

    def of(self, shape: Sequence[int | str]) -> dict[int, Any]:
        return {i: self._symbol(dim) for i, dim in enumerate(shape) if isinstance(dim, str)}

    def _symbol(self, dim: str) -> Any:
        name, scale = scale_of(dim)
        if name not in self._roots:
            most = {"batch": 63, "tokens": self._source.max_tokens}.get(name, 2**16)
            self._roots[name] = torch.export.Dim(f"{name}_root", min=2, max=most)
        factor = scale * self._source.granularity if name in ("height", "width") else scale
        if factor.denominator != 1:
            raise PlanError(f"{self._source.name}: {dim} is no multiple of the granularity")
        return self._roots[name] if factor == 1 else int(factor) * self._roots[name]


_SDPA = torch.ops.aten.scaled_dot_product_attention.default
_NO_GRAPH = ("dropout_p", "is_causal", "enable_gqa")
"""Its arguments that no graph of ours can have set."""


def _attention(  # the exporter calls it as the operator, and translates its ``op`` calls
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,  # noqa: ARG001 - this and the others without use: `_refuse_attention`
    is_causal: bool = False,  # noqa: ARG001
    scale: float | None = None,
    enable_gqa: bool = False,  # noqa: ARG001
) -> Any:
    """Attention without the exporter's run-time shape arithmetic: 3 % of a small UNet's time."""
    factor = op.CastLike(scale or 1 / math.sqrt(query.shape[3]), query)
    scores = op.MatMul(op.Mul(query, factor), op.Transpose(key, perm=[0, 1, 3, 2]))
    if attn_mask is not None:
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _refuse_attention(name: str, program: torch.export.ExportedProgram) -> None:
    """Refuse what :func:`_attention` cannot write; inside the exporter it would be lost in others.

    Raises:
        UnsupportedError: naming the arguments, and what is served in their place.
    """
    for node in program.graph.nodes:
        if node.target is not _SDPA:
            continue
        names = (argument.name for argument in _SDPA._schema.arguments)
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        if refused := [
            f"{argument}={given[argument]}" for argument in _NO_GRAPH if given.get(argument)
        ]:
            raise UnsupportedError(
                f"{name}: attention with {', '.join(refused)} cannot be exported; allowed: no"
                " dropout, as many key heads as query heads, and a mask in place of is_causal"
            )


def _sizes_of_one() -> AbstractContextManager[None]:
    """Let torch trace as though no size were special, as its own exporter does: not even 1."""
    return config.patch(backed_size_oblivious=True)  # type: ignore[no-any-return, attr-defined]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's known noise: all of it about names that we set ourselves later."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="# The axis name")
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`")
        try:
            yield
        finally:
            registration.setLevel(level)


# ------------------------------------------------------------------------------ low-rank inputs


def _markers(model: ir.Model) -> list[ir.Node]:
    domain, kind = MARKER.split("::")
    return [node for node in model.graph if (node.domain, node.op_type) == (domain, kind)]


def _drop_markers(model: ir.Model) -> None:
    for node in _markers(model):
        _replace(model, node, node.inputs[0])


def _expand_markers(model: ir.Model, sites: Sequence[Site], *, plain: bool) -> None:
    """Put ``y + up @ (down @ x)`` where the markers are, and the factors among the inputs."""
    known = {site.module: site for site in sites}
    for node in _markers(model):
        y, x = node.inputs
        site = known[node.attributes["site"].as_string()]
        # Sites may differ in rank, since those without factors have rank 0: were their dimensions
        # of one name, ONNX Runtime would let a tensor of one take over the memory of another's.
        rank = "rank" if plain else f"rank.{site.module}"
        down, up = (_add_input(model.graph, spec, y.dtype, plain, rank) for spec in site.factors())
        if site.layer.is_conv:
            flat = _insert(node, "Reshape", x, _numbers(node, [0, 0, -1]))
            product = _insert(node, "MatMul", up, _insert(node, "MatMul", down, flat))
            product = _insert(node, "Reshape", product, _insert(node, "Shape", y))
        else:
            small = _insert(node, "MatMul", x, _insert(node, "Transpose", down, perm=[0, 2, 1]))
            product = _insert(node, "MatMul", small, _insert(node, "Transpose", up, perm=[0, 2, 1]))
        total = _insert(node, "Add", y, product)
        total.shape, total.type = y.shape, y.type
        _replace(model, node, total)


def _add_input(graph: Any, spec: TensorSpec, dtype: Any, required: bool, rank: str) -> Any:
    shape = ir.Shape([rank if dim == "rank" else dim for dim in spec.shape])
    value = ir.Value(name=spec.name, shape=shape, type=ir.TensorType(dtype))
    graph.inputs.append(value)
    if not required:
        _default_to_zero(graph, value, spec)
    return value


def _default_to_zero(graph: Any, value: Any, spec: TensorSpec) -> None:
    """Give an input an initializer of its own name: it may then be left out of a run.

    The smallest that will do: rank 0, and 1 for what broadcasts.
    """
    shape = [d if isinstance(d, int) else 0 if d == "rank" else 1 for d in spec.shape]
    value.const_value = ir.tensor(np.zeros(shape, value.dtype.numpy()), name=value.name)
    graph.register_initializer(value)


def _insert(before: ir.Node, kind: str, *inputs: Any, **attributes: Any) -> Any:
    node = ir.node(kind, inputs, attributes or None)
    before.graph.insert_before(before, node)
    return node.outputs[0]


def _numbers(before: ir.Node, numbers: list[int]) -> Any:
    return _insert(before, "Constant", value=ir.tensor(np.array(numbers, np.int64)))


def _replace(model: ir.Model, node: ir.Node, value: Any) -> None:
    ir.convenience.replace_all_uses_with(node.outputs[0], value)
    for i, output in enumerate(model.graph.outputs):
        if output is node.outputs[0]:
            model.graph.outputs[i] = value
    model.graph.remove(node, safe=True)


# ------------------------------------------------------------------------------ writing


def _save(model: ir.Model, path: Path) -> Path:
    model.opset_imports.pop(MARKER.split("::")[0], None)
    for node in model.graph:
        node.metadata_props.clear()  # stack traces, with paths of the machine that exported
    for value in model.graph.inputs:
        value.metadata_props.clear()
    ir.save(model, path)
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise PlanError(f"{path.name} is not valid ONNX: {error}") from error
    return path
