"""The tokenizer, and the text encoder before there is anything to condition.

    torchrun --nproc-per-node 2 -m models.training.text --work WORK --minutes 3

A text encoder that is trained from random weights together with the UNet gets ignored for a long
time: the UNet first learns to do without it. So it learns words first, by predicting a scene's
latent from its caption (the mean picture of what was said), through a small head that is then
thrown away. Results: ``WORK/tokenizer`` and ``WORK/text_encoder``, in Transformers layout.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from models.training import data
from models.training.common import (
    Curve,
    average_gradients,
    log,
    millions,
    same_everywhere,
    start_processes,
)
from models.training.latents import LatentStore

LENGTH = 32
"""Tokens of a prompt, with start, end and padding."""

WIDTH = 192
_START, _END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(folder: Path, captions: int = 60_000) -> CLIPTokenizer:
    """Learn byte-pair merges from captions and save them as a stock ``CLIPTokenizer``."""
    rng = np.random.default_rng(7)
    lines = [data.caption(data.sample_scene(rng), rng) for _ in range(captions)]
    for concept in data.concepts():  # every name and synonym, whatever the draw left out
        lines += [concept.name, *concept.synonyms] * 8
    tokenizer = Tokenizer(
        models.BPE(unk_token=_END, end_of_word_suffix="</w>", continuing_subword_prefix="")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        initial_alphabet=alphabet + [letter + "</w>" for letter in alphabet],
        end_of_word_suffix="</w>",
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    vocabulary = tokenizer.get_vocab()
    merges = _merges(tokenizer)
    ordered = [token for token, _ in sorted(vocabulary.items(), key=lambda item: item[1])]
    for letter in alphabet:  # so that any text can be spelled
        ordered += [t for t in (letter, letter + "</w>") if t not in vocabulary]
    ordered += [_START, _END]
    wrapped = CLIPTokenizer(
        vocab={token: index for index, token in enumerate(ordered)},
        merges=merges,
        unk_token=_END,
        bos_token=_START,
        eos_token=_END,
        pad_token=_END,
        model_max_length=LENGTH,
    )
    wrapped.save_pretrained(folder)
    return wrapped


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    import json

    found = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in found]


def token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Prompts to int64 ``(n, LENGTH)``."""
    ids: Tensor = tokenizer(
        texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def build(tokenizer: CLIPTokenizer, width: int = WIDTH, layers: int = 3) -> CLIPTextModel:
    """The text encoder's architecture, with random weights."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class Head(nn.Module):
    """From a prompt's token vectors to the latent that one would expect: every cell of 16 x 16
    looks at the tokens.
    """

    def __init__(self, width: int, channels: int, side: int = 16) -> None:
        super().__init__()
        self.side, self.channels = side, channels
        self.cells = nn.Parameter(torch.randn(side * side // 4, width) * 0.02)
        self.look = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mix = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.patch = nn.Linear(width, 4 * channels)
        self.whole = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, channels * side * side)
        )

    def forward(self, tokens: Tensor, pooled: Tensor) -> Tensor:
        """``(n, LENGTH, width)`` and ``(n, width)`` to ``(n, channels, 16, 16)``."""
        number = len(tokens)
        cells = self.cells.expand(number, -1, -1)
        cells = cells + self.look(cells, tokens, tokens, need_weights=False)[0]
        cells = cells + self.mix(cells)
        half = self.side // 2
        patches = self.patch(cells).transpose(1, 2).reshape(number, -1, half, half)
        whole: Tensor = self.whole(pooled).view(number, self.channels, self.side, self.side)
        return F.pixel_shuffle(patches, 2) + whole


def train(options: argparse.Namespace) -> None:
    """Pretrain for ``options.minutes``."""
    rank, size = start_processes()
    torch.manual_seed(1)  # the same weights in every process
    tokenizer = CLIPTokenizer.from_pretrained(options.work / "tokenizer")
    store = LatentStore(options.work / "latents", data.NATIVE)
    encoder = build(tokenizer, options.width, options.layers).to(options.device)
    head = Head(options.width, store.latents.shape[1]).to(options.device)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=options.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    rng = np.random.default_rng(50 + rank)
    curve = Curve(options.work / "text.jsonl")
    log(f"text encoder: {millions(encoder)} parameters, {len(tokenizer)} tokens")
    start, step, smooth = time.time(), 0, 0.0
    while (progress := same_everywhere((time.time() - start) / (60 * options.minutes))) < 1:
        for group in optimizer.param_groups:
            group["lr"] = (
                options.rate
                * min(1.0, (step + 1) / 100)
                * (0.5 + 0.5 * math.cos(math.pi * progress))
            )
        latents, tokens = store.batch(rng, options.batch)
        with torch.autocast(options.device, dtype=torch.bfloat16):
            out = encoder(tokens.to(options.device))
            guess = head(out.last_hidden_state, out.pooler_output)
        loss = F.mse_loss(guess.float(), latents.to(options.device))
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        average_gradients([encoder, head])
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        value = float(loss.detach())
        smooth = value if step == 1 else 0.98 * smooth + 0.02 * value
        if step % 100 == 0 or options.smoke:
            curve.add(
                step=step,
                loss=smooth,
                captions=step * options.batch * size,
                minutes=(time.time() - start) / 60,
            )
        if options.smoke and step >= 3:
            break
    if rank == 0:
        encoder.save_pretrained(options.work / "text_encoder")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64, help="captions per process and step")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument(
        "--smoke", action="store_true", help="three steps: only to show that the stage works"
    )
    train(parser.parse_args())


if __name__ == "__main__":
    main()
