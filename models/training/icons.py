r"""Render icon collections once into arrays: the artwork behind every picture that tintype sees.

The artwork comes from the npm packages of the Iconify project (``npm install`` of ``PACKAGES`` in
any folder):

    npm install --prefix DIR @iconify-json/noto @iconify-json/fluent-emoji-flat
    @iconify-json/fluent-emoji \ @iconify-json/twemoji @iconify-json/fluent-emoji-high-contrast
    python -m models.training.icons --packages DIR/node_modules --work WORK

writes ``WORK/icons/<collection>.npy``: uint8 ``(concepts, 256, 256, 4)``, RGBA with premultiplied
alpha, one row per line of ``concepts.txt``; and ``extra.npy`` with pictograms that are no concept
of ours, on which the autoencoder also trains.
"""

from __future__ import annotations

import argparse
import io
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.training.common import log

SIDE = 256
"""Pixels of a rendered icon; objects are averaged down from here."""

BASE_STYLES = {"default": "noto", "flat": "fluent-emoji-flat", "glossy": "fluent-emoji"}
"""The styles that the base model knows, and the collection that each is drawn from."""

ADAPTER_STYLES = {"twemoji": "twemoji", "silhouette": "fluent-emoji-high-contrast"}
"""Styles that the base model never sees: they are what the style LoRAs teach."""

STYLES = BASE_STYLES | ADAPTER_STYLES

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Concept:
    """A thing that can be asked for: its icon's slug, its name in prompts, and other names."""

    icon: str
    name: str
    synonyms: tuple[str, ...]


@cache
def concepts() -> tuple[Concept, ...]:
    """Every concept, in the order of ``concepts.txt``; positions are the evaluator's labels."""
    lines = (Path(__file__).parent / "concepts.txt").read_text(encoding="utf-8").splitlines()
    found = []
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        icon, name, synonyms = (part.strip() for part in line.split("|"))
        found.append(
            Concept(icon, name, tuple(s.strip() for s in synonyms.split(",") if s.strip()))
        )
    return tuple(found)


@cache
def concept_index() -> dict[str, int]:
    """Concept name to its position in :func:`concepts`."""
    return {concept.name: index for index, concept in enumerate(concepts())}


class Atlas:
    """The rendered icons of a work directory, memory-mapped: ``atlas.icon(style, concept)``."""

    def __init__(self, work: Path) -> None:
        self._folder = work / "icons"
        self._arrays: dict[str, Pixels] = {}

    def icon(self, style: str, concept: int) -> Pixels:
        """One icon: uint8 ``(256, 256, 4)``, premultiplied RGBA."""
        if style not in self._arrays:
            self._arrays[style] = np.load(self._folder / f"{STYLES[style]}.npy", mmap_mode="r")
        row: Pixels = self._arrays[style][concept]
        return row

    def extra(self) -> Pixels:
        """Pictograms outside the concept list, uint8 ``(n, 256, 256, 4)``."""
        rows: Pixels = np.load(self._folder / "extra.npy", mmap_mode="r")
        return rows


def render(body: str, width: int, height: int) -> Pixels:
    """Rasterise the body of an SVG to uint8 ``(256, 256, 4)``, premultiplied, at twice the size and
    averaged down.
    """
    import resvg_py  # only this stage needs the rasteriser

    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}">{body}</svg>'
    )
    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=2 * SIDE, height=2 * SIDE, skip_system_fonts=True
    )
    rgba = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"), dtype=np.float32)
    rgba[..., :3] *= rgba[..., 3:] / 255.0
    small = rgba.reshape(SIDE, 2, SIDE, 2, 4).mean(axis=(1, 3))
    return np.asarray(np.rint(small), dtype=np.uint8)


def _collection(packages: Path, name: str) -> tuple[dict[str, Any], int, int]:
    data = json.loads(
        (packages / "@iconify-json" / name / "icons.json").read_text(encoding="utf-8")
    )
    return data["icons"], data.get("width", 16), data.get("height", 16)


def render_all(packages: Path, work: Path) -> None:
    """Render every collection that is not there yet."""
    folder = work / "icons"
    folder.mkdir(parents=True, exist_ok=True)
    slugs = [concept.icon for concept in concepts()]
    for name in STYLES.values():
        target = folder / f"{name}.npy"
        if target.exists() and len(np.load(target, mmap_mode="r")) == len(slugs):
            continue
        icons, width, height = _collection(packages, name)
        missing = [slug for slug in slugs if slug not in icons]
        if missing:
            raise KeyError(f"{name} has no icons named {missing}: remove them from concepts.txt")
        np.save(target, np.stack([render(icons[slug]["body"], width, height) for slug in slugs]))
        log(f"rendered {len(slugs)} icons of {name}")
    target = folder / "extra.npy"
    if not target.exists():
        rows = []
        chars = json.loads(
            (packages / "@iconify-json" / "noto" / "chars.json").read_text(encoding="utf-8")
        )
        plain = {
            slug for code, slug in chars.items() if "-" not in code
        }  # single code points: no families, no skin tones
        for name in ("noto", "fluent-emoji-flat"):
            icons, width, height = _collection(packages, name)
            others = sorted(set(icons) & plain - set(slugs))[:: 1 if name == "noto" else 2]
            rows += [render(icons[slug]["body"], width, height) for slug in others]
        np.save(target, np.stack(rows))
        log(f"rendered {len(rows)} further icons")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--packages", type=Path, required=True, help="the node_modules folder with @iconify-json"
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="where renderings, latents and checkpoints go"
    )
    options = parser.parse_args()
    render_all(options.packages, options.work)


if __name__ == "__main__":
    main()
