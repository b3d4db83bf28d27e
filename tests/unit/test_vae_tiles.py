"""Tiles: what Diffusers draws above the bound, and nothing changed below it."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.errors import InvalidRequestError
from engine.vae_tiles import Tiling, run_in_tiles
from tests.unit.test_vae import picture, seeded, vae_of

Tiny = Callable[[str], Path]
TILES = Tiling(above_px=32 * 32, tile_px=32)


def as_tiled(module: Any) -> Any:
    """Diffusers' module with the tiles of :data:`TILES`."""
    module.enable_tiling()
    module.tile_sample_min_size = 32
    module.tile_latent_min_size = 32 // 4
    module.tile_overlap_factor = TILES.overlap
    return module


@pytest.mark.parametrize(("height", "width"), [(14, 14), (20, 8), (8, 26), (20, 32)])
def test_decoding_is_tiled_as_in_diffusers(height: int, width: int, tiny_checkpoint: Tiny) -> None:
    vae, _, module = vae_of(tiny_checkpoint("sd15"), tiling=TILES)
    latents = torch.randn((2, 4, height, width), generator=seeded())
    ours = vae.decode_levels(latents)
    assert ours.shape == (2, 3, 4 * height, 4 * width)
    unscaled = latents / module.config.scaling_factor
    with torch.no_grad():
        whole = module.decode(unscaled).sample
        tiled = as_tiled(module).tiled_decode(unscaled).sample
    theirs = (tiled / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, (whole / 2 + 0.5).clamp(0, 1), atol=1e-3)


def test_encoding_is_tiled_as_in_diffusers(tiny_checkpoint: Tiny) -> None:
    vae, _, module = vae_of(tiny_checkpoint("sd15"), tiling=TILES)
    image = picture(width=56, height=80)
    ours = vae.encode(image, seeded())
    pixels = 2.0 * torch.tensor(image).permute(2, 0, 1)[None].float() / 255.0 - 1.0
    with torch.no_grad():
        drawn = as_tiled(module).encode(pixels).latent_dist.sample(seeded())
    assert torch.allclose(ours, drawn[0] * module.config.scaling_factor, atol=1e-5)


def test_up_to_the_bound_a_picture_is_whole(tiny_checkpoint: Tiny) -> None:
    tiled, _, _ = vae_of(tiny_checkpoint("sd15"), tiling=TILES)
    plain, _, _ = vae_of(tiny_checkpoint("sd15"))
    latents = torch.randn((2, 4, 8, 8), generator=seeded())
    for ours, exact in zip(tiled.decode(latents), plain.decode(latents), strict=True):
        np.testing.assert_array_equal(ours, exact)
    assert tiled.approximations(32, 32) == {}
    assert tiled.approximations(33, 32) == {"vae_tiles": "32 px, overlap 0.25"}
    assert plain.approximations(1024, 1024) == {}


def test_no_tile_is_smaller_than_the_graph_takes() -> None:
    """A sliver at the edge is grown backwards, and only its own part is kept."""
    seen: list[tuple[int, ...]] = []

    def twice(tile: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(tile.shape[2:]))
        return tile.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    whole = torch.arange(13 * 14, dtype=torch.float32).view(1, 1, 13, 14)
    out = run_in_tiles(twice, whole, tile=8, overlap=0.25, scale=Fraction(2), least=4)
    assert torch.equal(out, twice(whole))  # where neighbours agree, blending changes nothing
    assert min(min(size) for size in seen) == 4
    assert max(max(size) for size in seen[:-1]) == 8


@pytest.mark.parametrize("wrong", [{"overlap": 0.0}, {"overlap": 0.9}, {"tile_px": 0}])
def test_bad_tiles_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        Tiling(**wrong)
