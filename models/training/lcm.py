"""Distil the base model into an LCM-LoRA: pictures in two to six steps without guidance.

    torchrun --nproc-per-node 2 -m models.training.lcm --work WORK

Latent consistency distillation (Luo et al. 2023, arXiv:2310.04378; as a LoRA: arXiv:2311.05556) of
the model on itself. The teacher, with guidance, makes one DDIM step of 40 timesteps; the student,
which is the teacher plus LoRA factors, learns to predict from both ends of that step the same
clean latent. Writes ``models/lora-lcm/`` in PEFT's and in kohya's layout, to be used with
Diffusers' ``LCMScheduler`` and ``guidance_scale=1``.
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
    write_card,
)
from models.training.base import Noiser
from models.training.latents import LatentStore

GRID = 20  # timesteps between the points of LCMScheduler's grid of 50
STRIDE = 2 * GRID  # of one teacher step: a short training has fewer of them to carry over
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
        self, parts: Parts, teacher: UNet2DConditionModel, guidance: tuple[float, float]
    ) -> None:
        self._parts = parts
        self._teacher = teacher
        self._guidance = guidance
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

    def _teacher_step(self, noisy: Tensor, start: Tensor, end: Tensor, words: Tensor) -> Tensor:
        """One guided DDIM step."""
        low, high = self._guidance
        scale = torch.empty(len(noisy), 1, 1, 1, device=noisy.device).uniform_(low, high)
        without = self._empty.expand(len(noisy), -1, -1)
        twice = torch.cat([noisy, noisy]).contiguous(memory_format=torch.channels_last)
        both = self._teacher(
            twice, start.repeat(2), encoder_hidden_states=torch.cat([words, without])
        )
        told, free = both.sample.float().chunk(2)
        velocity = free + scale * (told - free)
        (a, s), (a_end, s_end) = self._mix(start), self._mix(end)
        stepped: Tensor = a_end * (a * noisy - s * velocity) + s_end * (s * noisy + a * velocity)
        return stepped

    def loss(self, latents: Tensor, tokens: Tensor) -> Tensor:
        """Pseudo-Huber distance of the student's predictions from both ends of a teacher step."""
        latents, words = latents.to(self._device), self._words(tokens)
        start = (spread_timesteps(len(latents), 1000 // GRID, self._device) + 1) * GRID - 1
        end = (start - STRIDE).clamp(min=0)
        a, s = self._mix(start)
        noisy = a * latents + s * torch.randn_like(latents)
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self._device, dtype=torch.bfloat16):
            guess = self._consistent(noisy, start, words)
            with torch.no_grad():
                nearer = self._teacher_step(noisy, start, end, words)
                goal = self._consistent(nearer, end, words)
        return ((guess - goal).square() + HUBER**2).sqrt().mean() - HUBER


def train(options: argparse.Namespace) -> None:
    """Distil, and write both files."""
    torch.manual_seed(6)
    parts = load_parts(options.base, options.device)
    teacher = copy.deepcopy(parts.unet)
    factors = add_lora(parts.unet, UNET_SITES, options.rank)
    distiller = Distiller(parts, teacher, tuple(options.guidance))
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
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--guidance", type=float, nargs=2, default=[3.0, 3.0], help="range of the teacher's scale"
    )
    add_arguments(parser, steps=700, batch=24, rate=7e-4)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
