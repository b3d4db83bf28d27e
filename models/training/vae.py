"""Train the autoencoder: 8 px of picture to one cell of latent, in both directions.

    torchrun --nproc-per-node 2 -m models.training.vae --work WORK --minutes 16 [--device cuda]

It sees crops dense with pictograms (also such as are no concepts, in shuffled colours) so that it
learns edges and shapes rather than our concepts, and whole scenes towards the end. The checkpoint
is ``WORK/vae.pt``; the finished autoencoder is ``WORK/vae`` in Diffusers layout, with the latents'
mean and deviation folded into its quantising convolutions, so that latents have zero mean and unit
variance per channel and ``scaling_factor`` is 1. Later, at any time,

    torchrun --nproc-per-node 2 -m models.training.vae --work WORK --minutes 10 \\
        --decoder-only --name vae-tuned

goes on with the decoder alone: ``WORK/vae-tuned`` reads the same latents.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from models.training import data
from models.training.common import (
    Curve,
    Ema,
    average_gradients,
    load_checkpoint,
    log,
    millions,
    same_everywhere,
    save_checkpoint,
    start_processes,
)
from models.training.crops import CROP, Crops, held_out, to_tensor

KL_WEIGHT = 1e-4
EDGE_WEIGHT = 0.5
RATE, TUNING_RATE = 1.5e-3, 3e-4
"""Learning rates from random weights, and of a decoder that is finished but for a little."""
WHOLE_SCENES_FROM = 0.85  # of the run: until here, crops
TUNED_ON_SCENES_FROM = (
    0.4  # likewise of a run of the decoder alone, which ends on what it will draw
)


def build(latent_channels: int, widths: tuple[int, ...]) -> AutoencoderKL:
    """The architecture: one residual layer a level, no attention, a factor of 2 between levels."""
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        latent_channels=latent_channels,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=128,
        scaling_factor=1.0,
        force_upcast=False,
    )


def loss_of(vae: AutoencoderKL, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """The training loss, and the mean squared error alone (for the curve)."""
    with torch.autocast(pictures.device.type, dtype=torch.bfloat16):
        posterior = vae.encode(pictures).latent_dist
        drawn = vae.decode(posterior.sample()).sample
    drawn = drawn.float()
    error = drawn - pictures
    squared = error.square().mean()
    coarse = F.avg_pool2d(error, 4).abs().mean()
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (
        error[..., 1:, :] - error[..., :-1, :]
    ).abs().mean()
    kl = (
        0.5
        * (
            posterior.mean.float().square() + posterior.var.float() - 1.0 - posterior.logvar.float()
        ).mean()
    )
    return (
        error.abs().mean() + 2 * squared + 0.5 * coarse + EDGE_WEIGHT * edges + KL_WEIGHT * kl,
        squared,
    )


@torch.no_grad()
def decibels(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Mean peak signal-to-noise ratio of reconstructions, in dB."""
    total = 0.0
    for part in torch.split(pictures, 8):
        drawn = vae.decode(vae.encode(part).latent_dist.mode()).sample.clamp(-1, 1)
        mse = ((drawn - part) / 2).square().mean(dim=(1, 2, 3)).clamp_min(1e-8)
        total += float((-10 * mse.log10()).sum())
    return total / len(pictures)


def fold_statistics(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Make latents zero-mean and unit-variance per channel, exactly, by rescaling the two
    quantising convolutions.
    """
    with torch.no_grad():
        means = torch.cat(
            [vae.encode(part).latent_dist.mode() for part in torch.split(pictures, 8)]
        )
        mean, deviation = means.mean(dim=(0, 2, 3)), means.std(dim=(0, 2, 3))
        channels = len(mean)
        quant, post = vae.quant_conv, vae.post_quant_conv
        post.bias += (post.weight[:, :, 0, 0] * mean).sum(dim=1)
        post.weight *= deviation[None, :, None, None]
        quant.weight[:channels] /= deviation[:, None, None, None]
        quant.bias[:channels] = (quant.bias[:channels] - mean) / deviation
        quant.bias[channels:] -= 2 * deviation.log()


class Run:
    """A training run's modules, and how to save and load them.

    With ``--decoder-only`` it starts from the finished ``WORK/vae`` and leaves the encoder, and so
    every latent and every UNet that was trained on them, as they are.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        if options.decoder_only:
            self.vae = AutoencoderKL.from_pretrained(options.work / "vae")
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)
        else:
            self.vae = build(options.latent_channels, tuple(options.widths))
        self.vae.to(options.device, memory_format=torch.channels_last)
        trained = [p for p in self.vae.parameters() if p.requires_grad]
        self.rate = options.rate or (TUNING_RATE if options.decoder_only else RATE)
        self.optimizer = torch.optim.AdamW(
            trained, lr=self.rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
        )
        self.ema = Ema(self.vae, 0.998)
        self.step, self.spent = 0, 0.0
        self.path = options.work / f"{options.name}.pt"
        if (state := load_checkpoint(self.path)) is not None:
            self.vae.load_state_dict(state["vae"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.ema.load_state_dict(state["ema"])
            self.step, self.spent = state["step"], state["spent"]

    def save(self) -> None:
        """Write the checkpoint to resume from."""
        modules = {"vae": self.vae, "optimizer": self.optimizer, "ema": self.ema}
        state = {name: module.state_dict() for name, module in modules.items()}
        save_checkpoint(self.path, state | {"step": self.step, "spent": self.spent})

    def averaged(self) -> AutoencoderKL:
        """A copy with the averaged weights."""
        copy: AutoencoderKL = AutoencoderKL.from_config(self.vae.config)
        self.ema.copy_to(copy)
        return copy.to(self.options.device)

    def update(self, pictures: Tensor) -> float:
        """One step; returns the mean squared error."""
        loss, squared = loss_of(self.vae, pictures)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        average_gradients([self.vae])
        torch.nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        self.optimizer.step()
        self.ema.update(self.vae)
        self.step += 1
        return float(squared.detach())


def train(options: argparse.Namespace) -> None:
    """Train for ``options.minutes`` in all, resuming from the checkpoint."""
    rank, size = start_processes()
    torch.manual_seed(0)  # the same weights in every process
    run = Run(options)
    torch.manual_seed(1000 * run.step + rank)
    log(f"autoencoder: {millions(run.vae)} parameters, {size} processes, step {run.step}")
    atlas = data.Atlas(options.work)
    crops = Crops(atlas, seed=1000 * run.step + rank)
    curve = Curve(options.work / f"{options.name}.jsonl")
    measured = held_out(atlas, options.held_out, options.device) if rank == 0 else {}
    smooth, mark = 0.0, time.time()
    whole_from = TUNED_ON_SCENES_FROM if options.decoder_only else WHOLE_SCENES_FROM
    clock, before, budget = time.time(), run.spent, 60 * options.minutes
    while (progress := same_everywhere((before + time.time() - clock) / budget)) < 1:
        warm = min(1.0, (run.step + 1) / 100)
        rate = run.rate * warm * max(0.01, 0.5 + 0.5 * math.cos(math.pi * progress))
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        pictures = crops.batch(options.batch, whole=progress > whole_from)
        value = run.update(to_tensor(pictures, options.device))
        run.spent = before + time.time() - clock
        smooth = value if not smooth else 0.98 * smooth + 0.02 * value
        if run.step % options.report == 0 or options.smoke:
            speed = options.report * options.batch * size * CROP**2 / 1e6 / (time.time() - mark)
            mark = time.time()
            decibel = 10 * math.log10(4 / smooth)
            minutes = run.spent / 60
            curve.add(step=run.step, minutes=minutes, train_db=decibel, mpx_per_s=speed)
        if run.step % options.save == 0:
            run.save()
            if rank == 0:
                figures = {k: decibels(run.averaged(), v) for k, v in measured.items()}
                curve.add(step=run.step, **figures)
        if options.smoke and run.step >= 4:
            break
    run.save()
    if rank == 0:
        final = run.averaged()
        if not options.decoder_only:
            scenes = [crops.scene() for _ in range(4 if options.smoke else 512)]
            fold_statistics(final, to_tensor(scenes, options.device))
        figures = {k: decibels(final, v) for k, v in measured.items()}
        curve.add(step=run.step, minutes=run.spent / 60, **figures)
        final.save_pretrained(options.work / options.name)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--name", default="vae", help="checkpoint, curve and result are WORK/NAME*")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=16.0)
    parser.add_argument("--decoder-only", action="store_true", help="tune WORK/vae's decoder")
    parser.add_argument("--latent-channels", type=int, default=4)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 32, 64, 96])
    parser.add_argument("--batch", type=int, default=4, help="crops of 64 px per process and step")
    parser.add_argument("--rate", type=float, help="default: 1.5e-3, and 3e-4 with --decoder-only")
    parser.add_argument("--report", type=int, default=200, help="steps between points of the curve")
    parser.add_argument("--save", type=int, default=2000, help="steps between checkpoints")
    parser.add_argument("--held-out", type=int, default=48)
    parser.add_argument(
        "--smoke", action="store_true", help="four steps: only to show that the stage works"
    )
    train(parser.parse_args())


if __name__ == "__main__":
    main()
