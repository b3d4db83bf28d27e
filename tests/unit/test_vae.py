"""Pictures and latents go back and forth as in Diffusers; previews look like their pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PilImage

from engine.checkpoint import Checkpoint
from engine.compile.manifest import LatentSpec
from engine.errors import ExecutionError, UnsupportedError
from engine.types import Image
from engine.vae import Preview, Vae, fit_preview, preview_latents
from tests.conftest import DEFAULT_MODEL
from tests.graphs import FunctionGraph, segment

Tiny = Callable[[str], Path]
CPU = torch.device("cpu")


def vae_of(path: Path, **options: Any) -> tuple[Vae, FunctionGraph, Any]:
    """(ours, its decoder graph, Diffusers' module) of a checkpoint."""
    checkpoint = Checkpoint.open(path)
    module: Any = checkpoint.load_vae()
    decoder = FunctionGraph(
        segment("vae.decoder", {"latent": "float32"}, ["image"]),
        lambda z: [module.decode(z, return_dict=False)[0]],
    )
    encoder = FunctionGraph(
        segment("vae.encoder", {"image": "float32"}, ["moments"]),
        lambda x: [module.encode(x).latent_dist.parameters],
    )
    latent = checkpoint.model_spec().latent
    return Vae(latent, decoder, encoder, device=CPU, **options), decoder, module


def picture(seed: int = 0, width: int = 48, height: int = 32) -> Image:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def mask_of(seed: int = 1, width: int = 48, height: int = 32) -> Image:
    return np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_decoding_rounds_as_diffusers(tiny_checkpoint: Tiny) -> None:
    from diffusers.image_processor import VaeImageProcessor

    vae, _, module = vae_of(tiny_checkpoint("sd15"))
    latents = 0.5 * torch.randn((3, 4, 8, 12), generator=seeded())
    with torch.no_grad():
        decoded = module.decode(latents / module.config.scaling_factor).sample
    expected = VaeImageProcessor(vae_scale_factor=4).postprocess(decoded, output_type="pil")
    images = vae.decode(latents)
    assert [image.shape for image in images] == [(32, 48, 3)] * 3
    for image, other in zip(images, expected, strict=True):
        np.testing.assert_array_equal(image, np.asarray(other))
        assert 0 < image.mean() < 255


def test_encoding_draws_as_diffusers_image_to_image(tiny_checkpoint: Tiny) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    vae, _, _ = vae_of(tiny_checkpoint("sd15"))
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(
        tiny_checkpoint("sd15"), safety_checker=None
    )
    pixels = pipeline.image_processor.preprocess(PilImage.fromarray(picture()))
    timestep = torch.tensor([1])  # leaves the latent nearly as it is
    theirs, ours = seeded(), seeded()
    with torch.no_grad():
        started = pipeline.prepare_latents(pixels, timestep, 1, 1, torch.float32, CPU, theirs)
    latent = vae.encode(picture(), ours)
    noise = torch.randn((1, *latent.shape), generator=ours)
    expected = pipeline.scheduler.add_noise(latent[None], noise, timestep)
    torch.testing.assert_close(started, expected, rtol=0, atol=1e-5)
    assert torch.equal(theirs.get_state(), ours.get_state())


def test_masks_are_those_of_diffusers_inpainting(tiny_checkpoint: Tiny) -> None:
    from diffusers import StableDiffusionInpaintPipeline

    vae, _, _ = vae_of(tiny_checkpoint("inpaint9"))
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(tiny_checkpoint("inpaint9"))
    pixels = pipeline.image_processor.preprocess(PilImage.fromarray(picture()))
    binary = pipeline.mask_processor.preprocess(PilImage.fromarray(mask_of()))
    with torch.no_grad():
        mask, masked = pipeline.prepare_mask_latents(
            binary, pixels * (binary < 0.5), 1, 32, 48, torch.float32, CPU, seeded(), False
        )
    assert torch.equal(vae.mask(mask_of())[None], mask)
    ours = vae.encode_masked(picture(), mask_of(), seeded())
    torch.testing.assert_close(ours[None], masked, rtol=0, atol=1e-5)


def test_latents_are_shifted_and_scaled_back() -> None:
    latent = LatentSpec(
        channels=4,
        factor_px=4,
        scaling=0.5,
        shift=0.25,
        size_multiple_px=4,
        native_px=32,
        min_px=4,
        max_px=64,
    )
    seen = []

    def decode(z: torch.Tensor) -> list[torch.Tensor]:
        seen.append(z)
        return [torch.zeros(len(z), 3, 8, 8)]

    flat = torch.cat([torch.ones(1, 4, 2, 2), torch.full((1, 4, 2, 2), -60.0)], dim=1)
    vae = Vae(
        latent,
        FunctionGraph(segment("vae.decoder", {"z": "float32"}, ["image"]), decode),
        FunctionGraph(segment("vae.encoder", {"x": "float32"}, ["moments"]), lambda _: [flat]),
        device=CPU,
    )
    encoded = vae.encode(picture(width=8, height=8), seeded())
    torch.testing.assert_close(encoded, torch.full((4, 2, 2), 0.375), rtol=0, atol=1e-5)
    assert int(vae.decode(encoded[None])[0][0, 0, 0]) == 128
    torch.testing.assert_close(seen[0], torch.ones(1, 4, 2, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("budget_px", "runs"), [(10**6, 1), (2 * 32 * 32, 3), (1, 5)])
def test_decoding_is_bounded_in_pixels(budget_px: int, runs: int, tiny_checkpoint: Tiny) -> None:
    vae, decoder, _ = vae_of(tiny_checkpoint("sd15"), budget_px=budget_px)
    latents = torch.randn((5, 4, 8, 8), generator=seeded())
    images = vae.decode(latents)
    assert decoder.runs == runs
    alone = vae.decode(latents[3:4])[0]
    assert np.abs(images[3].astype(int) - alone).max() <= 1


def test_nan_is_an_error_and_not_a_black_picture(tiny_checkpoint: Tiny) -> None:
    vae, _, _ = vae_of(tiny_checkpoint("sd15"))
    with pytest.raises(ExecutionError, match=r"vae\.decoder"):
        vae.decode(torch.full((1, 4, 8, 8), float("nan")))


def test_without_an_encoder_images_are_refused(tiny_checkpoint: Tiny) -> None:
    _, decoder, _ = vae_of(tiny_checkpoint("sd15"))
    spec = Checkpoint.open(tiny_checkpoint("sd15")).model_spec().latent
    with pytest.raises(UnsupportedError, match="no encoder"):
        Vae(spec, decoder, None, device=CPU).encode(picture(), seeded())


def test_preview_recovers_a_linear_decoder() -> None:
    generator = seeded()
    matrix = 0.1 * torch.randn((5, 3), generator=generator)
    matrix[-1] = 0.5

    def decode(latents: torch.Tensor) -> torch.Tensor:
        colours = torch.einsum("bchw,cr->brhw", latents, matrix[:-1])
        colours = colours + matrix[-1][:, None, None]
        return colours.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)

    fitted = fit_preview(decode, torch.randn((4, 4, 8, 8), generator=generator))
    torch.testing.assert_close(torch.tensor(fitted), matrix, rtol=0, atol=1e-5)
    image = Preview(fitted, side_px=8)(torch.zeros(4, 8, 4))
    assert image.shape == (8, 4, 3)
    assert image.dtype == np.uint8
    assert (image == 128).all()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((4, 8, 8), (128, 128)), ((4, 64, 96), (85, 128)), ((4, 256, 128), (128, 64))],
)
def test_previews_are_small_whatever_the_picture(
    shape: tuple[int, int, int], expected: tuple[int, int]
) -> None:
    image = Preview([[0.1] * 3] * 5)(torch.full(shape, float("nan")))
    assert image.shape[:2] == expected


def test_preview_resembles_the_decoded_picture(default_model: Path) -> None:
    vae, _, _ = vae_of(default_model)
    spec = Checkpoint.open(default_model).model_spec().latent
    preview = Preview(fit_preview(vae.decode_levels, preview_latents(spec)), side_px=16)
    latents = preview_latents(spec, seed=1)
    drawn = np.stack([preview(latent) for latent in latents]).astype(float) / 255
    levels = torch.nn.functional.adaptive_avg_pool2d(vae.decode_levels(latents), 16)
    target = levels.permute(0, 2, 3, 1).numpy()
    explained = 1 - ((drawn - target) ** 2).mean() / target.var()
    # A random decoder is hardly linear; a trained one must be, for previews to be of use.
    assert explained > (0.6 if default_model == DEFAULT_MODEL else 0.0)
