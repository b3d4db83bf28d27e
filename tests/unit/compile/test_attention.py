"""Cross-attention in two halves against Diffusers' own, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.transformers.dual_transformer_2d import DualTransformer2DModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from engine.compile.attention import split
from engine.compile.segments import segments
from engine.compile.units import PREDICTION
from engine.errors import UnsupportedError
from tests.unit.compile.test_units import diffusers_forward, unet_inputs, walk


def transformer(**options: Any) -> Any:
    torch.manual_seed(0)
    return Transformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=8,
        num_layers=2,
        norm_num_groups=4,
        cross_attention_dim=6,
        **options,
    ).eval()


@pytest.mark.parametrize(
    "options",
    [{}, {"use_linear_projection": True}, {"attention_bias": True}, {"only_cross_attention": True}],
)
@torch.no_grad()
def test_the_halves_make_the_whole(options: dict[str, Any]) -> None:
    whole = transformer(**options)
    hidden, context = torch.randn(3, 8, 4, 5), torch.randn(3, 7, 6)
    expected = whole(hidden, encoder_hidden_states=context, return_dict=False)[0]
    projections, twin = split(whole)
    text = projections(context)
    attentions = 2 if "only_cross_attention" in options else 1
    assert text.shape == (3, 7, 2 * attentions * 2 * 8)
    assert torch.equal(twin(hidden, encoder_hidden_states=text, return_dict=False)[0], expected)
    # and the transformer that was split is the one that it was
    assert torch.equal(whole(hidden, encoder_hidden_states=context, return_dict=False)[0], expected)


def test_the_twin_has_every_other_layer_and_no_projection() -> None:
    whole = transformer()
    projections, twin = split(whole)
    parameters = {id(parameter): name for name, parameter in whole.named_parameters()}
    text = {id(parameter) for parameter in projections.parameters()}
    others = {id(parameter) for parameter in twin.parameters()}
    assert text.isdisjoint(others)
    assert text | others == set(parameters)
    names = {parameters[key] for key in text}
    assert names == {
        f"transformer_blocks.{i}.attn2.{layer}.weight"
        for i in range(2)
        for layer in ("to_k", "to_v")
    }


@pytest.mark.parametrize("upcast", [False, True])
def test_a_unet_of_cross_attention_only_is_its_chain(upcast: bool) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
        only_cross_attention=True,
        upcast_attention=upcast,
    ).eval()
    given = unet_inputs(unet)
    expected = diffusers_forward(unet, given)
    assert torch.equal(walk(segments(unet), given)[PREDICTION], expected)
    assert torch.equal(diffusers_forward(unet, given), expected)


@pytest.mark.parametrize("layer", ["spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k"])
def test_layers_that_are_not_reproduced_are_refused(layer: str) -> None:
    whole = transformer()
    setattr(whole.transformer_blocks[1].attn2, layer, nn.Identity())
    with pytest.raises(UnsupportedError, match=f"cross-attention with {layer} is not supported"):
        split(whole)


def test_other_attention_is_refused_by_name() -> None:
    whole = transformer()
    whole.transformer_blocks[0].attn2.set_processor(AttnProcessor())
    with pytest.raises(UnsupportedError, match="cross-attention by AttnProcessor is not supported"):
        split(whole)

    for field, value in (("residual_connection", True), ("rescale_output_factor", 2.0)):
        whole = transformer()
        setattr(whole.transformer_blocks[0].attn2, field, value)
        with pytest.raises(UnsupportedError, match="with a residual or a scale"):
            split(whole)

    dual = DualTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=8, norm_num_groups=4
    )
    with pytest.raises(UnsupportedError, match="attention of DualTransformer2DModel"):
        split(dual)
