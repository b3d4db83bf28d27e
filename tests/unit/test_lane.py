"""What a lane gathers for a tick, and when it must gather it anew."""

from __future__ import annotations

import pytest
import torch

from engine.lane import Lane
from engine.trajectory import LaneKey, Trajectory
from engine.types import Conditioning
from tests.unit.fakes import SHAPE, trajectory

KEY = LaneKey("plan", SHAPE, tokens=3)


def member(name: str, tag: float, *, guidance: float = 3.0) -> Trajectory:
    item = trajectory(name, guidance=guidance)
    rows = item.conditioning.rows
    context = tag + torch.arange(rows).view(-1, 1, 1).expand(rows, 3, 2) / 10
    item.conditioning = Conditioning(context, {"text_embeds": context[:, 0]})
    return item


@pytest.fixture
def lane() -> Lane:
    return Lane(KEY, slots=5, max_slots=8, device=torch.device("cpu"))


def tags(lane: Lane, members: list[Trajectory]) -> list[float]:
    """Of the rows of a tick, the same in the context and in what is added to it."""
    rows = lane.rows(members)
    assert torch.equal(rows.context[:, 0], rows.added["text_embeds"])
    return [round(float(row), 4) for row in rows.context[:, 0, 0]]


def test_rows_are_every_prompt_and_then_the_negatives(lane: Lane) -> None:
    one, two, bare = member("one", 1.0), member("two", 2.0), member("bare", 3.0, guidance=1.0)
    for item in (one, two, bare):
        lane.join(item)
    assert tags(lane, [one, bare, two]) == [1.0, 3.0, 2.0, 1.1, 2.1]


def test_the_same_rows_are_gathered_once_and_others_anew(lane: Lane) -> None:
    one, two = member("one", 1.0), member("two", 2.0)
    lane.join(one)
    lane.join(two)
    first = lane.rows([one, two])
    lane.advance([one, two], torch.zeros(2, *SHAPE))
    again = lane.rows([one, two])
    assert again.context is first.context
    assert not torch.equal(again.sample, first.sample)
    assert tags(lane, [two, one]) == [2.0, 1.0, 2.1, 1.1]
    assert tags(lane, [two]) == [2.0, 2.1]


def test_a_slot_that_changed_hands_is_gathered_anew(lane: Lane) -> None:
    one = member("one", 1.0)
    lane.join(one)
    assert tags(lane, [one]) == [1.0, 1.1]
    lane.leave(one.id)
    heir = member("one", 5.0)
    lane.join(heir)
    assert lane.members["one"][0] == 0, "the heir has the same slot and name"
    assert tags(lane, [heir]) == [5.0, 5.1]


def test_a_step_without_guidance_leaves_the_negative_row_out(lane: Lane) -> None:
    item = trajectory("t", guidance=3.0, interval=(0.0, 0.5))
    item.conditioning = member("x", 1.0).conditioning
    lane.join(item)
    seen = []
    while item.steps_left:
        seen.append(tags(lane, [item]))
        lane.advance([item], torch.zeros(1, *SHAPE))
    assert seen == [[1.0, 1.1] if wants else [1.0] for wants in item.guided]
    assert {len(rows) for rows in seen} == {1, 2}
