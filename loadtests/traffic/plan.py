"""What each arrival asks for: kind of request, prompt, steps, size, and when it gives up.

Everything is drawn from one seed, so that two runs (before and after a change, cache on and off)
send the very same requests. Prompts are of the default model's world: seen and unseen ones by Zipf
popularity, and editing sessions in which a user changes a prompt step by step.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")
PROMPTS = Path(__file__).resolve().parents[2] / "models" / "prompts"
KINDS = ("generation", "stream", "job", "edit")


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One request of a run.

    Attributes:
        kind: ``generation`` (JSON answer), ``stream`` (server-sent events with previews), ``job``
            (submitted, then its events followed) or ``edit`` (image to image).
        give_up_after_s: the client goes away (or cancels its job) after so long; None: it waits.
    """

    at_s: float
    kind: str
    prompt: str
    steps: int
    width_px: int
    height_px: int
    give_up_after_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Shares of everything that differs between requests.

    Weights need not add up to one. ``zipf`` is the exponent of prompt popularity; measured traces
    of public prompt logs lie between 0.8 and 1.2.
    """

    kinds: tuple[float, ...] = (0.7, 0.1, 0.15, 0.05)
    steps: tuple[tuple[int, float], ...] = ((20, 0.6), (10, 0.25), (4, 0.1), (50, 0.05))
    sizes: tuple[tuple[int, int, float], ...] = (
        (128, 128, 0.8),
        (192, 128, 0.1),
        (128, 192, 0.05),
        (192, 192, 0.05),
    )
    zipf: float = 1.0
    sessions: float = 0.3
    """Share of requests that belong to an editing session."""
    give_up: float = 0.03
    give_up_after_s: float = 1.0

    def __post_init__(self) -> None:
        if len(self.kinds) != len(KINDS):
            raise ValueError(f"kinds needs {len(KINDS)} weights: {', '.join(KINDS)}")


UNIFORM = Mix(kinds=(1.0, 0.0, 0.0, 0.0), steps=((20, 1.0),), sizes=((128, 128, 1.0),), give_up=0.0)
"""One kind, one size, 20 steps: what capacity is measured with."""


class PromptSource:
    """Draws prompts: popular ones often, and sessions one step after the other."""

    def __init__(self, mix: Mix, random_: random.Random, folder: Path = PROMPTS) -> None:
        prompts = [item["prompt"] for name in ("seen", "unseen") for item in _load(folder, name)]
        random_.shuffle(prompts)  # popularity has nothing to do with the files' order
        self._prompts: list[str] = prompts
        self._weights = [1 / (rank + 1) ** mix.zipf for rank in range(len(prompts))]
        self._sessions: list[list[str]] = [
            [step["prompt"] for step in session["steps"]] for session in _load(folder, "editing")
        ]
        self._open: list[list[str]] = []
        self._share = mix.sessions
        self._random = random_

    def draw(self) -> str:
        """The next request's prompt."""
        if self._random.random() >= self._share:
            return self._random.choices(self._prompts, self._weights)[0]
        if not self._open or self._random.random() < 0.25:
            self._open.append(list(reversed(self._random.choice(self._sessions))))
        session = self._random.choice(self._open)
        prompt = session.pop()
        if not session:
            self._open.remove(session)
        return prompt


def plan(arrivals_s: Iterable[float], mix: Mix, seed: int) -> Iterator[Planned]:
    """A request for each arrival."""
    random_ = random.Random(seed)
    prompts = PromptSource(mix, random_)
    for at_s in arrivals_s:
        steps = _weighted(random_, [item[0] for item in mix.steps], [w for *_, w in mix.steps])
        size = _weighted(random_, [item[:2] for item in mix.sizes], [w for *_, w in mix.sizes])
        gives_up = random_.random() < mix.give_up
        yield Planned(
            at_s=at_s,
            kind=random_.choices(KINDS, mix.kinds)[0],
            prompt=prompts.draw(),
            steps=steps,
            width_px=size[0],
            height_px=size[1],
            give_up_after_s=mix.give_up_after_s if gives_up else None,
        )


def _weighted(random_: random.Random, items: Sequence[_T], weights: Sequence[float]) -> _T:
    return random_.choices(items, weights)[0]


def _load(folder: Path, name: str) -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = json.loads((folder / f"{name}.json").read_text())
    return loaded
