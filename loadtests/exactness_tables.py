"""Solver tables against Diffusers' scheduler classes, around an analytic denoiser.

    python -m loadtests.exactness_tables            every combination, 1 to 50 steps
    python -m loadtests.exactness_tables --quick    the same combinations, a few step counts

No model is needed: the network is the exact posterior mean of a Gaussian mixture, which is not
linear in x, expressed in each prediction type. Every combination of solver, schedule, prediction
type and noise schedule is generated, run on both sides with the same generator, and printed with
its largest relative error over the step counts, or with who refuses it and why.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from rich.console import Console
from rich.progress import track
from rich.table import Table

from engine.errors import DarkroomError
from loadtests.exactness_cases import Case, generate
from loadtests.exactness_runs import DiffusersRefusal, build, relative_error, run_diffusers

TOLERANCE = 1e-3
"""Largest relative error allowed against Diffusers as it is, in float32."""

TOLERANCE64 = 1e-5
"""The same with Diffusers' tensors and scalars in float64, where only its tables stay float32.

Starting where alpha is 5e-5 (the cosine schedule's top), an epsilon model, or a solver that keeps
x / alpha, loses up to a percent to float32 in Diffusers. There this bound decides.
"""

ALL_STEPS = tuple(range(1, 51))
FEW_STEPS = (1, 2, 3, 4, 7, 14, 15, 20, 50)


@dataclass
class Outcome:
    case: Case
    error32: float = 0.0
    error64: float = 0.0
    compared: int = 0
    worst_steps: int = 0
    refused_by_us: str = ""
    refused_by_diffusers: str = ""
    skipped: dict[int, str] = field(default_factory=dict)

    @property
    def agrees(self) -> bool:
        """Both run it and are equal, or we refuse; never: Diffusers refuses and we serve."""
        if self.refused_by_us:
            return True
        return not self.refused_by_diffusers and self.compared > 0 and self.error64 < TOLERANCE64

    @property
    def is_rounded(self) -> bool:
        """Equal in float64, but Diffusers' float32 arithmetic is coarser than the tolerance."""
        return self.agrees and not self.error32 < TOLERANCE


def examine(case: Case, step_counts: Sequence[int]) -> Outcome:
    outcome = Outcome(case)
    for steps in step_counts:
        ours = _our_refusal(case, steps)
        reference, theirs = _their_result(case, steps)
        if reference is None and not ours:
            outcome.refused_by_diffusers = f"{steps} steps: {theirs}"
            return outcome
        if ours:
            outcome.skipped[steps] = ours
            outcome.refused_by_diffusers = theirs
            continue
        error = relative_error(case, steps, torch.float64, reference=reference)
        outcome.error64 = max(outcome.error64, error)
        error = relative_error(case, steps, torch.float32)
        # Not finite: sqrt of a rounding error below zero, in Diffusers' float32 only.
        error = error if np.isfinite(error) else np.inf
        if error >= outcome.error32:
            outcome.error32, outcome.worst_steps = error, steps
        outcome.compared += 1
    if not outcome.compared:
        outcome.refused_by_us = next(iter(outcome.skipped.values()))
    else:
        outcome.refused_by_diffusers = ""
    return outcome


def _our_refusal(case: Case, steps: int) -> str:
    try:
        build(case, steps)
    except DarkroomError as error:
        return str(error)
    return ""


def _their_result(case: Case, steps: int) -> tuple[np.ndarray[Any, Any] | None, str]:
    """Diffusers' final x in float64, or None and why there is none."""
    try:
        result = run_diffusers(case, steps, torch.float64)
    except (DiffusersRefusal, ValueError, NotImplementedError, IndexError, RuntimeError) as error:
        return None, f"{type(error).__name__}: {error}".split("\n")[0]
    if not np.all(np.isfinite(result)):
        return None, "its result is not finite"
    return result, ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few step counts instead of 1..50")
    parser.add_argument("--only", default="", help="combinations whose name contains this")
    parser.add_argument("--all-refusals", action="store_true", help="print every refusal as well")
    given = parser.parse_args(arguments)
    diffusers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    began = time.monotonic()
    cases = [case for case in generate() if given.only in case.name]
    step_counts = FEW_STEPS if given.quick else ALL_STEPS
    with np.errstate(all="ignore"):
        outcomes = [
            examine(case, step_counts) for case in track(cases, console=Console(stderr=True))
        ]
    console = Console()
    console.width = max(console.width, 150)  # a row a line, also in a file
    _print(console, outcomes, given.all_refusals)
    served = [outcome for outcome in outcomes if not outcome.refused_by_us]
    failed = [outcome for outcome in outcomes if not outcome.agrees]
    rounded = [outcome for outcome in served if outcome.is_rounded]
    plain = [outcome.error32 for outcome in served if not outcome.is_rounded]
    refused = [outcome for outcome in outcomes if outcome.refused_by_us]
    both = sum(1 for outcome in refused if outcome.refused_by_diffusers)
    console.print(
        f"{len(served)} combinations served, {sum(o.compared for o in served)} runs compared:"
        f" largest relative error {max((o.error64 for o in served), default=0.0):.1e} against"
        f" Diffusers in float64; in float32 {max(plain, default=0.0):.1e} for {len(plain)} and"
        f" above {TOLERANCE:g}, by Diffusers' own rounding, for {len(rounded)}."
        f" {len(refused)} refused by us, {both} of them by Diffusers too."
        f" {len(failed)} disagree. {time.monotonic() - began:.0f} s"
    )
    return 1 if failed else 0


def _print(console: Console, outcomes: Sequence[Outcome], all_refusals: bool) -> None:
    shown = Table("combination", "runs", "error (fp32)", "error (fp64)", "at steps", "verdict")
    for outcome in outcomes:
        if outcome.refused_by_us:
            if all_refusals:
                theirs = outcome.refused_by_diffusers or "accepts"
                verdict = f"refused: {outcome.refused_by_us} | Diffusers: {theirs}"
                shown.add_row(outcome.case.name, "0", "", "", "", verdict)
            continue
        verdict = "equal" if outcome.agrees else "DIFFERS"
        if outcome.is_rounded:
            verdict = "equal in fp64; Diffusers' fp32 rounds"
        if outcome.refused_by_diffusers:
            verdict = f"DIFFUSERS REFUSES: {outcome.refused_by_diffusers}"
        shown.add_row(
            outcome.case.name,
            str(outcome.compared),
            f"{outcome.error32:.1e}",
            f"{outcome.error64:.1e}",
            str(outcome.worst_steps),
            verdict + (f" ({len(outcome.skipped)} step counts refused)" if outcome.skipped else ""),
        )
    console.print(shown)


if __name__ == "__main__":
    sys.exit(main())
