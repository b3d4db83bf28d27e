"""Distil the base model into an LCM-LoRA: pictures in two to six steps without guidance.

    torchrun --nproc-per-node 2 -m models.training.lcm --work WORK

Latent consistency distillation (Luo et al. 2023, arXiv:2310.04378; as a LoRA: arXiv:2311.05556) of
the model on itself. The teacher, with guidance, walks some 240 timesteps in three solver steps; the
student, which is the teacher plus LoRA factors, learns to predict from both ends of that walk the
same clean latent. Walks are long because what the student knows at low noise reaches the highest
noise only through a chain of them: with 25 links of 40 timesteps a short training never got there,
and four steps drew worse than two.

Writes ``models/lora-lcm/`` in PEFT's and in kohya's layout, to be used with Diffusers'
``LCMScheduler`` and ``guidance_scale=1``.
"""

from __future__ import annotations

import argparse
import copy

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from models.training import data
from models.training.adapters import (
    REPOSITORY,
    UNET_SITES,
    Parts,
    add_arguments,
    add_lora,
    fit,
    load_parts,
    save_lora,
    spread_timesteps,
    start_lora,
    write_card,
)
from models.training.base import Noiser
from models.training.latents import LatentStore

GRID = 20  # timesteps between the points of LCMScheduler's grid of 50
STRIDE, SUBSTEPS = 240, 3  # timesteps of a teacher's walk, and its solver steps
SIGMA_DATA, TIME_SCALE = 0.5, 10.0  # as in LCMScheduler
HUBER = 1e-3


def boundary(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """LCM's weights of the input and of the prediction, ``(n, 1, 1, 1)``: at time 0 the input is
    the answer.
    """
    s = timesteps.float().view(-1, 1, 1, 1) * TIME_SCALE
    total = s.square() + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, s / total.sqrt()


class Distiller:
    """Teacher, student, and the noise schedule between them."""

    def __init__(
        self,
        parts: Parts,
        teacher: UNet2DConditionModel,
        guidance: tuple[float, float],
        *,
        stride: int = STRIDE,
        substeps: int = SUBSTEPS,
    ) -> None:
        self._parts = parts
        self._teacher = teacher
        self._guidance = guidance
        self._stride, self._substeps = stride, substeps
        self._device = next(teacher.parameters()).device.type
        self._alphas = Noiser(self._device).alphas
        self._empty = self._words(parts.tokens([""]))

    @torch.no_grad()
    def _words(self, tokens: Tensor) -> Tensor:
        words: Tensor = self._parts.text(tokens.to(self._device)).last_hidden_state
        return words

    def _mix(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self._alphas[timesteps].view(-1, 1, 1, 1)
        return alpha.sqrt(), (1 - alpha).sqrt()

    def _consistent(self, noisy: Tensor, timesteps: Tensor, words: Tensor) -> Tensor:
        """The student's clean latent."""
        velocity = self._parts.unet(noisy, timesteps, encoder_hidden_states=words).sample.float()
        a, s = self._mix(timesteps)
        skip, out = boundary(timesteps)
        clean: Tensor = skip * noisy + out * (a * noisy - s * velocity)
        return clean

    def _guided(self, noisy: Tensor, timesteps: Tensor, words: Tensor, scale: Tensor) -> Tensor:
        """The teacher's clean latent."""
        without = self._empty.expand(len(noisy), -1, -1)
        twice = torch.cat([noisy, noisy]).contiguous(memory_format=torch.channels_last)
        both = self._teacher(
            twice, timesteps.repeat(2), encoder_hidden_states=torch.cat([words, without])
        )
        told, free = both.sample.float().chunk(2)
        a, s = self._mix(timesteps)
        clean: Tensor = a * noisy - s * (free + scale * (told - free))
        return clean

    @torch.no_grad()
    def _walk(self, noisy: Tensor, start: Tensor, end: Tensor, words: Tensor) -> Tensor:
        """The teacher's way from one time to another, by DPM-Solver++(2M) (Lu et al. 2022,
        arXiv:2211.01095), whose first step is DDIM's; to time 0, the clean latent itself.
        """
        low, high = self._guidance
        scale = torch.empty(len(noisy), 1, 1, 1, device=noisy.device).uniform_(low, high)
        before: tuple[Tensor, Tensor] | None = None  # the last clean latent, and the log-SNR step
        here = start
        for index in range(1, self._substeps + 1):
            there = start + ((end - start) * index) // self._substeps
            (a, s), (a_next, s_next) = self._mix(here), self._mix(there)
            step = (a_next / s_next).log() - (a / s).log()
            clean = self._guided(noisy, here, words, scale)
            towards = clean
            if before is not None:
                towards = clean + step / (2 * before[1]) * (clean - before[0])
            moved = s_next / s * noisy - a_next * torch.expm1(-step) * towards
            # Time 0 has some noise left, which no picture should learn to keep.
            noisy = torch.where((there > 0).view(-1, 1, 1, 1), moved, clean)
            before, here = (clean, step), there
        return noisy

    def loss(self, latents: Tensor, tokens: Tensor) -> Tensor:
        """Pseudo-Huber distance of the student's predictions from both ends of a teacher's walk."""
        latents, words = latents.to(self._device), self._words(tokens)
        start = (spread_timesteps(len(latents), 1000 // GRID, self._device) + 1) * GRID - 1
        end = (start - self._stride).clamp(min=0)
        a, s = self._mix(start)
        noisy = a * latents + s * torch.randn_like(latents)
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self._device, dtype=torch.bfloat16):
            guess = self._consistent(noisy, start, words)
            with torch.no_grad():
                nearer = self._walk(noisy, start, end, words)
                goal = self._consistent(nearer, end, words)
        return ((guess - goal).square() + HUBER**2).sqrt().mean() - HUBER


def train(options: argparse.Namespace) -> None:
    """Distil, and write both files."""
    torch.manual_seed(6)
    parts = load_parts(options.base, options.device)
    teacher = copy.deepcopy(parts.unet)
    factors = add_lora(parts.unet, UNET_SITES, options.rank)
    if options.start_from is not None:
        start_lora(options.start_from, parts.unet, None)
    distiller = Distiller(
        parts,
        teacher,
        tuple(options.guidance),
        stride=options.stride,
        substeps=options.substeps,
    )
    store = LatentStore(options.work / "latents", data.NATIVE)

    def loss_of(rng: np.random.Generator) -> Tensor:
        return distiller.loss(*store.batch(rng, options.batch))

    if fit("lcm", nn.ParameterList(factors), loss_of, options):
        folder = options.out or REPOSITORY / "models" / "lora-lcm"
        save_lora(folder, parts.unet, None)
        write_card("lora-lcm", folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument(
        "--guidance", type=float, nargs=2, default=[3.0, 3.0], help="range of the teacher's scale"
    )
    parser.add_argument("--stride", type=int, default=STRIDE, help="timesteps of a teacher's walk")
    parser.add_argument("--substeps", type=int, default=SUBSTEPS, help="its solver steps")
    add_arguments(parser, steps=2600, batch=24, rate=2e-3)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
