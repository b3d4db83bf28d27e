"""int8 plans of a tiny checkpoint: built, run, held against float, and beside other rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch

from engine.checkpoint import Checkpoint
from engine.compile.build import Ingredients
from engine.compile.calibrate import DRAWINGS
from engine.compile.manifest import PlanManifest
from engine.compile.plan import Plan, PlanStore, Progress
from engine.compile.quantize import TABLE, Int8Config, int8_transform
from engine.compile.tensorrt_quantization import refuse_quantization
from engine.denoiser import Denoiser
from engine.engine import Engine
from engine.model import Model
from engine.runtime.base import Runtime
from engine.types import GenerateRequest
from tests.mates import worst_difference

DIAL_DB = 22.0
DEQUANTIZE = "DequantizeLinear"
QUICK = Int8Config(
    min_snr_db=DIAL_DB, rows=12, drawings=tuple(replace(d, steps=4) for d in DRAWINGS[:3])
)
"""Quick to calibrate; a random network of 16 channels has no more than some 25 dB to give."""


@pytest.fixture(scope="module")
def build(
    tiny_checkpoint: Callable[[str], Path],
    tiny_plan: Callable[[str], Plan],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., Plan]]:
    """Builds int8 plans through a store; the export, which takes longest, is made only once."""
    float_plan = tiny_plan("text")
    checkpoint = Checkpoint.open(tiny_checkpoint("text"))
    root = tmp_path_factory.mktemp("int8")

    def exported(ingredients: Ingredients, folder: Path, progress: Progress) -> PlanManifest:
        for path in float_plan.folder.iterdir():
            if path.is_dir():
                shutil.copytree(path, folder / path.name)
        return float_plan.manifest.model_copy(
            update={
                "digest": ingredients.digest,
                "precision": ingredients.precision,
                "recipe": ingredients.recipe,
                "files": {},
            }
        )

    def plan_of(store: str = "store", config: Int8Config = QUICK) -> Plan:
        transform = int8_transform("onnxruntime", config)
        return PlanStore(root / store).build(checkpoint, precision="int8", transform=transform)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.compile.build.build_plan", exported)
        yield plan_of


@pytest.fixture(scope="module")
def plan(build: Callable[..., Plan]) -> Plan:
    return build()


def inputs(rows: int, *, amplitude: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(5)
    return (
        amplitude * torch.randn(rows, 4, 8, 8, generator=random),
        torch.linspace(900, 20, rows),
        amplitude * torch.randn(rows, 16, 32, generator=random),
    )


def graphs(plan: Plan) -> Iterator[tuple[str, onnx.GraphProto]]:
    for segment in plan.manifest.unet:
        for file in filter(None, (segment.file, segment.adapters_file)):
            yield file, onnx.load(plan.folder / file, load_external_data=False).graph


def test_it_is_within_its_dial_of_float_and_says_so(plan: Plan) -> None:
    table = json.loads((plan.folder / TABLE).read_text())
    assert TABLE in plan.manifest.files
    assert table["snr_db"] >= DIAL_DB
    assert 0.5 < table["int8_share_of_macs"] < 1
    assert set(table["segments"]) == {segment.name for segment in plan.manifest.unet}
    assert len({step["timestep"] for step in table["steps"]}) > 3
    assert all(group["snr_db"] > 0 for group in table["groups"])
    for segment in plan.manifest.unet:
        graph = onnx.load(plan.folder / segment.file, load_external_data=False).graph
        made = {name: node.op_type for node in graph.node for name in node.output}
        quantized = {n.name for n in graph.node if made.get("".join(n.input[1:2])) == DEQUANTIZE}
        own = [group for group in table["groups"] if group["segment"] == segment.name]
        for group in own:
            assert group["int8"] == (set(group["nodes"]) <= quantized)


def test_first_and_last_convolution_and_time_embedding_stay_float(plan: Plan) -> None:
    """By no rule of ours: int8 would lose time there, and the first one is the most sensitive."""
    for file, graph in graphs(plan):
        constants = {tensor.name: tensor.data_type for tensor in graph.initializer}
        readers = {name: node for node in graph.node for name in node.input}
        makers = {name: node for node in graph.node for name in node.output}
        kept = [node for node in graph.node if node.op_type == "Gemm"]  # one vector a row
        if "sample" in readers:
            kept.append(first_convolution(readers, "sample"))
        if "prediction" in makers:
            kept.append(makers["prediction"])
            assert kept[-1].op_type == "Conv"
        for node in kept:
            assert constants[node.input[1]] == onnx.TensorProto.FLOAT, (file, node.name)


def first_convolution(readers: dict[str, onnx.NodeProto], tensor: str) -> onnx.NodeProto:
    node = readers[tensor]
    while node.op_type != "Conv":
        node = readers[node.output[0]]
    return node


def test_scales_are_static_everywhere(plan: Plan) -> None:
    for file, graph in graphs(plan):
        constants = {tensor.name for tensor in graph.initializer}
        for node in graph.node:
            assert node.op_type != "DynamicQuantizeLinear", file
            if node.op_type == "QuantizeLinear":
                assert set(node.input[1:]) <= constants, file


def test_both_variants_are_quantized_alike_and_factors_stay_float(plan: Plan) -> None:
    for segment in plan.manifest.unet:
        if segment.adapters_file is None:
            continue
        plain, adapters = (
            [node for node in graph.node if "Quantize" in node.op_type]
            for file, graph in graphs(plan)
            if file in (segment.file, segment.adapters_file)
        )
        assert {node.name for node in plain} == {node.name for node in adapters}
        factors = {spec.name for spec in segment.factors}
        assert factors.isdisjoint(name for node in adapters for name in node.input)


def test_a_row_is_the_same_alone_and_beside_a_loud_mate(plan: Plan, cpu_runtime: Runtime) -> None:
    denoiser = Denoiser(plan, cpu_runtime)
    one, loud = inputs(1), inputs(1, amplitude=10.0)
    alone = denoiser(*one, {})
    sample, timesteps, context = (torch.cat(both) for both in zip(one, loud, strict=True))
    pair = denoiser(sample, timesteps, context, {})
    denoiser.close()
    assert torch.isfinite(pair).all()
    assert (pair[0] - alone[0]).norm() <= 1e-5 * alone.norm()


@pytest.mark.parametrize("seed", range(2))
def test_a_trajectory_is_the_same_alone_and_in_a_random_mixed_batch(
    plan: Plan, cpu_runtime: Runtime, seed: int
) -> None:
    model = Model.open(plan, cpu_runtime)
    worst = worst_difference(model, seed)
    model.close()
    assert worst <= 1e-5


def test_adapters_without_effect_change_nothing(plan: Plan, cpu_runtime: Runtime) -> None:
    denoiser = Denoiser(plan, cpu_runtime)
    sizes = {"batch": 2, "rank": 4}
    factors = {
        spec.name: torch.zeros([d if isinstance(d, int) else sizes[d] for d in spec.shape])
        for segment in plan.manifest.unet
        for spec in segment.factors
    }
    rows = inputs(2)
    plain, adapted = denoiser(*rows, {}), denoiser(*rows, {}, factors=factors)
    denoiser.close()
    assert (adapted - plain).norm() <= 1e-5 * plain.norm()


def test_pictures_come_close_to_those_of_float_and_name_their_precision(
    plan: Plan, tiny_plan: Callable[[str], Plan], cpu_runtime: Runtime
) -> None:
    pictures = []
    for one in (plan, tiny_plan("text")):
        engine = Engine(device=cpu_runtime.device)
        engine.load(Model.open(one, cpu_runtime))
        engine.start()
        pictures.append(engine.generate(GenerateRequest(prompt="a red umbrella", steps=6, seed=3)))
        engine.close()
    ours, exact = pictures
    assert ours.approximations["precision"] == "int8"
    error = (ours.latent - exact.latent).norm() / exact.latent.norm()
    assert 0 < error < 0.25


def test_the_dial_and_the_calibration_set_are_in_the_digest(
    build: Callable[..., Plan], plan: Plan
) -> None:
    other = build(config=replace(QUICK, min_snr_db=DIAL_DB + 20))
    assert other.digest != plan.digest
    assert build().folder == plan.folder  # built once
    table, higher = (json.loads((p.folder / TABLE).read_text()) for p in (plan, other))
    assert higher["snr_db"] >= DIAL_DB + 20
    assert higher["int8_share_of_macs"] < table["int8_share_of_macs"]
    assert table["groups"][0]["snr_db"] == higher["groups"][0]["snr_db"]


def test_the_same_calibration_gives_the_same_plan(build: Callable[..., Plan], plan: Plan) -> None:
    again = build("another store")
    assert again.folder != plan.folder
    assert again.manifest.files == plan.manifest.files


@pytest.fixture(scope="module")
def symmetric(
    tiny_plan: Callable[[str], Plan],
    tiny_checkpoint: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Plan:
    """The graphs of an int8 plan for TensorRT, without its engines."""
    float_plan = tiny_plan("text")
    folder = Path(shutil.copytree(float_plan.folder, tmp_path_factory.mktemp("int8") / "plan"))
    manifest = float_plan.manifest.model_copy(update={"backend": "tensorrt"})
    checkpoint = Checkpoint.open(tiny_checkpoint("text"))
    int8_transform("tensorrt", QUICK)(folder, manifest, checkpoint, lambda *_: None)
    return Plan(folder, manifest)


def test_a_plan_for_tensorrt_is_symmetric_in_both_variants(symmetric: Plan) -> None:
    for file, _ in graphs(symmetric):
        refuse_quantization(file, symmetric.folder / file)
    assert json.loads((symmetric.folder / TABLE).read_text())["snr_db"] >= DIAL_DB


def test_tensorrt_builds_an_engine_of_an_int8_segment(symmetric: Plan) -> None:
    pytest.importorskip(
        "tensorrt_rtx_bindings",
        reason="tensorrt_rtx is not installed: pip install 'darkroom[tensorrt]'",
        exc_type=ImportError,
    )
    from engine.compile.tensorrt import Source, build_engine
    from engine.compile.tensorrt_flavours import choose_library
    from engine.compile.tensorrt_profile import EngineTarget, Profile, Range

    library = choose_library("8.9", "tensorrt_rtx")
    side, tokens = Range.of(4, 8, 16), Range.of(16, 16, 32)
    profile = Profile(
        batch=Range.of(1, 4, 8), height=side, width=side, tokens=tokens, rank=Range.of(0, 4, 16)
    )
    target = EngineTarget(
        flavour=library.flavour.name,
        version=library.version,
        capability="8.9",
        unet=profile,
        text=profile,
        vae=profile,
    )
    mid = next(segment for segment in symmetric.manifest.unet if segment.name == "mid")
    path = symmetric.folder / mid.file
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(path).graph.node}
    assert build_engine(
        Source(name="mid", path=path, inputs=mid.inputs, outputs=mid.outputs), target
    )


def test_no_trial_files_are_left(plan: Plan) -> None:
    assert not [path for path in plan.folder.rglob(".*")]


@pytest.mark.full
@pytest.mark.parametrize("family", ["sd15", "sd21-v", "sdxl", "lcm", "inpaint9", "text"])
def test_every_family_builds_by_default(
    family: str, tiny_checkpoint: Callable[[str], Path], cpu_runtime: Runtime, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(family))
    plan = PlanStore(tmp_path).build(checkpoint, precision="int8")
    table = json.loads((plan.folder / TABLE).read_text())
    assert table["snr_db"] >= Int8Config().min_snr_db
    model = Model.open(plan, cpu_runtime)
    model.blank_walk(model.native_lane())(2)
    model.close()
