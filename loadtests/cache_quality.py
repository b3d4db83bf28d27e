"""Quality against savings: for each kind of state, similarity and jump, beside running fewer steps.

::

    python -m loadtests.cache_quality --sheet out/noise_cache.png

Three kinds of state are compared: x itself at a level (``noisy``), the clean prediction there under
fresh noise (``clean``), and the finished picture under fresh noise (``finished``). The columns are
those of ``darkroom cache calibrate``. Pictures without the cache are drawn once for all kinds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image as Pillow
from rich.console import Console

from cache.calibration import BEYOND_ERROR, Calibration, Draw, Pair, calibrate
from engine.ports import StateKind
from engine.types import GenerateRequest, Image
from loadtests.common import conditions
from server.cache_bench import Bench
from server.cache_cli import KINDS, shares_of
from server.cache_tables import calibration_table
from server.cache_wiring import evaluator, opened_model, pairs_of_world
from server.settings import Settings


class Remembering:
    """Draws what needs no cache once, whichever kind asks."""

    def __init__(self) -> None:
        self.bench: Bench | None = None
        self._plain: dict[Draw, Image] = {}

    def generate(self, draws: Sequence[Draw]) -> list[Image]:
        assert self.bench is not None
        new = [draw for draw in draws if draw not in self._plain]
        drawn = dict(zip(new, self.bench.generate(new), strict=True))
        self._plain.update({draw: image for draw, image in drawn.items() if draw.source is None})
        return [self._plain[draw] if draw in self._plain else drawn[draw] for draw in draws]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tintype")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--pairs", type=int, default=16, help="in each bin of similarity")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--solver", default=None)
    parser.add_argument("--keep", type=float, default=0.98)
    parser.add_argument("--kinds", nargs="+", choices=sorted(KINDS), default=list(KINDS))
    parser.add_argument("--evaluator", default="models.loupe:Loupe")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet here")
    options = parser.parse_args()

    console = Console(width=160)
    settings = Settings.from_environment()
    judge = evaluator(options.evaluator, settings)
    base = GenerateRequest(prompt="", steps=options.steps, solver=options.solver)
    memory = Remembering()
    began_s = time.perf_counter()
    rows: list[list[Image]] = []
    with opened_model(settings, options.model, options.precision) as model:
        pairs = pairs_of_world(settings, model, options.pairs)
        for name in options.kinds:
            profile = KINDS[name]
            memory.bench = Bench(model, profile, base)
            found = calibrate(
                pairs,
                memory.generate,
                judge.score,
                judge.features,
                shares=shares_of(profile),
                keep=options.keep,
                exclusive=profile.kind is StateKind.NOISY,
            )
            console.print(f"[bold]{name}[/]: jumps {found.jumps.steps or 'none'}")
            console.print(calibration_table(found))
            console.print(_where_it_pays(found))
            if options.sheet is not None:
                rows += _sheet_rows(pairs, memory, shares_of(profile))
            memory.bench.close()
    if options.sheet is not None:
        options.sheet.parent.mkdir(parents=True, exist_ok=True)
        widest = max(map(len, rows))  # kinds are measured at different jumps
        strips = [
            np.concatenate([*row, *[np.full_like(row[0], 255)] * (widest - len(row))], axis=1)
            for row in rows
        ]
        Pillow.fromarray(np.concatenate(strips)).save(options.sheet)
    console.print(f"{conditions(options)}; {time.perf_counter() - began_s:.0f} s")


def _where_it_pays(found: Calibration) -> str:
    """Bins and jumps at which the cache keeps more than fewer steps do, beyond the error."""
    better = [
        f"{row.low:.3f} at {row.share:.0%}"
        for row in found.quality
        if row.ratio - row.ratio_fewer > BEYOND_ERROR * row.error
    ]
    return f"beats fewer steps: {', '.join(better) or 'nowhere'}"


def _sheet_rows(
    pairs: Sequence[Pair], memory: Remembering, shares: Sequence[float]
) -> list[list[Image]]:
    """For one pair of every bin two rows: the source and its jumps, the target and fewer steps."""
    firsts = {round(pair.similarity, 1): i for i, pair in reversed(list(enumerate(pairs)))}
    rows = []
    for i in sorted(firsts.values()):
        source = (pairs[i].source, len(pairs) + i)
        first = [Draw(*source), *(Draw(pairs[i].prompt, i, source, share) for share in shares)]
        second = [Draw(pairs[i].prompt, i, None, share) for share in (0.0, *shares)]
        rows += [memory.generate(first), memory.generate(second)]
    return rows


if __name__ == "__main__":
    main()
