"""Read loupe's weights and measure pictures with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.loupe.network import LoupeConfig, LoupeNetwork, config_from_dict, encode_words

Picture = Image.Image | npt.NDArray[np.uint8]
"""RGB, as a PIL image or uint8 ``(height, width, 3)``."""

WEIGHTS, CONFIG = "loupe.safetensors", "config.json"
SIZES = ("normal", "small")
RELATIONS = ("next to", "above")
BATCH = 64


@dataclass(frozen=True)
class Attributes:
    """What loupe sees in one picture.

    ``objects`` goes from left to right or top to bottom, each kind once; ``count`` is the number of
    objects of any kind; ``relation`` is None unless two kinds are there; ``size`` and ``place`` are
    None unless there is one object. ``present`` holds the probability of every kind above one half.
    """

    objects: tuple[str, ...]
    count: int
    relation: str | None
    style: str
    background: str
    size: str | None
    place: str | None
    present: dict[str, float]


def as_batch(pictures: Sequence[Picture], device: torch.device | str = "cpu") -> Tensor:
    """Pictures of one size to float ``(n, 3, h, w)`` in -1 to 1."""
    arrays = [np.asarray(p.convert("RGB") if isinstance(p, Image.Image) else p) for p in pictures]
    stacked = torch.from_numpy(np.stack(arrays)).to(device).permute(0, 3, 1, 2)
    return (stacked.float() / 127.5 - 1.0).contiguous(memory_format=torch.channels_last)


class Loupe:
    """The evaluator, in inference mode. Pictures in one call must share a size of 96 to 256 px."""

    def __init__(self, network: LoupeNetwork, device: torch.device | str = "cpu") -> None:
        self._network = network.eval().to(device)
        self._device = device
        self.config: LoupeConfig = network.config

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Loupe:
        """Read the folder that :meth:`save` wrote; half-precision weights are computed in float."""
        folder = Path(path)
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        network = LoupeNetwork(config_from_dict(values))
        tensors = load_file(folder / WEIGHTS)
        network.load_state_dict(
            {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
        )
        return cls(network, device)

    def save(self, path: str | Path) -> None:
        """Write weights in half precision, and the labels."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        state = self._network.state_dict()
        half = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in state.items()}
        save_file(half, folder / WEIGHTS)
        (folder / WEIGHTS).chmod(0o644)  # the writer makes it readable by its owner only
        text = json.dumps(asdict(self.config), indent=1, ensure_ascii=False)
        (folder / CONFIG).write_text(text + "\n", encoding="utf-8")

    def state_dict(self) -> dict[str, Tensor]:
        """The network's weights, in single precision."""
        return self._network.state_dict()

    def score(self, picture: Picture, prompt: str) -> float:
        """Cosine between a picture and a prompt, -1 to 1."""
        return float(self.embed_pictures([picture])[0] @ self.embed_prompts([prompt])[0])

    def attributes(self, picture: Picture) -> Attributes:
        """What one picture shows."""
        return self.attributes_of([picture])[0]

    def attributes_of(self, pictures: Sequence[Picture]) -> list[Attributes]:
        """What each of several pictures shows."""
        out = self._look(pictures)
        present = out["present"].sigmoid()
        chosen = {name: out[name].argmax(-1).tolist() for name in self.config.heads}
        first = out["first"][:, :-1].argmax(-1).tolist()  # there always is a first object
        second = out["second"].argmax(-1).tolist()
        return [
            self._describe({k: v[i] for k, v in chosen.items()}, first[i], second[i], present[i])
            for i in range(len(pictures))
        ]

    def features(self, pictures: Sequence[Picture]) -> npt.NDArray[np.float64]:
        """Features ``(n, d)`` whose Gaussians the Fréchet distance compares."""
        return self._look(pictures)["features"].double().numpy()

    def embed_pictures(self, pictures: Sequence[Picture]) -> npt.NDArray[np.float32]:
        """Unit-length embeddings ``(n, width)``; the dot product with a prompt's is the score."""
        return self._look(pictures)["embedding"].numpy()

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Unit-length embeddings ``(n, width)`` of prompts."""
        words = encode_words(self.config, list(prompts)).to(self._device)
        return self._network.read(words).cpu().numpy()

    @torch.no_grad()
    def _look(self, pictures: Sequence[Picture]) -> dict[str, Tensor]:
        parts = [
            self._network.look(as_batch(pictures[i : i + BATCH], self._device))
            for i in range(0, len(pictures), BATCH)
        ]
        return {name: torch.cat([part[name].float().cpu() for part in parts]) for name in parts[0]}

    def _describe(
        self, chosen: dict[str, int], first: int, second: int, present: Tensor
    ) -> Attributes:
        names = self.config.concepts
        count = chosen["count"] + 1
        objects = [names[first]]
        if count > 1 and second < len(names) and second != first:
            objects.append(names[second])
        sure = torch.nonzero(present > 0.5).flatten().tolist()
        return Attributes(
            objects=tuple(objects),
            count=count,
            relation=RELATIONS[chosen["relation"]] if len(objects) > 1 else None,
            style=self.config.styles[chosen["style"]],
            background=self.config.backgrounds[chosen["background"]],
            size=SIZES[chosen["size"]] if count == 1 else None,
            place=self.config.places[chosen["place"]] if count == 1 else None,
            present={names[i]: float(present[i]) for i in sure},
        )
