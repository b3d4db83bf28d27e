"""Compose scenes and encode them once, so that later stages read latents and token ids only.

    torchrun --nproc-per-node 2 -m models.training.latents --work WORK --scenes 48000

learns the tokenizer if there is none, and writes, per canvas, ``WORK/latents/WIDTHxHEIGHT/``:
``latents.npy`` float16 ``(n, channels, height / 8, width / 8)``, ``tokens.npy`` uint16 ``(n,
CAPTIONS, 32)`` and ``scenes.jsonl``. No scene is hidden.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL
from torch import Tensor

from models.training import data
from models.training.common import log, start_processes

CAPTIONS = 4
"""Phrasings per scene; one is drawn whenever the scene is."""


class LatentStore:
    """The encoded scenes of one canvas; several shards, one for each process that wrote them."""

    def __init__(self, folder: Path, canvas: tuple[int, int]) -> None:
        folder = folder / f"{canvas[0]}x{canvas[1]}"
        shards = sorted(folder.glob("latents-*.npy"))
        if not shards:
            raise FileNotFoundError(f"no latents in {folder}: run models.training.latents first")
        self.latents = np.concatenate([np.load(s) for s in shards])
        self.tokens = np.concatenate(
            [np.load(s.with_name(s.name.replace("latents", "tokens"))) for s in shards]
        )

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, rng: np.random.Generator, number: int) -> tuple[Tensor, Tensor]:
        """A random batch: float32 ``(number, channels, h, w)`` and int64 ``(number, 32)``."""
        rows = rng.integers(len(self.latents), size=number)
        phrasing = rng.integers(self.tokens.shape[1], size=number)
        latents = torch.from_numpy(self.latents[rows].astype(np.float32))
        return latents, torch.from_numpy(self.tokens[rows, phrasing].astype(np.int64))


@torch.no_grad()
def encode_canvas(
    options: argparse.Namespace, vae: AutoencoderKL, canvas: tuple[int, int], number: int, rank: int
) -> None:
    """Write this process's shard of one canvas."""
    from transformers import CLIPTokenizer

    from models.training.text import token_ids  # the text stage reads this module's store

    tokenizer = CLIPTokenizer.from_pretrained(options.work / "tokenizer")
    folder = options.work / "latents" / f"{canvas[0]}x{canvas[1]}"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([options.seed, rank, *canvas])
    atlas = data.Atlas(options.work)
    latents, tokens, scenes = [], [], []
    for start in range(0, number, options.batch):
        part = [data.sample_scene(rng, canvas) for _ in range(min(options.batch, number - start))]
        pictures = torch.from_numpy(np.stack([data.compose(s, atlas) for s in part])).permute(
            0, 3, 1, 2
        )
        pictures = pictures.to(options.device).contiguous(memory_format=torch.channels_last)
        with torch.autocast(options.device, dtype=torch.bfloat16, enabled=options.bfloat16):
            latents.append(
                vae.encode(pictures.float() / 127.5 - 1)
                .latent_dist.mode()
                .to("cpu", torch.float16)
                .numpy()
            )
        texts = [data.caption(s, rng) for s in part for _ in range(CAPTIONS)]
        tokens.append(
            token_ids(tokenizer, texts).numpy().astype(np.uint16).reshape(len(part), CAPTIONS, -1)
        )
        scenes += [json.dumps(s.as_dict()) for s in part]
        if start // options.batch % 100 == 99:
            log(f"{canvas[0]}x{canvas[1]}: {start + options.batch} of {number}")
    np.save(folder / f"tokens-{rank}.npy", np.concatenate(tokens))
    (folder / f"scenes-{rank}.jsonl").write_text("\n".join(scenes) + "\n", encoding="utf-8")
    np.save(folder / f"latents-{rank}.npy", np.concatenate(latents))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--scenes", type=int, default=48_000, help="over all canvases and processes"
    )
    parser.add_argument(
        "--captions", type=int, default=60_000, help="for the tokenizer, if there is none"
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--bfloat16", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    rank, size = start_processes()
    if rank == 0 and not (options.work / "tokenizer").exists():
        from models.training.text import train_tokenizer

        log("tokenizer", tokens=len(train_tokenizer(options.work / "tokenizer", options.captions)))
    if dist.is_initialized():
        dist.barrier()
    vae = AutoencoderKL.from_pretrained(options.work / "vae").to(
        options.device, memory_format=torch.channels_last
    )
    for canvas, share in data.CANVASES.items():
        number = max(
            1,
            round(
                options.scenes
                * share
                * data.NATIVE[0]
                * data.NATIVE[1]
                / (canvas[0] * canvas[1])
                / size
            ),
        )
        encode_canvas(options, vae, canvas, number, rank)
    log("encoded", processes=os.environ.get("WORLD_SIZE", "1"))


if __name__ == "__main__":
    main()
