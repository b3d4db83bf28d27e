"""Low-rank sites: which layers they are, and that factors do what merged weights do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine.checkpoint import Checkpoint
from engine.compile.lowrank import LowRank, Site, using, wrap_text_encoder, wrap_unet


@pytest.mark.parametrize(
    ("base", "x"),
    [
        (nn.Linear(6, 4), torch.randn(3, 5, 6)),
        (nn.Conv2d(6, 4, kernel_size=1), torch.randn(3, 6, 2, 5)),
    ],
)
def test_each_row_gets_its_own_merged_weight(base: Any, x: torch.Tensor) -> None:
    layer = LowRank(base)
    down, up = torch.randn(3, 2, 6), torch.randn(3, 4, 2)
    assert torch.equal(layer(x), base(x))
    layer.factors = down, up
    together = layer(x)
    for row in range(3):
        merged = {name: tensor.clone() for name, tensor in base.named_parameters()}
        merged["weight"] += (up[row] @ down[row]).reshape(base.weight.shape)
        expected = torch.func.functional_call(base, merged, (x[row : row + 1],))
        torch.testing.assert_close(together[row : row + 1], expected, rtol=1e-5, atol=1e-5)


def test_one_row_of_factors_serves_a_batch() -> None:
    layer = LowRank(nn.Linear(6, 4))
    x, down, up = torch.randn(3, 5, 6), torch.randn(1, 2, 6), torch.randn(1, 4, 2)
    layer.factors = down, up
    once = layer(x)
    layer.factors = down.repeat(3, 1, 1), up.repeat(3, 1, 1)
    torch.testing.assert_close(once, layer(x))


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_sites_are_those_of_the_transformer_blocks(
    tiny_checkpoint: Callable[[str], Path], family: str
) -> None:
    unet: Any = Checkpoint.open(tiny_checkpoint(family)).load_unet()
    transformers = sum(path.endswith("proj_in") for path, _ in unet.named_modules())
    blocks = sum(path.endswith("attn1") for path, _ in unet.named_modules())
    sites = wrap_unet(unet)
    assert len(sites) == 2 * transformers + 10 * blocks
    assert {s.module for s in wrap_unet(unet)} == {s.module for s in sites}  # nothing twice
    first = next(site for site in sites if site.module.endswith("attn2.to_k"))
    assert first.layer.in_features == unet.config.cross_attention_dim


def test_text_sites_carry_the_names_that_adapters_use(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    encoders = Checkpoint.open(tiny_checkpoint("sdxl")).load_text_encoders()
    for encoder in encoders:
        sites = wrap_text_encoder(encoder)
        assert "text_model.encoder.layers.0.self_attn.q_proj" in {site.module for site in sites}
        layers = {site.module.split(".")[3] for site in sites}
        assert len(sites) == 6 * len(layers)


def test_factors_are_taken_back_after_an_error() -> None:
    site = Site("site", LowRank(nn.Linear(6, 4)))
    feeds = {site.down_input: torch.zeros(1, 1, 6), site.up_input: torch.zeros(1, 4, 1)}

    def fail() -> None:
        with using((site,), feeds):
            assert site.layer.factors is not None
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert site.layer.factors is None
