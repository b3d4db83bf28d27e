"""The two towers of the evaluator: a small convolutional picture tower and a word-level text tower.

Plain torch only, so that whoever measures needs neither diffusers nor transformers.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PAD, UNKNOWN = 0, 1
"""Word numbers that every vocabulary starts with."""

QUERIES = 4
"""Tokens that attend to a picture: the whole, the first object, the second, and the style."""

_WORD = re.compile(r"[a-z0-9]+(?:[-'][a-z0-9]+)*")


@dataclass(frozen=True)
class LoupeConfig:
    """Labels, in the order of the network's outputs, and widths."""

    concepts: tuple[str, ...]
    styles: tuple[str, ...]
    backgrounds: tuple[str, ...]
    places: tuple[str, ...]
    words: tuple[str, ...]
    merged: dict[str, str] = field(default_factory=dict)  # near-duplicate -> the name it counts as
    widths: tuple[int, int, int] = (32, 64, 128)
    width: int = 128
    max_words: int = 24

    @property
    def heads(self) -> dict[str, int]:
        """Name and number of classes of every softmax; ``second`` has one more for "none"."""
        return {
            "style": len(self.styles),
            "background": len(self.backgrounds),
            "size": 2,
            "place": len(self.places),
            "count": 3,
            "relation": 2,
        }


def words_of(text: str) -> list[str]:
    """The words of a prompt, in lower case; punctuation is dropped."""
    return _WORD.findall(text.lower())


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, momentum=0.03)


class _Residual(nn.Module):
    """Two 3x3 convolutions with a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            _norm(channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            _norm(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x + self.body(x))


class _Attend(nn.Module):
    """A pre-norm transformer layer: ``(batch, tokens, width)`` in and out."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.before = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.before(x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return cast(Tensor, x + self.feed(x))


def _positions(height: int, width: int, channels: int, like: Tensor) -> Tensor:
    """Sines of the relative position: ``(height * width, channels)``; any canvas spans 0 to 1."""
    quarter = channels // 4
    octave = math.pi * 2.0 ** (torch.arange(quarter, device=like.device) * (5.0 / quarter))
    down = (torch.arange(height, device=like.device) + 0.5) / height
    across = (torch.arange(width, device=like.device) + 0.5) / width
    y = (down[:, None] * octave)[:, None].expand(height, width, quarter)
    x = (across[:, None] * octave)[None].expand(height, width, quarter)
    return torch.cat([y.sin(), y.cos(), x.sin(), x.cos()], dim=-1).flatten(0, 1).to(like.dtype)


class _Texture(nn.Module):
    """Statistics of fine texture, by which vendors' styles differ and which a strided trunk loses.

    Means and deviations, over cells of 16 px, of features at half the picture's resolution.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, channels // 2, 4, stride=2, padding=1, bias=False),
            _norm(channels // 2),
            nn.SiLU(),
            nn.Conv2d(channels // 2, channels, 3, padding=1, bias=False),
            _norm(channels),
            nn.SiLU(),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        """``(n, 3, h, w)`` to ``(n, h / 16 * w / 16, 2 * channels)``."""
        found = self.body(pictures).float()
        mean = F.avg_pool2d(found, 8)
        spread = (F.avg_pool2d(found.square(), 8) - mean.square()).clamp_min(0).add(1e-4).sqrt()
        return torch.cat([mean, spread], dim=1).flatten(2).transpose(1, 2)


class PictureTower(nn.Module):
    """Pictures to features: a strided trunk and a texture path, then attention with four queries.

    The queries are the whole picture, its first object (left or top), its second, and the style.
    """

    def __init__(self, config: LoupeConfig) -> None:
        super().__init__()
        a, b, c = config.widths
        self.trunk = nn.Sequential(
            nn.Conv2d(3, a, 4, stride=4, bias=False),
            _norm(a),
            nn.SiLU(),
            _Residual(a),
            nn.Conv2d(a, b, 2, stride=2, bias=False),
            _norm(b),
            nn.SiLU(),
            _Residual(b),
            nn.Conv2d(b, c, 2, stride=2, bias=False),
            _norm(c),
            nn.SiLU(),
            _Residual(c),
            _Residual(c),
        )
        self.texture = _Texture(a)
        self.enter = nn.Linear(c, config.width)
        self.enter_texture = nn.Linear(2 * a, config.width, bias=False)
        self.queries = nn.Parameter(torch.randn(QUERIES, config.width) * 0.02)
        self.attend = nn.ModuleList([_Attend(config.width) for _ in range(2)])
        self.leave = nn.LayerNorm(config.width)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """``(n, 3, h, w)`` in -1 to 1 to the query tokens ``(n, QUERIES, width)`` and the mean of
        the trunk.
        """
        grid = self.trunk(pictures)
        tokens = self.enter(grid.flatten(2).transpose(1, 2))
        tokens = tokens + self.enter_texture(self.texture(pictures)).to(tokens.dtype)
        tokens = tokens + _positions(grid.shape[2], grid.shape[3], tokens.shape[-1], tokens)
        tokens = torch.cat([self.queries.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], 1)
        for layer in self.attend:
            tokens = layer(tokens)
        return self.leave(tokens[:, :QUERIES]), grid.mean(dim=(2, 3))


class TextTower(nn.Module):
    """Word numbers ``(n, max_words)`` to embeddings ``(n, width)``."""

    def __init__(self, config: LoupeConfig) -> None:
        super().__init__()
        self.words = nn.Embedding(len(config.words) + 2, config.width, padding_idx=PAD)
        self.places = nn.Parameter(torch.randn(config.max_words, config.width) * 0.02)
        self.attend = nn.ModuleList([_Attend(config.width) for _ in range(2)])
        self.leave = nn.LayerNorm(config.width)

    def forward(self, words: Tensor) -> Tensor:
        """The mean over the words of the attended tokens."""
        present = words != PAD
        x = self.words(words) + self.places[: words.shape[1]]
        for layer in self.attend:
            x = layer(x, present[:, None, None, :])
        weight = present.unsqueeze(-1).to(x.dtype)
        return cast(Tensor, self.leave((x * weight).sum(1) / weight.sum(1).clamp_min(1)))


class LoupeNetwork(nn.Module):
    """Both towers, the attribute heads, and the temperature of the contrastive loss."""

    def __init__(self, config: LoupeConfig) -> None:
        super().__init__()
        self.config = config
        self.picture = PictureTower(config)
        self.text = TextTower(config)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(config.width, classes) for name, classes in config.heads.items()}
        )
        self.object = nn.Linear(config.width, len(config.concepts) + 1)  # the last class: none
        self.present = nn.Linear(config.width, len(config.concepts))
        self.of_picture = nn.Linear(config.width * QUERIES, config.width, bias=False)
        self.of_text = nn.Linear(config.width, config.width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(15.0)))

    def look(self, pictures: Tensor) -> dict[str, Tensor]:
        """Logits of every head, ``embedding`` (unit length) and ``features`` of pictures."""
        tokens, pooled = self.picture(pictures)
        whole = tokens[:, 0]
        out = {
            name: head(tokens[:, 3] if name == "style" else whole)
            for name, head in self.heads.items()
        }
        out["first"], out["second"] = self.object(tokens[:, 1]), self.object(tokens[:, 2])
        out["present"] = self.present(whole)
        out["embedding"] = F.normalize(self.of_picture(tokens.flatten(1)).float(), dim=-1)
        out["features"] = torch.cat([pooled, whole], dim=-1)
        return out

    def read(self, words: Tensor) -> Tensor:
        """Unit-length embeddings ``(n, width)`` of prompts."""
        return F.normalize(self.of_text(self.text(words)).float(), dim=-1)


def encode_words(config: LoupeConfig, texts: list[str]) -> Tensor:
    """Prompts to word numbers ``(n, max_words)``; words never seen become one and the same."""
    numbers: dict[str, int] = {word: index + 2 for index, word in enumerate(config.words)}
    rows = torch.full((len(texts), config.max_words), PAD)
    for row, text in zip(rows, texts, strict=True):
        found = [numbers.get(word, UNKNOWN) for word in words_of(text)][: config.max_words]
        row[: len(found)] = torch.tensor(found, dtype=torch.long)
    return rows


def config_from_dict(values: dict[str, Any]) -> LoupeConfig:
    """The configuration that ``dataclasses.asdict`` and JSON made of one."""
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return LoupeConfig(**plain)
