"""Pass or fail: bounds in a YAML file, held against a finished run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from loadtests.traffic.stats import quantile

DEFAULT = Path(__file__).parent / "thresholds.yaml"
MEASURES = ("p50_s", "p95_s", "p99_s", "error_share", "goodput_share")


@dataclass(frozen=True, slots=True)
class Verdict:
    """One bound and what was measured."""

    level: float
    measure: str
    bound: float
    measured: float
    at_most: bool

    @property
    def held(self) -> bool:
        """Whether the bound holds."""
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound

    def __str__(self) -> str:
        word = "ok  " if self.held else "MISS"
        sign = "<=" if self.at_most else ">="
        found = f"{self.measure} {self.measured:.3f} {sign} {self.bound:g}"
        return f"{word} {self.level:g} x capacity: {found}"


def judge(path: Path, run: Path) -> list[Verdict]:
    """Every bound of ``path`` whose level was run.

    Raises:
        ValueError: the file names a measure that does not exist.
    """
    bounds: dict[Any, dict[str, float]] = yaml.safe_load(path.read_text())["levels"]
    lines = [json.loads(line) for line in (run / "requests.jsonl").read_text().splitlines()]
    verdicts = []
    for level, measures in bounds.items():
        inside = [line for line in lines if abs(line["level"] - float(level)) < 1e-9]
        if not inside:
            continue
        for name, bound in measures.items():
            if name not in MEASURES:
                raise ValueError(f"{path}: {name!r} is no measure; known: {', '.join(MEASURES)}")
            at_most = name != "goodput_share"
            verdicts.append(Verdict(float(level), name, bound, measure(name, inside), at_most))
    return verdicts


def measure(name: str, lines: list[dict[str, Any]]) -> float:
    """One figure of the requests of a level."""
    good = [line for line in lines if line["outcome"] == "ok"]
    if name == "error_share":
        # A refusal at admission is an answer that the design wants under overload, not an error.
        fine = ("ok", "given_up", "overloaded", "rate_limited")
        return sum(line["outcome"] not in fine for line in lines) / len(lines)
    if name == "goodput_share":
        return len(good) / len(lines)
    share = {"p50_s": 0.5, "p95_s": 0.95, "p99_s": 0.99}[name]
    return quantile([line["total_s"] for line in good], share)
