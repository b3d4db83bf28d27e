"""Train the UNet, and the text encoder with it, on pre-encoded scenes.

    torchrun --nproc-per-node 2 -m models.training.base --work WORK --minutes 120

Velocity prediction on Stable Diffusion's ``scaled_linear`` betas, one caption in ten dropped. The
learning rate warms up, stays, and falls over the last ``--decay`` share of the run; the state just
before the fall is kept as ``WORK/base-stable.pt``, from which ``--extend`` goes on with a longer
run. ``WORK/base.pt`` is the checkpoint to resume from; ``models.training.export`` turns its
averaged weights into a Diffusers folder. ``--start-from`` begins with the weights of such a folder
instead of random ones; its tokenizer and autoencoder must be those of ``WORK``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from models.training import data
from models.training.common import (
    Curve,
    Ema,
    average_parameters,
    load_checkpoint,
    log,
    millions,
    prefer_plain_attention,
    same_everywhere,
    save_checkpoint,
    start_processes,
)
from models.training.latents import LatentStore
from models.training.text import token_ids

NOISE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}
"""The noise schedule, in training and in the shipped scheduler's config."""

MAX_SNR = 5.0
"""Above this signal-to-noise ratio a row's weight falls as 1 / SNR; below it, it is one.

Min-SNR weights (min(SNR, 5) / (SNR + 1)) were tried first: they all but silence the high noise
levels, where the prompt decides what will be drawn, and after 75,000 samples shapes were blobs.
"""
DROP_CAPTION = 0.1
TEXT_RATE = 0.3


def build(channels: int, widths: tuple[int, ...], text_width: int) -> UNet2DConditionModel:
    """The architecture: cross-attention below the finest level, and the prompt's pooled vector in
    the time embedding.

    The latter (``addition_embed_type="text"``) gives the prompt a short way into every layer;
    without it prompts are ignored for most of a short run.
    """
    levels = len(widths)
    return UNet2DConditionModel(
        sample_size=data.NATIVE[0] // 8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (levels - 1),
        up_block_types=("CrossAttnUpBlock2D",) * (levels - 1) + ("UpBlock2D",),
        mid_block_type="UNetMidBlock2DCrossAttn",
        layers_per_block=1,
        cross_attention_dim=text_width,
        attention_head_dim=4,
        norm_num_groups=16,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


def rate_factor(progress: float, step: int, decay: float) -> float:
    """The learning rate's factor at a share of the run: warm-up over 300 steps, constant, then down
    along 1 - sqrt.
    """
    warm = min(1.0, (step + 1) / 300)
    if progress < 1 - decay:
        return warm
    return float(warm * max(0.0, 1 - ((progress - 1 + decay) / decay) ** 0.5) + 1e-3)


class Noiser:
    """The forward process and the loss weights, as tables over timesteps."""

    def __init__(self, device: str) -> None:
        self.alphas = DDPMScheduler(**NOISE).alphas_cumprod.to(device)

    def noisy(
        self, clean: Tensor, noise: Tensor, timesteps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The noisy latent, the velocity to predict, and each row's loss weight."""
        alpha = self.alphas[timesteps].view(-1, 1, 1, 1)
        a, s = alpha.sqrt(), (1 - alpha).sqrt()
        snr = (alpha / (1 - alpha)).flatten()
        return a * clean + s * noise, a * noise - s * clean, (MAX_SNR / snr).clamp(max=1.0)


class Run:
    """Modules, optimizer and averages of one training run, and how to save and load them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        tokenizer = CLIPTokenizer.from_pretrained(options.work / "tokenizer")
        self.empty = token_ids(tokenizer, [""])
        source: Path | None = options.start_from
        self.text = CLIPTextModel.from_pretrained(
            (source or options.work) / "text_encoder", dtype=torch.float32
        ).to(options.device)
        self.stores = [LatentStore(options.work / "latents", canvas) for canvas in data.CANVASES]
        channels = self.stores[0].latents.shape[1]
        self.unet = build(channels, tuple(options.widths), self.text.config.hidden_size)
        if source is not None:
            trained = UNet2DConditionModel.from_pretrained(source / "unet")
            self.unet.load_state_dict(trained.state_dict())
        self.unet.to(options.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": self.unet.parameters(), "scale": 1.0},
                {"params": self.text.parameters(), "scale": TEXT_RATE},
            ],
            lr=options.rate,
            betas=(0.9, 0.99),
            weight_decay=0.01,
            fused=True,
        )
        self.ema_unet, self.ema_text = Ema(self.unet, options.ema), Ema(self.text, options.ema)
        self.noiser = Noiser(options.device)
        self.step, self.samples, self.spent = 0, 0, 0.0

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        return {
            "unet": self.unet.state_dict(),
            "text": self.text.state_dict(),
            "ema_unet": self.ema_unet.state_dict(),
            "ema_text": self.ema_text.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "samples": self.samples,
            "spent": self.spent,
            "unet_config": json.dumps(dict(self.unet.config), default=str),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self.unet.load_state_dict(state["unet"])
        self.text.load_state_dict(state["text"])
        self.ema_unet.load_state_dict(state["ema_unet"])
        self.ema_text.load_state_dict(state["ema_text"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.samples, self.spent = state["step"], state["samples"], state["spent"]

    def loss(self, rng: np.random.Generator, store: LatentStore) -> tuple[Tensor, int]:
        """The loss of one batch from one canvas; larger canvases come in smaller batches of the
        same cost.
        """
        options = self.options
        area = store.latents.shape[2] * store.latents.shape[3]
        number = max(1, round(options.batch * 256 / area))
        latents, tokens = store.batch(rng, number)
        tokens[torch.from_numpy(rng.random(number) < DROP_CAPTION)] = self.empty[0]
        latents, tokens = latents.to(options.device), tokens.to(options.device)
        # Evenly spread within a batch: the same distribution, with less variance between steps.
        offset = (
            torch.arange(number, device=options.device) + torch.rand(1, device=options.device)
        ) / number
        timesteps = (
            (offset[torch.randperm(number, device=options.device)] * 1000).long().clamp(max=999)
        )
        noisy, velocity, weight = self.noiser.noisy(latents, torch.randn_like(latents), timesteps)
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        with torch.autocast(options.device, dtype=torch.bfloat16):
            words = self.text(tokens).last_hidden_state
            guess = self.unet(noisy, timesteps, encoder_hidden_states=words).sample
        return (
            weight * F.mse_loss(guess.float(), velocity, reduction="none").mean(dim=(1, 2, 3))
        ).mean(), number

    def update(self, loss: Tensor, rate: float) -> None:
        """One step of this process."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        parameters = [*self.unet.parameters(), *self.text.parameters()]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.step += 1

    def meet(self) -> None:
        """Average the weights over the processes, and move their running averages."""
        average_parameters([self.unet, self.text])
        self.ema_unet.update(self.unet)
        self.ema_text.update(self.text)


def train(options: argparse.Namespace) -> None:
    """Train for ``options.minutes`` in all, resuming from the checkpoint."""
    rank, size = start_processes()
    prefer_plain_attention()
    torch.manual_seed(5)
    run = Run(options)
    path, stable_path = options.work / "base.pt", options.work / "base-stable.pt"
    state = load_checkpoint(stable_path) if options.extend else load_checkpoint(path)
    if state is not None:
        run.load(state)
    log(
        f"UNet {millions(run.unet)}, text encoder {millions(run.text)}, "
        f"{sum(len(s) for s in run.stores)} x {size} scenes, step {run.step}"
    )
    torch.manual_seed(1000 * run.step + rank)
    rng = np.random.default_rng([run.step, rank])
    same = np.random.default_rng(
        [run.step, 99]
    )  # alike in all processes, so that all draw the same canvas
    shares = np.array(list(data.CANVASES.values())) / sum(data.CANVASES.values())
    curve = Curve(options.work / "base.jsonl")
    clock, before, budget = time.time(), run.spent, 60 * options.minutes
    smooth, mark, mark_samples = 0.0, time.time(), run.samples
    stable_kept = bool(run.spent / budget > 1 - options.decay)
    progress = same_everywhere(before / budget)
    while progress < 1:
        if not stable_kept and progress > 1 - options.decay:
            stable_kept = True
            save_checkpoint(stable_path, run.state())
            log("kept the state before the decay", samples=run.samples)
        factor = rate_factor(progress, run.step, options.decay)
        for _ in range(options.sync):
            loss, number = run.loss(rng, run.stores[same.choice(len(shares), p=shares)])
            run.update(loss, options.rate * factor)
            run.samples += number * size
            smooth = loss.item() if not smooth else 0.98 * smooth + 0.02 * loss.item()
        run.meet()
        run.spent = before + time.time() - clock
        if run.step % options.report == 0 or options.smoke:
            speed = (run.samples - mark_samples) / max(1e-6, time.time() - mark)
            mark, mark_samples = time.time(), run.samples
            curve.add(
                step=run.step,
                samples=run.samples,
                minutes=run.spent / 60,
                loss=smooth,
                rate=factor,
                samples_per_s=speed,
            )
        if run.step % options.save == 0:
            save_checkpoint(path, run.state())
        if options.smoke and run.step >= 3:
            break
        progress = same_everywhere(run.spent / budget)
    save_checkpoint(path, run.state())
    log("done", samples=run.samples, minutes=run.spent / 60)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--minutes", type=float, default=120.0, help="of the whole run, earlier parts included"
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 192])
    parser.add_argument("--batch", type=int, default=32, help="native scenes per process and step")
    parser.add_argument("--sync", type=int, default=2, help="steps between averaging weights")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.996)
    parser.add_argument(
        "--decay", type=float, default=0.3, help="share of the run over which the rate falls"
    )
    parser.add_argument(
        "--start-from", type=Path, help="a Diffusers folder to begin with, e.g. models/tintype"
    )
    parser.add_argument("--report", type=int, default=100)
    parser.add_argument("--save", type=int, default=400)
    parser.add_argument(
        "--extend",
        action="store_true",
        help="start from base-stable.pt, with more --minutes; resume such a run without it",
    )
    parser.add_argument(
        "--smoke", action="store_true", help="three steps: only to show that the stage works"
    )
    train(parser.parse_args())


if __name__ == "__main__":
    main()
