"""Eviction policies against each other: steps saved on the traces, at four sizes of the cache.

::

    python -m loadtests.cache_policies

No picture is drawn: which states may be used, kept and evicted does not depend on what is in them
(:mod:`server.cache_replay`). The working set is what an unlimited cache would hold at the end.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cache.policy import POLICIES, EvictionPolicy, policy_named
from cache.profiles import read_profile
from cache.traces import ZIPF_EXPONENTS, Arrival, TraceConfig, make_trace, reuse_within
from engine.model import Model
from engine.ports import Embedding, ReuseProfile, StateKind
from engine.types import GenerateRequest
from loadtests.common import conditions
from server.cache_replay import Replayed, embed_prompts, simulate
from server.cache_wiring import opened_model, vocabulary
from server.settings import Settings

SIZES = (0.01, 0.05, 0.2, 1.0)
UNLIMITED_BYTES = 2**40
KINDS = {
    "noisy": ReuseProfile(kind=StateKind.NOISY),
    "finished": ReuseProfile(kind=StateKind.CLEAN, fractions=(1.0,)),
}


@dataclass(frozen=True, slots=True)
class _Comparison:
    trace: Sequence[Arrival]
    embeddings: Mapping[str, Embedding]
    model: Model
    base: GenerateRequest
    profile: ReuseProfile

    def run(self, limit_bytes: int, policy: EvictionPolicy) -> Replayed:
        return simulate(
            self.trace,
            self.embeddings,
            self.model,
            self.base,
            self.profile,
            limit_bytes=limit_bytes,
            policy=policy,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tintype")
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--half-life-s", type=float, default=3600.0)
    parser.add_argument("--kind", choices=sorted(KINDS), default="noisy")
    parser.add_argument("--profile", type=Path, help="a calibrated profile instead of the kind's")
    options = parser.parse_args()

    console = Console(width=140)
    settings = Settings.from_environment()
    profile = KINDS[options.kind] if options.profile is None else read_profile(options.profile)
    base = GenerateRequest(prompt="", steps=options.steps)
    words = vocabulary(settings)
    began_s = time.perf_counter()
    with opened_model(settings, options.model, "fp32") as model:
        for zipf in ZIPF_EXPONENTS:
            trace = make_trace(words, TraceConfig(requests=options.requests, zipf=zipf))
            compare = _Comparison(trace, embed_prompts(trace, model), model, base, profile)
            whole = compare.run(UNLIMITED_BYTES, policy_named("lcbfu"))
            table = Table("policy", *(f"{size:.0%}" for size in SIZES))
            for name in POLICIES:
                policy = policy_named(name, half_life_s=options.half_life_s)
                runs = [compare.run(int(size * whole.most_bytes), policy) for size in SIZES]
                table.add_row(name, *(f"{run.saved:.2%}" for run in runs))
            console.print(
                f"Zipf {zipf}: {len(compare.embeddings)} prompts over"
                f" {trace[-1].at_s / 3600:.0f} h, {reuse_within(trace, 3600):.0%} of repeats within"
                f" an hour; working set {whole.most_bytes / 1e6:.1f} MB;"
                f" unlimited saves {whole.saved:.1%}"
            )
            console.print(table)
    console.print(f"{conditions(options)}; {time.perf_counter() - began_s:.0f} s")


if __name__ == "__main__":
    main()
