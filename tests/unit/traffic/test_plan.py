from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace

import pytest

from loadtests.traffic.plan import KINDS, PROMPTS, UNIFORM, Mix, plan


def _drawn(mix: Mix, count: int = 4000, seed: int = 1) -> list[object]:
    return list(itertools.islice(plan(itertools.count(), mix, seed), count))


def test_a_seed_gives_the_same_requests_again() -> None:
    assert _drawn(Mix(), 50) == _drawn(Mix(), 50)
    assert _drawn(Mix(), 50) != _drawn(Mix(), 50, seed=2)


def test_kinds_and_steps_come_in_the_shares_asked_for() -> None:
    planned = list(itertools.islice(plan(itertools.count(), Mix(), 1), 4000))
    kinds = Counter(item.kind for item in planned)

    assert set(kinds) == set(KINDS)
    assert kinds["generation"] / 4000 == pytest.approx(0.7, abs=0.03)
    assert sum(item.steps == 20 for item in planned) / 4000 == pytest.approx(0.6, abs=0.03)
    assert sum(item.give_up_after_s is not None for item in planned) / 4000 < 0.06


def test_popularity_follows_zipf() -> None:
    mix = replace(Mix(), sessions=0.0, zipf=1.0)
    counts = Counter(
        item.prompt for item in itertools.islice(plan(itertools.count(), mix, 1), 20_000)
    )
    ranked = [count for _, count in counts.most_common()]

    assert ranked[0] / ranked[9] == pytest.approx(10, rel=0.35)


def test_sessions_go_step_by_step_in_order() -> None:
    sessions = json.loads((PROMPTS / "editing.json").read_text())
    follows = {
        (a["prompt"], b["prompt"])
        for session in sessions
        for a, b in itertools.pairwise(session["steps"])
    }
    mix = replace(Mix(), sessions=1.0)
    prompts = [item.prompt for item in itertools.islice(plan(itertools.count(), mix, 1), 400)]
    neighbours = sum(pair in follows for pair in itertools.combinations(prompts[:60], 2))

    assert neighbours > 10
    assert set(prompts) <= {step["prompt"] for session in sessions for step in session["steps"]}


def test_capacity_is_measured_with_one_kind_of_request() -> None:
    planned = list(itertools.islice(plan(itertools.count(), UNIFORM, 1), 100))

    assert {(item.kind, item.steps, item.width_px) for item in planned} == {("generation", 20, 128)}


def test_weights_for_every_kind_are_needed() -> None:
    with pytest.raises(ValueError, match="generation, stream, job, edit"):
        Mix(kinds=(1.0,))
