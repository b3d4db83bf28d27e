"""How long the nearest prompt takes to find, at 10⁴, 10⁵ and 10⁶ entries, and how surely.

::

    python -m loadtests.cache_index                 # exact search, as served
    pip install usearch && python -m loadtests.cache_index --library

Entries stand in clusters of sixteen, as prompts of editing sessions do; queries are further members
of known clusters. Recall is the share of the eight truly nearest that are found.
"""

from __future__ import annotations

import argparse
import importlib
import time
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from cache.embedding import DIMENSIONS
from cache.index import VectorTable
from loadtests.common import conditions

Floats = npt.NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--library", action="store_true", help="measure usearch (HNSW) beside it")
    options = parser.parse_args()
    table = Table("entries", "search", "median ms", "95 % ms", "recall", "adds/s", "MB")
    for size in options.sizes:
        random = np.random.default_rng(size)
        centres = _unit(random.standard_normal((size // 16, DIMENSIONS), dtype=np.float32))
        entries = _around(np.repeat(centres, 16, axis=0), random)
        queries = _around(centres[random.integers(len(centres), size=options.queries)], random)
        truth = [set(np.argsort(-(entries @ q))[: options.limit].tolist()) for q in queries]
        for name in ("exact", "usearch")[: 1 + options.library]:
            build = _exact if name == "exact" else _usearch
            table.add_row(f"{size:,}", name, *_measure(build, entries, queries, truth, options))
    Console(width=140).print(table)
    print(conditions(options))


def _measure(
    build: Any, entries: Floats, queries: Floats, truth: list[set[int]], options: argparse.Namespace
) -> list[str]:
    began_s = time.perf_counter()
    search, size_bytes = build(entries, options.limit)
    built_s = time.perf_counter() - began_s
    times_s, found = [], 0
    for query, true in zip(queries, truth, strict=True):
        began_s = time.perf_counter()
        names = search(query)
        times_s.append(time.perf_counter() - began_s)
        found += len(true & names)
    recall = found / (len(queries) * options.limit)
    return [
        f"{1e3 * np.median(times_s):.3f}",
        f"{1e3 * np.quantile(times_s, 0.95):.3f}",
        f"{recall:.4f}",
        f"{len(entries) / built_s:,.0f}",
        f"{size_bytes / 1e6:,.0f}",
    ]


def _exact(entries: Floats, limit: int) -> Any:
    table = VectorTable()
    for i, vector in enumerate(entries):
        table.put(str(i), vector)
    return lambda query: {int(name) for name, _ in table.nearest(query, limit)}, entries.nbytes


def _usearch(entries: Floats, limit: int) -> Any:
    index = importlib.import_module("usearch.index").Index(ndim=DIMENSIONS, metric="cos")
    index.add(np.arange(len(entries)), entries)
    return lambda query: set(index.search(query, limit).keys.tolist()), index.memory_usage


def _around(centres: Floats, random: np.random.Generator) -> Floats:
    """Members of clusters at a cosine of about 0.9 to their centre."""
    noise = _unit(random.standard_normal(centres.shape, dtype=np.float32))
    return _unit(centres + np.float32(0.48) * noise)


def _unit(vectors: Floats) -> Floats:
    scaled = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(scaled, dtype=np.float32)


if __name__ == "__main__":
    main()
