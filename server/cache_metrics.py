"""The noise cache in Prometheus' terms: read from its statistics whenever somebody asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from engine.noise_statistics import ReuseStatistics
from engine.ports import CacheStatistics
from engine.types import ReuseOutcome


class CacheCollector(Collector):
    """Collects ``darkroom_cache_*`` from an engine's counts and its cache's."""

    def __init__(
        self,
        reuse: Callable[[], ReuseStatistics | None],
        cache: Callable[[], CacheStatistics],
    ) -> None:
        self._reuse = reuse
        self._cache = cache

    def collect(self) -> Iterable[Metric]:
        """Everything at this moment."""
        reuse = self._reuse()
        if reuse is not None:
            yield from _of_requests(reuse)
        yield from _of_store(self._cache())


def _of_requests(reuse: ReuseStatistics) -> Iterable[Metric]:
    lookups = CounterMetricFamily(
        "darkroom_cache_lookups",
        "Pictures by what became of their look into the noise cache.",
        labels=("outcome",),
    )
    for outcome in ReuseOutcome:
        lookups.add_metric((outcome.value,), reuse.outcomes.get(outcome, 0))
    yield lookups
    yield _histogram(
        "darkroom_cache_jump_ratio", "Hits by the share of steps skipped.", reuse.hits_by_jump
    )
    yield _histogram(
        "darkroom_cache_similarity_ratio",
        "Looks by the similarity of the closest prompt.",
        reuse.looks_by_similarity,
    )
    yield _counter("darkroom_cache_steps_asked", "Steps of all pictures.", reuse.steps_asked)
    yield _counter("darkroom_cache_steps_saved", "Steps that hits spared.", reuse.steps_saved)
    offers = CounterMetricFamily(
        "darkroom_cache_offers", "States offered, by what became of them.", labels=("outcome",)
    )
    for fate, count in (
        ("stored", reuse.offers_stored),
        ("refused", reuse.offers_refused),
        ("dropped", reuse.offers_dropped),
    ):
        offers.add_metric((fate,), count)
    yield offers
    yield _counter(
        "darkroom_cache_write_seconds", "Time that the writer spent in the cache.", reuse.write_s
    )


def _of_store(cache: CacheStatistics) -> Iterable[Metric]:
    labels = (cache.backend, cache.policy)
    for name, text, value in (
        ("darkroom_cache_bytes", "Bytes of stored states.", cache.size_bytes),
        ("darkroom_cache_limit_bytes", "Limit of one namespace.", cache.limit_bytes),
        ("darkroom_cache_entries", "Pictures with states.", cache.entries),
        ("darkroom_cache_states", "Stored states.", cache.states),
        ("darkroom_cache_available", "Whether the store answers.", float(cache.available)),
    ):
        gauge = GaugeMetricFamily(name, text, labels=("backend", "policy"))
        gauge.add_metric(labels, value)
        yield gauge
    evictions = CounterMetricFamily(
        "darkroom_cache_evictions", "States evicted.", labels=("backend", "policy")
    )
    evictions.add_metric(labels, cache.evicted)
    yield evictions
    faults = CounterMetricFamily(
        "darkroom_cache_faults",
        "Calls of the store that gave nothing for a fault; each was a miss or a lost offer.",
        labels=("kind",),
    )
    for kind in ("corrupt", "errors", "timeouts", "skipped", "resyncs"):
        faults.add_metric((kind,), getattr(cache, kind))
    yield faults


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, value=value)


def _histogram(name: str, text: str, bins: tuple[int, ...]) -> HistogramMetricFamily:
    """Equal bins from 0 to 1 as a histogram; its sum is taken at the bins' middles."""
    buckets, total, weighted = [], 0, 0.0
    for index, count in enumerate(bins):
        total += count
        weighted += count * (index + 0.5) / len(bins)
        buckets.append((str((index + 1) / len(bins)), float(total)))
    buckets.append(("+Inf", float(total)))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=weighted)
