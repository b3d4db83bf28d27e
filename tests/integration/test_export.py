"""Plans of ONNX graphs against Diffusers: every family, several sizes, other cuts and taps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from engine.checkpoint import Checkpoint
from engine.compile.manifest import Tap
from engine.compile.plan import Plan, PlanStore
from engine.denoiser import PREDICTION, Denoiser
from engine.runtime import Runtime
from tests.tiny import FAMILIES
from tests.unit.compile.test_units import diffusers_forward, unet_inputs
from tests.unit.test_denoiser import arguments

FAMILIES_IN_SHORT = ("text",)
"""An export takes a quarter of a minute: the others are tested in full runs."""


def sized(given: dict[str, torch.Tensor], rows: int, height: int, width: int) -> None:
    """Make ``given`` of another batch and latent size."""
    for name, tensor in given.items():
        given[name] = torch.cat([tensor] * 3)[:rows]
    given["sample"] = torch.randn(rows, given["sample"].shape[1], height, width)


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=() if f in FAMILIES_IN_SHORT else pytest.mark.full) for f in FAMILIES],
)
def test_the_chain_predicts_what_diffusers_predicts(
    tiny_plan: Callable[[str], Plan],
    tiny_checkpoint: Callable[[str], Path],
    cpu_runtime: Runtime,
    family: str,
) -> None:
    unet: Any = Checkpoint.open(tiny_checkpoint(family)).load_unet()
    denoiser = Denoiser(tiny_plan(family), cpu_runtime)
    for size in ((1, 2, 2), (1, 8, 8), (2, 4, 10), (5, 6, 4), (1, 2, 32)):
        given = unet_inputs(unet)
        sized(given, *size)
        torch.testing.assert_close(
            denoiser(*arguments(given)), diffusers_forward(unet, given), rtol=1e-4, atol=1e-5
        )
    denoiser.close()


def test_other_cuts_and_taps_change_nothing(
    tiny_plan: Callable[[str], Plan],
    tiny_checkpoint: Callable[[str], Path],
    plans: Path,
    cpu_runtime: Runtime,
) -> None:
    """Cuts inside blocks, a segment that goes down and up, a tap in and a tap out."""
    checkpoint = Checkpoint.open(tiny_checkpoint("text"))
    tensor, within = "down.0.attn.0", "up.1.resnet.0"
    plan = PlanStore(plans).build(
        checkpoint,
        cuts=("down.0.resnet.0", "up.1.attn.0"),
        taps=(Tap(tensor=tensor, direction="in"), Tap(tensor=within, direction="out")),
    )
    assert [s.name for s in plan.manifest.unet] == ["context", "down.0.attn.0", "up.1.resnet.1"]
    cut, default = Denoiser(plan, cpu_runtime), Denoiser(tiny_plan("text"), cpu_runtime)
    unet: Any = checkpoint.load_unet()
    given = unet_inputs(unet)
    sized(given, 2, 4, 8)
    expected = default(*arguments(given))
    torch.testing.assert_close(cut(*arguments(given)), expected, rtol=0, atol=1e-6)

    zero = {tensor: torch.zeros(2, 16, 4, 8)}
    torch.testing.assert_close(cut(*arguments(given), taps=zero), expected, rtol=0, atol=1e-6)
    extra = torch.randn(2, 16, 4, 8)
    tapped = cut.run({**given, f"tap.{tensor}": extra}, keep=(PREDICTION, within))
    adapter = [extra, torch.zeros(())]
    torch.testing.assert_close(
        tapped[PREDICTION],
        diffusers_forward(unet, given, down_intrablock_additional_residuals=adapter),
        rtol=1e-4,
        atol=1e-5,
    )
    assert tapped[within].shape == (2, 16, 4, 8)


def test_graphs_with_a_replaced_attention_have_every_input_that_is_listed(
    tiny_checkpoint: Callable[[str], Path], plans: Path, cpu_runtime: Runtime
) -> None:
    tap = Tap(tensor="up.1.attn.0", direction="in", mode="replace")
    plan = PlanStore(plans).build(Checkpoint.open(tiny_checkpoint("text")), taps=(tap,))
    (spec,) = [spec for spec in plan.manifest.unet if spec.name == "up.1"]
    assert spec.adapters_file is not None
    for file, ports in ((spec.file, spec.inputs), (spec.adapters_file, spec.inputs + spec.factors)):
        graph = onnx.load(plan.folder / file, load_external_data=False).graph
        assert [value.name for value in graph.input] == [port.name for port in ports]
        used = {name for node in graph.node for name in node.input}
        assert {port.name for port in ports} <= used
    assert not any("up_blocks.1.attentions.0." in port.name for port in spec.factors)


def test_graph_files_say_what_the_manifest_says(tiny_plan: Callable[[str], Plan]) -> None:
    plan = tiny_plan("text")
    for spec in plan.manifest.unet:
        graph = onnx.load(plan.folder / spec.file, load_external_data=False).graph
        assert [value.name for value in graph.input] == [port.name for port in spec.inputs]
        assert [value.name for value in graph.output] == [port.name for port in spec.outputs]
        for value, port in zip(graph.input, spec.inputs, strict=True):
            dims = value.type.tensor_type.shape.dim
            assert tuple(d.dim_param or d.dim_value for d in dims) == port.shape
        if spec.adapters_file is None:
            assert not spec.factors
            continue
        adapters = onnx.load(plan.folder / spec.adapters_file, load_external_data=False).graph
        names = {port.name for port in spec.factors}
        assert names == {value.name for value in adapters.input} - {p.name for p in spec.inputs}
        assert names <= {initializer.name for initializer in adapters.initializer}
    sites = {site.down_input for site in plan.manifest.adapter_sites}
    assert sites <= {port.name for spec in plan.manifest.unet for port in spec.factors}


def test_no_path_of_this_machine_is_in_a_plan(tiny_plan: Callable[[str], Plan]) -> None:
    plan = tiny_plan("text")
    here = str(Path(__file__).parents[2]).encode()
    for path in plan.folder.rglob("*"):
        assert not path.is_file() or here not in path.read_bytes(), path.name


def test_factors_are_plain_inputs_where_a_backend_needs_them(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    from engine.compile.export import export_unet
    from engine.compile.onnx_graph import adapters_path, write_graphs

    source = export_unet(Checkpoint.open(tiny_checkpoint("sd15")).load_unet())[1]
    write_graphs(source, tmp_path / "graph.onnx", plain_factors=True)
    graph = onnx.load(adapters_path(tmp_path / "graph.onnx"), load_external_data=False).graph
    factors = {factor.name for site in source.sites for factor in site.factors()}
    assert factors <= {value.name for value in graph.input}
    assert not factors & {initializer.name for initializer in graph.initializer}
