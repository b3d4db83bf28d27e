"""Engines really built, ahead of time and without a GPU, from segments of a tiny checkpoint.

An engine cannot be opened without a GPU. What is checked: what TensorRT parsed, the profile that
it accepted, and which names the engine's bytes hold, since a binding's name must be among them.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip(
    "tensorrt_rtx_bindings",
    reason="tensorrt_rtx is not installed: pip install 'darkroom[tensorrt]'",
    exc_type=ImportError,
)

from engine.checkpoint import Checkpoint
from engine.compile.manifest import Tap, TensorSpec
from engine.compile.tensorrt import Network, Source, build_engine
from engine.compile.tensorrt_flavours import FLAVOURS, choose_library, load_library
from engine.compile.tensorrt_profile import EngineTarget, Profile, Range, ShapeRange, shape_profile
from engine.errors import BackendUnavailableError, PlanError, UnsupportedError

PROFILE = Profile(
    batch=Range.of(1, 4, 8),
    height=Range.of(4, 8, 16),
    width=Range.of(4, 8, 16),
    tokens=Range.of(16, 16, 32),
    rank=Range.of(0, 4, 16),
)


def target(capability: str = "8.9", profile: Profile = PROFILE) -> EngineTarget:
    library = choose_library(capability, "tensorrt_rtx")
    return EngineTarget(
        flavour=library.flavour.name,
        version=library.version,
        capability=capability,
        unet=profile,
        text=profile,
        vae=profile,
    )


# ------------------------------------------------------------------------------ a real segment


@pytest.fixture(scope="module")
def mid(
    tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Source, Source]:
    """The middle of a tiny UNet with a tap, without low-rank inputs and with them."""
    from engine.compile.export import export_unet
    from engine.compile.onnx_graph import adapters_path, write_graphs

    checkpoint = Checkpoint.open(tiny_checkpoint("sd15"))
    tap = Tap(tensor="mid.attn.0", direction="in")
    sources = export_unet(checkpoint.load_unet(), taps=[tap])
    source = next(source for source in sources if source.name == "mid")
    path = tmp_path_factory.mktemp("graphs") / "mid.onnx"
    write_graphs(source, path, plain_factors=True)
    spec = source.segment()
    plain = Source(name="mid", path=path, inputs=spec.inputs, outputs=spec.outputs)
    adapted = Source(
        name="mid",
        path=adapters_path(path),
        inputs=(*spec.inputs, *spec.factors),
        outputs=spec.outputs,
    )
    return plain, adapted


def test_an_adapter_changes_the_bindings_of_the_engine(mid: tuple[Source, Source]) -> None:
    plain, adapted = mid
    factors = {spec.name for spec in adapted.inputs} - {spec.name for spec in plain.inputs}

    engines = [build_engine(source, target()) for source in mid]

    assert len(factors) == 20  # two for each of the ten layers; two more project the text
    for spec in (*plain.inputs, *plain.outputs):
        assert all(spec.name.encode() in engine for engine in engines)
    assert "tap.mid.attn.0" in {spec.name for spec in plain.inputs}
    assert all(name.encode() not in engines[0] for name in factors)
    assert all(name.encode() in engines[1] for name in factors)


def test_the_profile_reaches_every_input_and_starts_at_rank_0(mid: tuple[Source, Source]) -> None:
    """Rank 0 is accepted: the test above builds with this very profile."""
    _, adapted = mid
    library = load_library("tensorrt_rtx")
    network = Network.parse(library, adapted)
    profile = network.builder.create_optimization_profile()

    for name, shape in shape_profile(adapted.inputs, PROFILE).items():
        profile.set_shape(name, shape.min, shape.opt, shape.max)

    parsed = [network.network.get_input(i).name for i in range(network.network.num_inputs)]
    assert parsed == [spec.name for spec in adapted.inputs]
    known = {name: ShapeRange(*map(tuple, profile.get_shape(name))) for name in parsed}
    text = ShapeRange((1, 16, 64), (4, 16, 64), (8, 32, 64))
    assert known["context.mid.attn.0"] == text
    assert known["down.1.resnet.0"] == ShapeRange((1, 32, 2, 2), (4, 32, 4, 4), (8, 32, 8, 8))
    site = "lora.mid_block.attentions.0.proj_in"
    assert known[f"{site}.down"] == ShapeRange((1, 0, 32), (4, 4, 32), (8, 16, 32))
    assert known[f"{site}.up"] == ShapeRange((1, 32, 0), (4, 32, 4), (8, 32, 16))


def test_a_profile_that_the_segment_cannot_take_is_refused(mid: tuple[Source, Source]) -> None:
    odd = PROFILE.model_copy(update={"width": Range.of(5, 8, 16)})

    with pytest.raises(PlanError, match="width must be a multiple of 2, not 5"):
        build_engine(mid[0], target(profile=odd))


def test_another_release_does_not_build(mid: tuple[Source, Source]) -> None:
    other = target().model_copy(update={"version": "1.0"})

    with pytest.raises(BackendUnavailableError, match=r"1\.0 cannot be built with"):
        build_engine(mid[0], other)


# ------------------------------------------------------------------------------ small graphs


def spec(name: str, *shape: int | str, dtype: Any = "float32") -> TensorSpec:
    return TensorSpec(name=name, source=name, dtype=dtype, shape=shape)


PICTURE = ("batch", 8, "height", "width")


def graph(
    folder: Path, nodes: list[Any], constants: dict[str, Any], *, tap: bool = False
) -> Source:
    """A source that takes ``x`` (and ``tap``) and gives ``y``, all of one shape."""
    names = ["x", "tap"] if tap else ["x"]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, PICTURE) for name in names]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, PICTURE)
    stored = [numpy_helper.from_array(np.asarray(a), name) for name, a in constants.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "small", inputs, [output], stored),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.save(model, folder / "small.onnx")
    return Source(
        name="small",
        path=folder / "small.onnx",
        inputs=tuple(spec(name, *PICTURE) for name in names),
        outputs=(spec("y", *PICTURE),),
    )


_ZERO = np.int8(0)


def quantized(
    folder: Path, zero_point: Any = _ZERO, *, weight: Any = np.int8, computed: bool = False
) -> Source:
    """A convolution between quantized input and quantized weights."""
    point = [] if zero_point is None else ["zero"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", *point], ["xq"], name="quantize"),
        helper.make_node("DequantizeLinear", ["xq", "scale", *point], ["xd"], name="dequantize"),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["wd"], name="weights", axis=0),
        helper.make_node("Conv", ["xd", "wd"], ["y"], name="conv", pads=[1] * 4),
    ]
    constants = {
        "scale": np.float32(0.02),
        "w": np.ones((8, 8, 3, 3), weight),
        "ws": np.full(8, 0.01, np.float32),
    }
    if zero_point is not None:
        constants["zero"] = zero_point
    if computed:
        del constants["scale"]
        nodes = [helper.make_node("ReduceMax", ["x"], ["scale"], keepdims=0), *nodes]
    return graph(folder, nodes, constants)


def test_symmetric_static_int8_is_built(tmp_path: Path) -> None:
    assert build_engine(quantized(tmp_path), target())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero_point": np.int8(5)}, "'quantize' .* has a zero point that is not 0"),
        ({"zero_point": np.uint8(0)}, "'quantize' .* is uint8"),
        ({"zero_point": None}, "'quantize' .* is uint8"),  # what ONNX means by leaving it out
        ({"weight": np.int32}, "'weights' .* is int32"),
        ({"computed": True}, "'quantize' .* scale that is computed"),
    ],
)
def test_other_int8_is_refused_by_name(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=f"small: node {message}.*symmetric static int8"):
        build_engine(quantized(tmp_path, **options), target())


def test_dynamic_quantization_is_refused_by_name(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], name="dynamic"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], name="back"),
    ]

    with pytest.raises(UnsupportedError, match=r"node 'dynamic' .* is no static quantization"):
        build_engine(graph(tmp_path, nodes, {}), target())


def test_a_node_that_the_parser_refuses_is_named(tmp_path: Path) -> None:
    nodes = [helper.make_node("Develop", ["x"], ["y"], name="tray", domain="darkroom")]

    with pytest.raises(PlanError, match=r"small: .*node 'tray' \(Develop\)"):
        build_engine(graph(tmp_path, nodes, {}), target())


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    source = graph(tmp_path, [helper.make_node("Relu", ["x"], ["y"])], {})
    source.path.write_bytes(b"no graph at all")

    with pytest.raises(PlanError, match=r"small: .*small\.onnx"):
        build_engine(source, target())


def test_an_input_that_the_parser_makes_a_constant_is_missed(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["x", "tap"], ["y"])]
    source = graph(tmp_path, nodes, {"tap": np.zeros((1, 8, 1, 1), np.float32)}, tap=True)

    with pytest.raises(PlanError, match="parsed has no input 'tap'"):
        build_engine(source, target())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outputs": (spec("z", *PICTURE),)}, "parsed has no output 'z'"),
        ({"inputs": ()}, "unknown input 'x'"),
        ({"outputs": (spec("y", *PICTURE, dtype="float16"),)}, "'y' is .*FLOAT.*, not float16"),
        ({"inputs": (spec("x", "batch", 9, "height", "width"),)}, r"'x' is \(-1, 8, -1, -1\), not"),
    ],
)
def test_what_was_parsed_must_be_what_the_manifest_says(
    tmp_path: Path, changes: Any, message: str
) -> None:
    source = graph(tmp_path, [helper.make_node("Relu", ["x"], ["y"])], {})

    with pytest.raises(PlanError, match=f"small: .*{message}"):
        build_engine(dataclasses.replace(source, **changes), target())


@pytest.mark.parametrize("capability", FLAVOURS["tensorrt_rtx"].gpus)
def test_every_kind_of_gpu_that_rtx_names_can_be_built_for(tmp_path: Path, capability: str) -> None:
    assert build_engine(quantized(tmp_path), target(capability))


def test_rtx_names_no_gpu_that_is_not_listed() -> None:
    members = load_library("tensorrt_rtx").trt.ComputeCapability.__members__

    listed = {f"SM{capability.replace('.', '')}" for capability in FLAVOURS["tensorrt_rtx"].gpus}
    assert set(members) - {"NONE", "CURRENT"} == listed


def test_the_library_speaks_through_pythons_logging(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "engine.compile.tensorrt_flavours"):
        build_engine(quantized(tmp_path), target())

    assert caplog.records
    assert capfd.readouterr() == ("", "")
