"""Mixed work, for the benchmark and the simulation alike: a trace, who batches it how, a summary.

Request batching comes in two kinds. *Whole requests* is the generous one, which this engine makes
possible: mixed step counts, solvers and guidance share a batch and members leave when they are
done, but nobody joins before all have. *Pipeline calls* is what servers around a pipeline do: a
batch is one call, so its members agree in steps, solver and guidance, and nobody joins either.
Both form batches of the oldest first, up to the same B* as the step loop.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.scheduler import Batch, PolicyConfig, Ready, StepTimes, TickPolicy
from engine.types import GenerateRequest

STEPS = (4, 50)
SOLVERS = ("ddim", "euler", "dpmpp_2m", "unipc")
GUIDANCES = (1.0, 4.0)
PROMPTS = ("cat", "red apple", "a rocket on a blue background")

MEAN_ROWS = statistics.mean(range(STEPS[0], STEPS[1] + 1)) * 1.5
"""UNet rows of a request on average: half of them are guided, which takes two a step."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request and when it comes, in seconds from the start. All its solvers take a row a step."""

    id: str
    at_s: float
    request: GenerateRequest

    @property
    def rows(self) -> int:
        """UNet rows of a step."""
        return 2 if (self.request.guidance or 0.0) > 1.0 else 1

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for requests that one call of a pipeline can serve."""
        return self.request.steps, self.request.solver, self.request.guidance


def arrivals(count: int, rate_per_s: float, seed: int) -> list[Arrival]:
    """Poisson arrivals of 4 to 50 steps, random solvers, every other one guided."""
    chance = random.Random(seed)
    at_s = 0.0
    made = []
    for i in range(count):
        at_s += chance.expovariate(rate_per_s)
        request = GenerateRequest(
            prompt=chance.choice(PROMPTS),
            steps=chance.randint(*STEPS),
            solver=chance.choice(SOLVERS),
            guidance=chance.choice(GUIDANCES),
            seed=i,
        )
        made.append(Arrival(f"mixed-{seed}-{i}", at_s, request))
    return made


class WholeRequests(TickPolicy):
    """A batch runs to its end before the next one is formed."""

    def __init__(self, times: StepTimes) -> None:
        super().__init__(times, PolicyConfig(stretch=0.0))
        self._batch: set[str] = set()

    def pick(self, ready: Sequence[Ready], now_s: float) -> Batch | None:
        """Go on with the batch while any of its members lives; else form the next."""
        members = [item for item in ready if item.id in self._batch]
        if members:
            ids = tuple(item.id for item in members)
            return Batch(members[0].lane, ids, sum(item.rows for item in members))
        batch = super().pick(self.candidates(ready), now_s)
        self._batch = set() if batch is None else set(batch.ids)
        return batch

    def candidates(self, ready: Sequence[Ready]) -> Sequence[Ready]:
        """Who may share the next batch."""
        return ready


class PipelineCalls(WholeRequests):
    """A batch holds requests of the oldest one's kind only."""

    def __init__(self, times: StepTimes, kinds: Mapping[str, tuple[object, ...]]) -> None:
        super().__init__(times)
        self._kinds = kinds

    def candidates(self, ready: Sequence[Ready]) -> Sequence[Ready]:
        """Those that one call can serve beside the oldest."""
        if not ready:
            return ready
        oldest = min(ready, key=lambda item: (item.admitted_at_s, item.id))
        kind = self._kinds.get(oldest.id)  # None for one that is not of the trace: a warm-up
        return [item for item in ready if self._kinds.get(item.id) == kind]


def policies(times: StepTimes, trace: Sequence[Arrival]) -> dict[str, TickPolicy]:
    """Everyone who is compared, by name."""
    return {
        "steps": TickPolicy(times),
        "steps, oldest first": TickPolicy(times, PolicyConfig(stretch=0.0)),
        "whole requests": WholeRequests(times),
        "pipeline calls": PipelineCalls(times, {arrival.id: arrival.kind for arrival in trace}),
    }


@dataclass(frozen=True, slots=True)
class Summary:
    """One policy on one trace, or several traces pooled. Latencies from arrival to the last step.

    Attributes:
        long_slowdown: latency over the time that it would take alone, the mean over the tenth of
            the requests with the most work; ``worst_slowdown`` the largest over all.
    """

    pictures_per_s: float
    p50_s: float
    p95_s: float
    p99_s: float
    long_slowdown: float
    worst_slowdown: float

    @classmethod
    def of(
        cls,
        trace: Sequence[Arrival],
        latency_s: Mapping[str, float],
        times: Mapping[int, float],
    ) -> Summary:
        """Sum up one trace.

        Args:
            times: seconds of a tick with one and with two rows.
        """
        ordered = sorted(latency_s[arrival.id] for arrival in trace)
        alone_s = {a.id: a.request.steps * times[a.rows] for a in trace}
        slowdown = {id_: latency_s[id_] / alone for id_, alone in alone_s.items()}
        longest = sorted(alone_s, key=lambda id_: alone_s[id_])[-max(1, len(trace) // 10) :]
        wall_s = max(arrival.at_s + latency_s[arrival.id] for arrival in trace)
        return cls(
            pictures_per_s=len(trace) / wall_s,
            p50_s=_quantile(ordered, 0.5),
            p95_s=_quantile(ordered, 0.95),
            p99_s=_quantile(ordered, 0.99),
            long_slowdown=statistics.mean(slowdown[id_] for id_ in longest),
            worst_slowdown=max(slowdown.values()),
        )

    @classmethod
    def mean(cls, summaries: Sequence[Summary]) -> Summary:
        """The mean of each figure over several traces."""
        return cls(
            **{
                name: statistics.mean(getattr(summary, name) for summary in summaries)
                for name in cls.__slots__
            }
        )

    def cells(self, base: Summary) -> list[str]:
        """A table's cells: figures, and the p95 as a part of another's."""
        return [
            f"{self.pictures_per_s:.2f}",
            f"{self.p50_s:.2f} s",
            f"{self.p95_s:.2f} s",
            f"{self.p99_s:.2f} s",
            f"{self.long_slowdown:.1f}x",
            f"{self.worst_slowdown:.1f}x",
            f"{self.p95_s / base.p95_s:.2f}",
        ]


COLUMNS = (
    "load",
    "scheduling",
    "pictures/s",
    "p50",
    "p95",
    "p99",
    "longest tenth",
    "worst",
    "p95 / whole",
)


def _quantile(ordered: Sequence[float], part: float) -> float:
    return ordered[min(len(ordered) - 1, round(part * (len(ordered) - 1)))]
