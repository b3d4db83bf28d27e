"""Units and segments against Diffusers' own forward pass: the same operations, so equal bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.checkpoint import Checkpoint
from engine.compile.export import export_text_encoder, export_unet, export_vae
from engine.compile.manifest import Tap, constant_segments
from engine.compile.segments import Segment, segments
from engine.compile.units import PREDICTION, flatten
from engine.errors import PlanError
from tests.tiny import FAMILIES


def unet_inputs(unet: Any) -> dict[str, Tensor]:
    """Random inputs of three rows, 4 x 6 cells."""
    torch.manual_seed(0)
    config = unet.config
    given = {
        "sample": torch.randn(3, config.in_channels, 4, 6),
        "timestep": torch.tensor([999.0, 500.5, 0.0]),
        "context": torch.randn(3, 5, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        given["added.text_embeds"] = torch.randn(3, width)
        given["added.time_ids"] = torch.tensor([[64.0, 32, 0, 0, 64, 32]]).repeat(3, 1)
    if config.time_cond_proj_dim is not None:
        given["added.timestep_cond"] = torch.randn(3, config.time_cond_proj_dim)
    return given


def diffusers_forward(unet: Any, given: Mapping[str, Tensor], **more: Any) -> Tensor:
    added = {
        name: given[f"added.{name}"]
        for name in ("text_embeds", "time_ids")
        if f"added.{name}" in given
    }
    with torch.no_grad():
        prediction: Tensor = unet(
            given["sample"],
            given["timestep"],
            given["context"],
            timestep_cond=given.get("added.timestep_cond"),
            added_cond_kwargs=added,
            **more,
        ).sample
    return prediction


def walk(
    parts: tuple[Segment, ...],
    given: Mapping[str, Tensor],
    residuals: Mapping[int, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Run segments in turn, as the denoiser does, and keep everything."""
    known = dict(given)
    for part in parts:
        feeds = {name: tensor for name, tensor in known.items() if name.startswith("tap.")}
        for read in part.reads:
            feeds[read.name] = known[read.source]
            if residuals and read.skip is not None and read.skip in residuals:
                feeds[read.name] = known[read.source] + residuals[read.skip]
        with torch.no_grad():
            known |= part(feeds)
    return known


@pytest.fixture(scope="module")
def load(tiny_checkpoint: Callable[[str], Path]) -> Callable[[str], Checkpoint]:
    return lambda family: Checkpoint.open(tiny_checkpoint(family))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cuts", [None, (), ("conv_in", "down.0.resnet.0", "up.1.resnet.0")])
def test_a_chain_is_the_unet(
    load: Callable[[str], Checkpoint], family: str, cuts: tuple[str, ...] | None
) -> None:
    unet: Any = load(family).load_unet()
    given = unet_inputs(unet)
    parts = segments(unet, cuts)
    assert torch.equal(walk(parts, given)[PREDICTION], diffusers_forward(unet, given))
    assert (
        len({part.name for part in parts}) == len(parts) == (6 if cuts is None else len(cuts) + 1)
    )


def test_default_segments_are_blocks(load: Callable[[str], Checkpoint]) -> None:
    parts = segments(load("sd15").load_unet())
    blocks = ["context", "down.0", "down.1", "mid", "up.0", "up.1"]
    assert [part.name for part in parts] == blocks
    assert parts[-1].gives == (PREDICTION,)


def test_residuals_reach_skips_and_mid_alone(load: Callable[[str], Checkpoint]) -> None:
    """A ControlNet's residuals, by their index, do what Diffusers does with them."""
    unet: Any = load("sd15").load_unet()
    given = unet_inputs(unet)
    parts = segments(unet)
    known = walk(parts, given)
    marked = {read.skip: read.source for part in parts for read in part.reads}
    marked.pop(None)
    *skips, mid = [torch.randn_like(known[marked[i]]) for i in sorted(marked)]  # type: ignore[type-var]
    assert sorted(marked) == list(range(len(skips) + 1))  # type: ignore[type-var]
    expected = diffusers_forward(
        unet,
        given,
        down_block_additional_residuals=tuple(skips),
        mid_block_additional_residual=mid,
    )
    result = walk(parts, given, dict(enumerate([*skips, mid])))[PREDICTION]
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def test_taps_let_tensors_out_and_in(load: Callable[[str], Checkpoint]) -> None:
    """What a T2I-Adapter adds before a downsampler, and what comes out of there."""
    unet: Any = load("sd15").load_unet()
    given = unet_inputs(unet)
    tensor = "down.0.attn.0"
    taps = (Tap(tensor=tensor, direction="in"), Tap(tensor=tensor, direction="out"))
    inside = Tap(tensor="down.1.resnet.0", direction="out")
    parts = segments(unet, taps=(*taps, inside))
    assert torch.equal(walk(parts, given)[PREDICTION], diffusers_forward(unet, given))

    plain = walk(parts, given)
    extra = torch.randn_like(plain[tensor])
    tapped = walk(parts, {**given, f"tap.{tensor}": extra})
    torch.testing.assert_close(tapped[tensor], plain[tensor] + extra)
    below = torch.randn_like(plain["down.1.resnet.0"])
    expected = diffusers_forward(
        unet, given, down_intrablock_additional_residuals=[extra, torch.zeros_like(below)]
    )
    torch.testing.assert_close(tapped[PREDICTION], expected, rtol=1e-5, atol=1e-5)


def test_a_replacing_tap_puts_a_tensor_back(load: Callable[[str], Checkpoint]) -> None:
    unet: Any = load("sd15").load_unet()
    given = unet_inputs(unet)
    tensor = "up.0.upsample"
    known = walk(segments(unet), given)
    taps = (Tap(tensor=tensor, direction="in", mode="replace"),)
    other = {**given, "context": torch.zeros_like(given["context"])}
    replaced = walk(segments(unet, taps=taps), {**given, f"tap.{tensor}": known[tensor]})
    assert torch.equal(replaced[PREDICTION], known[PREDICTION])
    changed = walk(segments(unet, taps=taps), {**other, f"tap.{tensor}": known[tensor]})
    assert torch.equal(changed[tensor], known[tensor])


def test_what_a_replacing_tap_makes_void_takes_and_lists_nothing(
    load: Callable[[str], Checkpoint],
) -> None:
    """Replaced and unneeded units leave no graph nodes: no inputs and factors may be promised."""
    unet: Any = load("sd15").load_unet()
    given = unet_inputs(unet)
    tensor = "up.1.resnet.1"  # what up.1.attn.0 makes, it alone reads
    known = walk(segments(unet, taps=[Tap(tensor=tensor, direction="out")]), given)
    tap = Tap(tensor=tensor, direction="in", mode="replace")
    sources = export_unet(load("sd15").load_unet(), taps=[tap])
    owners = {site.module[: len("up_blocks.1.attentions.0")] for site in sources[-1].sites}
    assert owners == {"up_blocks.1.attentions.1"}

    (part,) = [part for part in segments(unet, taps=[tap]) if part.name == "up.1"]
    feeds = {read.name: known[read.source] for read in part.reads}
    assert len(part.reads) < len(part.all_reads)
    with torch.no_grad():
        result = part({**feeds, tap.input_name: known[tensor]})
    assert torch.equal(result[PREDICTION], known[PREDICTION])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_depends_on_the_prompt_alone_is_a_segment_of_its_own(
    load: Callable[[str], Checkpoint], family: str
) -> None:
    unet: Any = load(family).load_unet()
    sources = export_unet(unet)
    first, *others = sources
    assert constant_segments(source.segment() for source in sources) == {first.name}
    given = unet_inputs(unet).keys() - {"sample", "timestep", "added.timestep_cond"}
    assert {port.source for port in first.inputs} == given
    assert "context" not in {port.source for source in others for port in source.inputs}
    projections = {site.module for site in first.sites}
    assert {path.rpartition(".")[2] for path in projections} == {"to_k", "to_v"}
    assert all(".attn2." in path for path in projections)
    elsewhere = {site.module for source in others for site in source.sites}
    assert not any(path.endswith(("attn2.to_k", "attn2.to_v")) for path in elsewhere)


def test_a_segment_with_a_tap_or_with_all_in_it_is_not_constant(
    load: Callable[[str], Checkpoint],
) -> None:
    tap = Tap(tensor="context.mid.attn.0", direction="in")
    cases: list[dict[str, Any]] = [{"cuts": ()}, {"cuts": ["conv_in"]}, {"taps": [tap]}]
    for options in cases:
        sources = export_unet(load("text").load_unet(), **options)
        assert not constant_segments(source.segment() for source in sources)


def test_unknown_names_are_refused(load: Callable[[str], Checkpoint]) -> None:
    unet: Any = load("sd15").load_unet()
    with pytest.raises(PlanError, match=r"no unit is named 'down\.9'.*conv_in"):
        segments(unet, cuts=["down.9"])
    with pytest.raises(PlanError, match="no unit is named 'attic'"):
        segments(unet, taps=[Tap(tensor="attic", direction="in")])


def test_every_unit_gives_one_tensor_of_its_name(load: Callable[[str], Checkpoint]) -> None:
    units = flatten(load("sdxl").load_unet())
    names = [unit.name for unit in units]
    assert len(set(names)) == len(names)
    known = {"sample", "timestep", "context", "added.text_embeds", "added.time_ids"}
    for unit in units:
        assert {read.source for read in unit.reads} <= known
        known.add(unit.name)


def test_specs_name_sizes_by_level(load: Callable[[str], Checkpoint]) -> None:
    context, down, _, mid, *_ = export_unet(load("text").load_unet())
    assert {port.name: port.shape for port in context.inputs} == {
        "context": ("batch", "tokens", 32)
    }
    assert {port.name: port.shape for port in down.inputs} == {
        "timestep": ("batch",),
        "context.embedding": ("batch", 64),
        "context.down.0.attn.0": ("batch", "tokens", 2 * 16),
        "sample": ("batch", 4, "height", "width"),
    }
    assert mid.inputs[0].shape == ("batch", 32, "height//2", "width//2")


@pytest.mark.parametrize("family", ["text", "sd21-v", "sdxl"])
def test_text_encoders_give_what_transformers_gives(
    load: Callable[[str], Checkpoint], family: str
) -> None:
    ids = torch.tensor([[512, 5, 9, 513, 513], [512, 7, 513, 513, 513]])
    for i, encoder in enumerate(load(family).load_text_encoders()):
        module: Any = encoder
        with torch.no_grad():
            expected = module(ids, output_hidden_states=True)
            result = export_text_encoder(encoder, f"text.{i}").module({"input_ids": ids})
        pooled = expected.text_embeds if "text_embeds" in expected else expected.pooler_output
        states = {"normed.-1": expected.last_hidden_state, "pooled": pooled}
        norm = getattr(module, "text_model", module).final_layer_norm
        layers = module.config.num_hidden_layers
        for k in range(2, layers + 2):
            states[f"hidden.-{k}"] = expected.hidden_states[-k]
            if k <= layers:
                states[f"normed.-{k}"] = norm(expected.hidden_states[-k])
        assert result.keys() == states.keys()
        for name, tensor in states.items():
            torch.testing.assert_close(result[name], tensor, rtol=1e-5, atol=1e-5)


def test_vae_gives_what_diffusers_gives(load: Callable[[str], Checkpoint]) -> None:
    vae: Any = load("sd15").load_vae()
    decoder, encoder = export_vae(vae)
    latent, picture = torch.randn(2, 4, 3, 5), torch.randn(2, 3, 12, 20)
    with torch.no_grad():
        decoded = decoder.module({"latent": latent})["picture"]
        moments = encoder.module({"picture": picture})["moments"]
        assert torch.equal(decoded, vae.decode(latent).sample)
        assert torch.equal(moments, vae.encode(picture).latent_dist.parameters)
