"""Eviction policies against each other: steps saved on the traces, at four sizes of the cache.

::

    python -m loadtests.cache_policies [--half-lives-s 300 900 3600] [--seeds 20240416 1 2]

No picture is drawn: which states may be used, kept and evicted does not depend on what is in them
(:mod:`server.cache_replay`). The working set is the most that an unlimited cache would hold. By
default a model's own calibrated profile; of several seeds of the trace, the mean.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from cache.policy import DEFAULT_HALF_LIFE_S, DEFAULT_POLICY, POLICIES, EvictionPolicy, policy_named
from cache.profiles import FILE_NAME, read_profile
from cache.traces import ZIPF_EXPONENTS, Arrival, TraceConfig, make_trace, reuse_within
from engine.model import Model
from engine.ports import Embedding, ReuseProfile, StateKind
from engine.types import GenerateRequest
from loadtests.common import conditions
from server.cache_replay import Replayed, embed_prompts, simulate
from server.cache_wiring import model_folder, opened_model, vocabulary
from server.settings import Settings

SIZES = (0.01, 0.05, 0.2, 1.0)
UNLIMITED_BYTES = 2**40
KINDS = {
    "noisy": ReuseProfile(kind=StateKind.NOISY),
    "finished": ReuseProfile(kind=StateKind.CLEAN, fractions=(1.0,)),
}


@dataclass(frozen=True, slots=True)
class _Comparison:
    traces: Sequence[Sequence[Arrival]]
    embeddings: Mapping[str, Embedding]
    model: Model
    base: GenerateRequest
    profile: ReuseProfile

    def unlimited(self) -> list[Replayed]:
        """Of each trace."""
        limits = [UNLIMITED_BYTES] * len(self.traces)
        return self._run(limits, policy_named(DEFAULT_POLICY))

    def saved(self, working_sets: Sequence[int], size: float, policy: EvictionPolicy) -> float:
        """Mean share of the steps."""
        limits = [max(1, int(size * bytes_)) for bytes_ in working_sets]
        return float(np.mean([run.saved for run in self._run(limits, policy)]))

    def _run(self, limits: Sequence[int], policy: EvictionPolicy) -> list[Replayed]:
        return [
            simulate(
                trace,
                self.embeddings,
                self.model,
                self.base,
                self.profile,
                limit_bytes=limit_bytes,
                policy=policy,
            )
            for trace, limit_bytes in zip(self.traces, limits, strict=True)
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tintype")
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[TraceConfig(requests=1).seed])
    parser.add_argument("--half-lives-s", type=float, nargs="+", default=[DEFAULT_HALF_LIFE_S])
    parser.add_argument("--kind", choices=sorted(KINDS), help="with the published jumps")
    parser.add_argument("--profile", type=Path, help="a calibrated profile")
    options = parser.parse_args()

    console = Console(width=140)
    settings = Settings.from_environment()
    profile = _profile(options, settings)
    policies = _policies(options.half_lives_s)
    base = GenerateRequest(prompt="", steps=options.steps)
    words = vocabulary(settings)
    began_s = time.perf_counter()
    with opened_model(settings, options.model, "fp32") as model:
        for zipf in ZIPF_EXPONENTS:
            configs = [
                TraceConfig(requests=options.requests, zipf=zipf, seed=seed)
                for seed in options.seeds
            ]
            traces = [make_trace(words, config) for config in configs]
            embeddings = embed_prompts([arrival for trace in traces for arrival in trace], model)
            compare = _Comparison(traces, embeddings, model, base, profile)
            whole = compare.unlimited()
            working_sets = [run.most_bytes for run in whole]
            table = Table("policy", *(f"{size:.0%}" for size in SIZES))
            for name, policy in policies.items():
                saved = [compare.saved(working_sets, size, policy) for size in SIZES]
                table.add_row(name, *(f"{share:.2%}" for share in saved))
            console.print(
                f"Zipf {zipf}: {len({arrival.prompt for arrival in traces[0]})} prompts over"
                f" {traces[0][-1].at_s / 3600:.0f} h, {reuse_within(traces[0], 3600):.0%} of"
                f" repeats within an hour; working set {working_sets[0] / 1e6:.1f} MB;"
                f" unlimited saves {np.mean([run.saved for run in whole]):.1%}"
            )
            console.print(table)
    console.print(f"{conditions(options)}; {time.perf_counter() - began_s:.0f} s")


def _profile(options: argparse.Namespace, settings: Settings) -> ReuseProfile:
    if options.kind is not None:
        return KINDS[options.kind]
    return read_profile(options.profile or model_folder(settings, options.model) / FILE_NAME)


def _policies(half_lives_s: Sequence[float]) -> dict[str, EvictionPolicy]:
    """Every policy; the one whose uses age once for each half-life."""
    aged = {
        f"lcbfu, {half_life_s:g} s": policy_named("lcbfu", half_life_s=half_life_s)
        for half_life_s in half_lives_s
    }
    return aged | {name: policy_named(name) for name in POLICIES if name != "lcbfu"}


if __name__ == "__main__":
    main()
