"""Between pictures and latents: decoding, encoding, masks, and previews that cost nothing.

Pictures are uint8 (height, width, 3); latents float32 (channels, height, width) at the scale that
the UNet sees. Numbers follow Diffusers' ``VaeImageProcessor`` and its image-to-image and
inpainting pipelines to the last rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from engine.errors import ExecutionError, UnsupportedError
from engine.types import Image
from engine.vae_tiles import Tiling, run_in_tiles

if TYPE_CHECKING:
    from engine.compile.manifest import LatentSpec
    from engine.runtime.base import Graph

DEFAULT_BUDGET_PX = 1024 * 1024
"""Pixels decoded in one run; a decoder needs some 4 kB for each at its widest layer."""
PREVIEW_SIDE_PX = 128


class Vae:
    """The autoencoder of one plan. Safe to call from several threads.

    Args:
        latent: of the plan's model.
        decoder: opened graph from an unscaled latent to a picture in -1 … 1.
        encoder: opened graph from such a picture to ``moments``: mean and log-variance of the
            unscaled latent, side by side; None where the plan has none.
        device: where the graphs take their inputs.
        budget_px: bound on the pixels decoded at once; a larger picture is decoded alone.
        tiling: which pictures are cut into tiles, and how.
    """

    def __init__(
        self,
        latent: LatentSpec,
        decoder: Graph,
        encoder: Graph | None,
        *,
        device: torch.device,
        budget_px: int = DEFAULT_BUDGET_PX,
        tiling: Tiling | None = None,
    ) -> None:
        self._latent = latent
        self._decoder = decoder
        self._encoder = encoder
        self._device = device
        self._budget_px = budget_px
        self._tiling = tiling or Tiling()

    def approximations(self, width_px: int, height_px: int) -> dict[str, str]:
        """What it approximates in a picture of this size, by name, with its dial."""
        applies = self._tiling.applies(height_px, width_px)
        return {"vae_tiles": self._tiling.dial} if applies else {}

    def decode(self, latents: torch.Tensor) -> list[Image]:
        """Pictures of (batch, channels, height, width) latents.

        Raises:
            ExecutionError: the decoder failed or gave NaN.
        """
        images: list[Image] = []
        for part in self._portions(latents):
            levels = (self._decode(part) * 255).round().to(torch.uint8)
            images.extend(levels.permute(0, 2, 3, 1).contiguous().cpu().numpy())
        return images

    def decode_levels(self, latents: torch.Tensor) -> torch.Tensor:
        """The same before rounding: (batch, 3, height, width) float32 in 0 … 1, on the CPU."""
        return torch.cat([self._decode(part).cpu() for part in self._portions(latents)])

    def encode(self, image: Image, generator: torch.Generator) -> torch.Tensor:
        """A latent of ``image``, drawn from the encoder's distribution with ``generator``.

        Raises:
            UnsupportedError: the plan has no encoder.
            ExecutionError: the encoder failed or gave NaN.
        """
        return self._encode(_picture(image), generator)

    def encode_masked(self, image: Image, mask: Image, generator: torch.Generator) -> torch.Tensor:
        """A latent of ``image`` with mid-grey where ``mask`` is white."""
        return self._encode(_picture(image) * (_mask(mask) < 0.5), generator)

    def mask(self, mask: Image) -> torch.Tensor:
        """(1, height, width) on the latent grid: 1 where it is repainted, 0 where kept."""
        factor = self._latent.factor_px
        size = (mask.shape[0] // factor, mask.shape[1] // factor)
        return functional.interpolate(_mask(mask)[None], size=size)[0]

    def _portions(self, latents: torch.Tensor) -> Sequence[torch.Tensor]:
        pixels = latents.shape[-1] * latents.shape[-2] * self._latent.factor_px**2
        return torch.split(latents, max(1, self._budget_px // pixels))

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        unscaled = latents.float() / self._latent.scaling + self._latent.shift
        factor = self._latent.factor_px
        height_px, width_px = (side * factor for side in unscaled.shape[-2:])
        if self._tiling.applies(height_px, width_px):
            pictures = self._in_tiles(self._decoder, unscaled, Fraction(factor))
        else:
            pictures = _run(self._decoder, unscaled, self._device).float()
        if not bool(torch.isfinite(pictures).all()):
            raise ExecutionError(f"{self._decoder.spec.name}: gave NaN or infinite values")
        return (pictures * 0.5 + 0.5).clamp(0, 1)

    def _encode(self, picture: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if self._encoder is None:
            raise UnsupportedError("this plan has no encoder, so it takes no images")
        if self._tiling.applies(*picture.shape[-2:]):
            scale = Fraction(1, self._latent.factor_px)
            moments = self._in_tiles(self._encoder, picture[None], scale)[0]
        else:
            moments = _run(self._encoder, picture[None], self._device).float().cpu()[0]
        if not bool(torch.isfinite(moments).all()):
            raise ExecutionError(f"{self._encoder.spec.name}: gave NaN or infinite values")
        mean, log_variance = moments.chunk(2)
        deviation = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
        noise = torch.randn((1, *mean.shape), generator=generator)[0]
        return (mean + deviation * noise - self._latent.shift) * self._latent.scaling

    def _in_tiles(self, graph: Graph, whole: torch.Tensor, scale: Fraction) -> torch.Tensor:
        """Run a graph tile by tile, each picture of the batch alone."""
        cell_px = self._latent.factor_px if scale > 1 else 1
        return torch.cat(
            [
                run_in_tiles(
                    lambda tile: _run(graph, tile, self._device).float(),
                    one[None],
                    tile=self._tiling.tile_px // cell_px,
                    overlap=self._tiling.overlap,
                    scale=scale,
                    least=self._latent.min_px // cell_px,
                )
                for one in whole
            ]
        )


def _run(graph: Graph, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Run a graph of one input and one output."""
    taken = next(i for i in graph.spec.inputs if not i.optional)
    feed = tensor.to(device, getattr(torch, taken.dtype)).contiguous()
    return graph.run({taken.name: feed})[graph.spec.outputs[0].name]


def _picture(image: Image) -> torch.Tensor:
    """(3, height, width) in -1 … 1."""
    return 2.0 * (torch.tensor(image).permute(2, 0, 1).float() / 255.0) - 1.0


def _mask(mask: Image) -> torch.Tensor:
    """(1, height, width): 1 from mid-grey up, else 0."""
    return (torch.tensor(mask).float() / 255.0 >= 0.5).float()[None]


# ------------------------------------------------------------------------------------ previews


def preview_latents(latent: LatentSpec, count: int = 32, *, seed: int = 0) -> torch.Tensor:
    """(count, channels, 16, 16) latents to fit a preview on, when there are no pictures at hand.

    Unit noise at four grain sizes: flat areas, as pictures have them, as well as detail.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        cells = 16 >> (i % 4)
        coarse = torch.randn((1, latent.channels, cells, cells), generator=generator)
        rows.append(functional.interpolate(coarse, size=(16, 16)))
    return torch.cat(rows)


def fit_preview(
    decode: Callable[[torch.Tensor], torch.Tensor], latents: torch.Tensor
) -> tuple[tuple[float, ...], ...]:
    """The linear map from a latent cell to its mean colour that fits ``latents`` best.

    Args:
        decode: from (batch, channels, h, w) latents to (batch, 3, H, W) levels in 0 … 1, e.g.
            :meth:`Vae.decode_levels`.
        latents: to fit on, at the scale that the UNet sees.

    Returns:
        (channels + 1) rows of 3; the last row is the offset.
    """
    height, width = latents.shape[-2:]
    colours = functional.adaptive_avg_pool2d(decode(latents).float(), (height, width))
    cells = latents.movedim(1, -1).flatten(0, -2).double()
    cells = torch.cat([cells, torch.ones(len(cells), 1, dtype=torch.float64)], dim=1)
    targets = colours.movedim(1, -1).flatten(0, -2).double()
    solution = torch.linalg.lstsq(cells, targets, driver="gelsd").solution
    return tuple(tuple(row) for row in solution.tolist())


class Preview:
    """Draws a small picture from a latent with one matrix product per cell.

    Args:
        matrix: of :func:`fit_preview`.
        side_px: bound on the longer side of what is drawn.
    """

    def __init__(
        self, matrix: Sequence[Sequence[float]], *, side_px: int = PREVIEW_SIDE_PX
    ) -> None:
        self._matrix = torch.tensor(matrix, dtype=torch.float32)
        self._side_px = side_px

    def __call__(self, latent: torch.Tensor) -> Image:
        """A picture of a (channels, height, width) clean prediction."""
        cells = latent.float().cpu().nan_to_num()
        colours = torch.einsum("chw,cr->rhw", cells, self._matrix[:-1])
        colours = (colours + self._matrix[-1][:, None, None]).clamp(0, 1)
        scale = self._side_px / max(latent.shape[-2:])
        size = [max(1, round(side * scale)) for side in latent.shape[-2:]]
        grown = functional.interpolate(
            colours[None], size=size, mode="bilinear", antialias=scale < 1
        )[0]
        levels = (grown * 255).round().to(torch.uint8)
        image: Image = levels.permute(1, 2, 0).contiguous().numpy()
        return image
