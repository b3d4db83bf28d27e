"""Traces of prompts with the structure of production ones, for replays. Pure and reproducible.

What is taken from where (the numbers were fixed, and committed, before anything was measured):

- *Popularity* of subjects is Zipf. Exponents 0.6, 0.8 and 1.0: web requests have 0.64 to 0.83
  (Breslau et al., "Web Caching and Zipf-like Distributions", INFOCOM 1999), words and search
  queries about 1; the middle one is the one that counts.
- *Sessions*: a user edits a prompt step by step, one part at a time. A thread about one scene has
  169,620 / 107,051 = 1.58 prompts on average (Don-Yehiya et al., "Human Learning by Model Feedback:
  The Dynamics of Iterative Prompting with Midjourney", 2023); lengths are geometric.
- *Again*: a prompt is drawn more than once: DiffusionDB has 14 M pictures of 1.8 M prompts (Wang et
  al., ACL 2023), 7.8 each; we take 2 on average, geometric, to be careful.
- *Drift*: a tenth of the subjects swap their popularity every hour, so that what is popular moves
  over hours (NIRVANA, Agarwal et al., NSDI 2024, finds nearly all reuse within a short window; how
  much is within an hour here, :func:`reuse_within` says).
- Sessions begin at random, 30 an hour, so that a trace of some hundred requests spans hours of
  drift; within one, the gaps are exponential, 30 s on average.

Prompts are in the words of the default model's world: subject, background, style, a second thing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.errors import InvalidRequestError

ZIPF_EXPONENTS = (0.6, 0.8, 1.0)
"""The middle one is the one that counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceConfig:
    """One trace. The defaults are the module's text."""

    requests: int
    zipf: float = ZIPF_EXPONENTS[1]
    prompts_per_session: float = 169_620 / 107_051
    pictures_per_prompt: float = 2.0
    sessions_per_hour: float = 30.0
    gap_in_session_s: float = 30.0
    drift_per_hour: float = 0.1
    """Share of the subjects that change places in popularity every hour."""
    seed: int = 20240416

    def __post_init__(self) -> None:
        if self.requests < 1 or self.zipf < 0:
            raise InvalidRequestError("requests must be 1 or more, zipf 0 or more")
        if min(self.prompts_per_session, self.pictures_per_prompt) < 1:
            raise InvalidRequestError("a session has a prompt, and a prompt a picture, at least")
        if min(self.sessions_per_hour, self.gap_in_session_s) <= 0:
            raise InvalidRequestError("sessions_per_hour and gap_in_session_s must be above 0")
        if not 0.0 <= self.drift_per_hour <= 1.0:
            raise InvalidRequestError("drift_per_hour is a share, 0 to 1")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Words of a model's world; ``subjects`` with their article ("a dog")."""

    subjects: tuple[str, ...]
    backgrounds: tuple[str, ...]
    styles: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace."""

    at_s: float
    session: int
    prompt: str


@dataclass(frozen=True, slots=True)
class _Scene:
    subject: str
    background: str | None = None
    style: str | None = None
    companion: str | None = None

    def prompt(self) -> str:
        words = self.subject
        if self.companion is not None:
            words += f" next to {self.companion}"
        if self.background is not None:
            words += f" on a {self.background} background"
        return words if self.style is None else f"{words}, {self.style} style"


def make_trace(words: Vocabulary, config: TraceConfig) -> list[Arrival]:
    """Arrivals in order of time; the same for the same vocabulary and config."""
    random = np.random.default_rng(config.seed)
    subjects = _Popularity(words.subjects, config, random)
    arrivals: list[Arrival] = []
    began_s, session = 0.0, 0
    while len(arrivals) < config.requests:
        began_s += random.exponential(3600.0 / config.sessions_per_hour)
        arrivals += _session(session, began_s, subjects, words, config, random)
        session += 1
    return sorted(arrivals, key=lambda arrival: arrival.at_s)[: config.requests]


def reuse_within(trace: Sequence[Arrival], seconds: float) -> float:
    """Of requests whose prompt came before, the share whose last one was so recent."""
    last: dict[str, float] = {}
    gaps = []
    for arrival in trace:
        if arrival.prompt in last:
            gaps.append(arrival.at_s - last[arrival.prompt])
        last[arrival.prompt] = arrival.at_s
    return float(np.mean(np.asarray(gaps) <= seconds)) if gaps else 0.0


class _Popularity:
    """Zipf over subjects, some of which change places as time goes by."""

    def __init__(
        self, subjects: Sequence[str], config: TraceConfig, random: np.random.Generator
    ) -> None:
        weights = np.arange(1, len(subjects) + 1, dtype=np.float64) ** -config.zipf
        self._shares = weights / weights.sum()
        order: list[int] = random.permutation(len(subjects)).tolist()
        self._ranked: list[str] = [subjects[i] for i in order]
        self._drift = config.drift_per_hour
        self._random = random
        self._hours = 0

    def pick(self, at_s: float) -> str:
        while self._hours < int(at_s / 3600.0):
            self._hours += 1
            moving = self._random.random(len(self._ranked)) < self._drift
            places = np.flatnonzero(moving)
            moved = [self._ranked[i] for i in self._random.permutation(places)]
            for place, subject in zip(places, moved, strict=True):
                self._ranked[place] = subject
        rank = int(self._random.choice(len(self._ranked), p=self._shares))
        return self._ranked[rank]


def _session(
    number: int,
    began_s: float,
    subjects: _Popularity,
    words: Vocabulary,
    config: TraceConfig,
    random: np.random.Generator,
) -> list[Arrival]:
    scene = _Scene(subjects.pick(began_s))
    at_s, arrivals = began_s, []
    for i in range(random.geometric(1.0 / config.prompts_per_session)):
        if i:
            scene = _edited(scene, subjects, words, at_s, random)
        for _ in range(random.geometric(1.0 / config.pictures_per_prompt)):
            arrivals.append(Arrival(at_s, number, scene.prompt()))
            at_s += random.exponential(config.gap_in_session_s)
    return arrivals


def _edited(
    scene: _Scene,
    subjects: _Popularity,
    words: Vocabulary,
    at_s: float,
    random: np.random.Generator,
) -> _Scene:
    """One part changed: a background, a style or a second thing is added or replaced."""
    part = ("background", "style", "companion")[random.integers(3)]
    background, style, companion = scene.background, scene.style, scene.companion
    if part == "background":
        background = _other(words.backgrounds, background, random)
    elif part == "style":
        style = _other(words.styles, style, random)
    else:
        companion = subjects.pick(at_s)
    return _Scene(scene.subject, background, style, companion)


def _other(values: Sequence[str], than: str | None, random: np.random.Generator) -> str:
    left = [value for value in values if value != than]
    return str(left[int(random.integers(len(left)))])
