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
from engine.errors import ExecutionError, OutOfMemoryError
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
    text, first, *_, last = denoiser.segments
    generator = torch.Generator().manual_seed(0)
    given = denoiser.inputs(
        torch.randn(2, 4, 4, 4, generator=generator),
        torch.tensor([900.0, 20.0]),
        torch.randn(2, 5, 32, generator=generator),
        {},
    )
    whole = denoiser.run(given, keep=(PREDICTION, "up.0.upsample"))
    reused = {**given, "up.0.upsample": whole["up.0.upsample"]}
    again = denoiser.run(reused, segments=(text, first, last))
    assert set(again) == {PREDICTION}
    assert torch.equal(again[PREDICTION], whole[PREDICTION])

    with pytest.raises(ExecutionError, match=r"up\.1 needs up\.0\.upsample"):
        denoiser.run(given, segments=(text, first, last))
    with pytest.raises(ExecutionError, match="no segment of this walk makes attic"):
        denoiser.run(given, keep=("attic",))


class Counted:
    """A graph of an opened network that counts its runs, and may fail once."""

    def __init__(self, denoiser: Denoiser, segment: str, patch: pytest.MonkeyPatch) -> None:
        (graph,) = [graph for graph in denoiser._graphs if graph.spec.name == segment]
        self.runs = 0
        self.rows: list[int] = []
        self.error: Exception | None = None
        self._run = graph.run
        patch.setattr(graph, "run", self)

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.runs += 1
        self.rows.append(len(next(iter(feeds.values()))))
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return self._run(feeds)


@pytest.mark.parametrize("family", ["text", "sdxl"])
def test_the_text_is_projected_when_it_changes_and_not_at_every_step(
    open_denoiser: Open,
    tiny_checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
) -> None:
    unet: Any = Checkpoint.open(tiny_checkpoint(family)).load_unet()
    denoiser = open_denoiser(family)
    text = Counted(denoiser, "context", monkeypatch)
    net = Counted(denoiser, "mid", monkeypatch)
    given = unet_inputs(unet)

    def step() -> None:
        given["sample"] = torch.randn_like(given["sample"])
        given["timestep"] = 0.9 * given["timestep"]
        assert torch.equal(denoiser(*arguments(given)), diffusers_forward(unet, given))

    for _ in range(3):
        step()
    assert (text.runs, net.runs) == (1, 3)
    given["context"] = given["context"].clone()  # gathered anew
    step()
    assert text.runs == 1
    given["context"][0] += 1
    step()
    assert text.runs == 2
    for name in [name for name in given if name.startswith("added.")]:
        given[name] = 0.5 * given[name]
        runs = text.runs
        step()
        assert text.runs == runs + 1
    for name, tensor in given.items():
        given[name] = tensor[:2]  # a member left
    runs = text.runs
    step()
    assert text.runs == runs + 1


def test_two_batches_that_take_turns_are_both_remembered(
    open_denoiser: Open, tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    unet: Any = Checkpoint.open(tiny_checkpoint("text")).load_unet()
    denoiser = open_denoiser("text")
    text = Counted(denoiser, "context", monkeypatch)
    pair = unet_inputs(unet)
    pair["context"] += 7
    fewer = {name: tensor[:2] for name, tensor in pair.items()}
    expected = [diffusers_forward(unet, given) for given in (pair, fewer)]
    for _ in range(3):
        for given, whole in zip((pair, fewer), expected, strict=True):
            assert torch.equal(denoiser(*arguments(given)), whole)
    assert text.runs == 2


def test_the_text_of_a_row_alone_is_projected_as_in_company(
    open_denoiser: Open, tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    unet: Any = Checkpoint.open(tiny_checkpoint("text")).load_unet()
    denoiser = open_denoiser("text")
    text = Counted(denoiser, "context", monkeypatch)
    rest = Counted(denoiser, "mid", monkeypatch)
    single = {name: tensor[1:2] for name, tensor in unet_inputs(unet).items()}
    result = denoiser.run(single, keep=(PREDICTION, "context.embedding"))
    assert (text.rows, rest.rows) == ([2], [1])
    assert result["context.embedding"].shape == (1, 64)
    torch.testing.assert_close(
        result[PREDICTION], diffusers_forward(unet, single), rtol=1e-5, atol=1e-6
    )


def test_adapters_of_the_text_are_part_of_what_is_remembered(
    open_denoiser: Open, tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    unet: Any = Checkpoint.open(tiny_checkpoint("sd15")).load_unet()
    denoiser = open_denoiser("sd15")
    given = unet_inputs(unet)
    given["context"] += 5
    plain = denoiser(*arguments(given))
    text = Counted(denoiser, "context", monkeypatch)
    path = "down_blocks.0.attentions.0.transformer_blocks.0"

    def factors(layer: str, value: float) -> dict[str, Tensor]:
        site = f"lora.{path}.{layer}"
        width = 32 if layer.startswith("attn2") else 16
        return {
            f"{site}.down": torch.full((3, 1, width), value),
            f"{site}.up": torch.ones(3, 16, 1),
        }

    for runs, value in enumerate((0.1, 0.2), start=1):
        adapted = factors("attn2.to_v", value)
        first = denoiser(*arguments(given), factors=adapted)
        assert torch.equal(denoiser(*arguments(given), factors=adapted), first)
        assert not torch.allclose(first, plain)
        assert text.runs == runs
    adapted["lora." + path + ".attn2.to_v.up"].zero_()  # in place: it is no longer what it was
    torch.testing.assert_close(denoiser(*arguments(given), factors=adapted), plain)
    assert text.runs == 3
    # an adapter of other layers leaves the text alone
    assert not torch.allclose(
        denoiser(*arguments(given), factors=factors("attn1.to_v", 0.1)), plain
    )
    assert torch.equal(denoiser(*arguments(given)), plain)
    assert text.runs == 3


def test_what_is_remembered_cannot_be_written_to_and_yields_to_memory(
    open_denoiser: Open, tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    unet: Any = Checkpoint.open(tiny_checkpoint("text")).load_unet()
    denoiser = open_denoiser("text")
    given = unet_inputs(unet)
    given["context"] -= 3
    names = (PREDICTION, "context.embedding")
    first = denoiser.run(given, keep=names)
    kept = {name: tensor.clone() for name, tensor in first.items()}
    for tensor in first.values():
        tensor.zero_()
    text = Counted(denoiser, "context", monkeypatch)
    again = denoiser.run(given, keep=names)
    assert text.runs == 0
    assert all(torch.equal(again[name], kept[name]) for name in names)

    mid = Counted(denoiser, "mid", monkeypatch)
    mid.error = OutOfMemoryError("mid: out of memory")
    assert torch.equal(denoiser(*arguments(given)), kept[PREDICTION])  # with the memory given back
    assert (mid.runs, text.runs) == (2, 0)
    assert torch.equal(denoiser(*arguments(given)), kept[PREDICTION])
    assert text.runs == 1

    assert denoiser.forget()
    text.error = OutOfMemoryError("context: out of memory")
    with pytest.raises(OutOfMemoryError):  # nothing was remembered that could have been given back
        denoiser(*arguments(given))


def test_a_network_in_one_graph_works_without_a_memory(
    open_denoiser: Open, tiny_checkpoint: Callable[[str], Path]
) -> None:
    unet: Any = Checkpoint.open(tiny_checkpoint("text")).load_unet()
    denoiser = open_denoiser("text", cuts=())
    assert len(denoiser.segments) == 1
    given = unet_inputs(unet)
    for scale in (1.0, 2.0):
        given["context"] = scale * given["context"]
        assert torch.equal(denoiser(*arguments(given)), diffusers_forward(unet, given))


def test_tensors_are_let_go_after_their_last_use(open_denoiser: Open) -> None:
    denoiser = open_denoiser("sd15")
    steps = denoiser._plan_walk(None, frozenset({PREDICTION}))
    gone = [name for step in steps for name in step.last_used]
    assert len(set(gone)) == len(gone)
    assert {"context"} == set(steps[0].last_used)
    assert "sample" in steps[1].last_used
    assert "temb" in steps[-1].last_used
    assert PREDICTION not in gone


def test_closing_twice_is_harmless(open_denoiser: Open) -> None:
    denoiser = open_denoiser("sd15")
    denoiser.close()
    denoiser.close()
    with pytest.raises(ExecutionError, match="closed"):
        denoiser(torch.zeros(1, 4, 4, 4), torch.zeros(1), torch.zeros(1, 5, 32), {})
