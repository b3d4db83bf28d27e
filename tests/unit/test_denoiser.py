"""The walk over segments, on torch plans, where it must equal Diffusers to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.checkpoint import Checkpoint
from engine.compile.manifest import Tap
from engine.compile.plan import Plan, PlanStore
from engine.denoiser import PREDICTION, Denoiser
from engine.errors import ExecutionError
from engine.runtime import Runtime, open_runtime
from tests.tiny import FAMILIES
from tests.unit.compile.test_units import diffusers_forward, unet_inputs

Open = Callable[..., Denoiser]


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    runtime = open_runtime("torch")
    yield runtime
    runtime.close()


@pytest.fixture(scope="module")
def open_denoiser(
    tiny_checkpoint: Callable[[str], Path], plans: Path, runtime: Runtime
) -> Iterator[Open]:
    opened: list[Denoiser] = []

    def open_one(family: str, **options: Any) -> Denoiser:
        checkpoint = Checkpoint.open(tiny_checkpoint(family))
        plan: Plan = PlanStore(plans).build(checkpoint, backend="torch", **options)
        opened.append(Denoiser(plan, runtime))
        return opened[-1]

    yield open_one
    for denoiser in opened:
        denoiser.close()


def arguments(given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    added = {n.removeprefix("added."): t for n, t in given.items() if n.startswith("added.")}
    return given["sample"], given["timestep"], given["context"], added


@pytest.mark.parametrize("family", FAMILIES)
def test_it_predicts_what_diffusers_predicts(
    open_denoiser: Open, tiny_checkpoint: Callable[[str], Path], family: str
) -> None:
    unet: Any = Checkpoint.open(tiny_checkpoint(family)).load_unet()
    given = unet_inputs(unet)
    denoiser = open_denoiser(family)
    assert torch.equal(denoiser(*arguments(given)), diffusers_forward(unet, given))
    assert {port.source for port in denoiser.external_inputs} == set(given)


def test_residuals_factors_and_taps_go_where_they_belong(
    open_denoiser: Open, tiny_checkpoint: Callable[[str], Path]
) -> None:
    unet: Any = Checkpoint.open(tiny_checkpoint("sd15")).load_unet()
    given = unet_inputs(unet)
    tensor = "down.0.attn.0"
    denoiser = open_denoiser("sd15", taps=(Tap(tensor=tensor, direction="in"),))
    plain = denoiser(*arguments(given))

    width = unet.config.block_out_channels[-1]
    mid = torch.randn(3, width, 2, 3)
    count = 1 + sum(len(b.resnets) + len(b.downsamplers or ()) for b in unet.down_blocks)
    expected = diffusers_forward(
        unet,
        given,
        down_block_additional_residuals=(torch.zeros(()),) * count,
        mid_block_additional_residual=mid,
    )
    result = denoiser(*arguments(given), residuals={count: mid})
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)

    assert torch.equal(denoiser(*arguments(given), taps={tensor: torch.zeros(3, 16, 4, 6)}), plain)
    assert not torch.allclose(
        denoiser(*arguments(given), taps={tensor: torch.ones(3, 16, 4, 6)}), plain
    )

    site = "lora.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
    factors = {f"{site}.down": torch.ones(3, 1, 32), f"{site}.up": torch.ones(3, 16, 1)}
    factors[f"{site}.up"][0] = 0  # the first row has no adapter
    adapted = denoiser(*arguments(given), factors=factors)
    torch.testing.assert_close(adapted[0], plain[0])
    assert not torch.allclose(adapted[1:], plain[1:])
    assert torch.equal(denoiser(*arguments(given)), plain)


def test_some_segments_can_be_left_out(open_denoiser: Open) -> None:
    """Step reuse: the deep segments are skipped, and what they gave is given instead."""
    denoiser = open_denoiser("sd15")
    first, *_, last = denoiser.segments
    generator = torch.Generator().manual_seed(0)
    given = denoiser.inputs(
        torch.randn(2, 4, 4, 4, generator=generator),
        torch.tensor([900.0, 20.0]),
        torch.randn(2, 5, 32, generator=generator),
        {},
    )
    whole = denoiser.run(given, keep=(PREDICTION, "up.0.upsample"))
    reused = {**given, "up.0.upsample": whole["up.0.upsample"]}
    again = denoiser.run(reused, segments=(first, last))
    assert set(again) == {PREDICTION}
    assert torch.equal(again[PREDICTION], whole[PREDICTION])

    with pytest.raises(ExecutionError, match=r"up\.1 needs up\.0\.upsample"):
        denoiser.run(given, segments=(first, last))
    with pytest.raises(ExecutionError, match="no segment of this walk makes attic"):
        denoiser.run(given, keep=("attic",))


def test_tensors_are_let_go_after_their_last_use(open_denoiser: Open) -> None:
    denoiser = open_denoiser("sd15")
    steps = denoiser._plan_walk(None, frozenset({PREDICTION}))
    gone = [name for step in steps for name in step.last_used]
    assert len(set(gone)) == len(gone)
    assert "sample" in steps[0].last_used
    assert "temb" in steps[-1].last_used
    assert PREDICTION not in gone


def test_closing_twice_is_harmless(open_denoiser: Open) -> None:
    denoiser = open_denoiser("sd15")
    denoiser.close()
    denoiser.close()
    with pytest.raises(ExecutionError, match="closed"):
        denoiser(torch.zeros(1, 4, 4, 4), torch.zeros(1), torch.zeros(1, 5, 32), {})
