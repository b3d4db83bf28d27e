"""What operators have switched, merged from whoever tells of it, in any order."""

from __future__ import annotations

import itertools
import logging

from server import request_log
from server.config import ModelConfig
from server.messages import ModelChange
from server.switched import FORGET_S, NOTHING, LevelChange, Switched, heed


def change(action: str, at_s: float, name: str = "x") -> ModelChange:
    return ModelChange(action=action, model=ModelConfig(id=name), at_s=at_s)  # type: ignore[arg-type]


def only(one: ModelChange) -> Switched:
    return NOTHING.with_model(one)


def test_the_order_in_which_words_arrive_does_not_matter() -> None:
    words = [only(change("add", 1.0)), only(change("remove", 2.0)), only(change("add", 3.0, "y"))]
    words.append(Switched(log=LevelChange("debug", 4.0)))
    ends = []
    for order in itertools.permutations(words):
        end = NOTHING
        for word in order:
            end = end.merged(word, now_s=5.0)
        ends.append(end)
    assert ends == [ends[0]] * len(ends)
    assert ends[0].removed("x")
    assert ends[0].added("y")
    assert ends[0].log == LevelChange("debug", 4.0)


def test_a_later_change_comes_after_even_where_the_clock_is_behind() -> None:
    known = only(change("add", 100.0))
    later = known.stamped(change("remove", 0.0), now_s=50.0)
    assert later.at_s > 100.0
    assert known.merged(only(later), now_s=50.0).removed("x")
    level = Switched(log=LevelChange("debug", 100.0)).with_level("error", now_s=50.0)
    assert Switched(log=LevelChange("debug", 100.0)).merged(level, now_s=50.0).log == level.log


def test_a_reloaded_addition_is_still_to_be_added_by_who_missed_it() -> None:
    known = only(change("add", 1.0))
    reloaded = known.with_model(known.stamped(change("reload", 0.0), now_s=2.0))
    assert (reloaded.models["x"].action, reloaded.models["x"].at_s) == ("add", 2.0)


def test_removals_are_forgotten_and_additions_are_not() -> None:
    known = only(change("remove", 1.0)).merged(only(change("add", 1.0, "y")), now_s=1.0)
    later = known.merged(NOTHING, now_s=1.0 + FORGET_S)
    assert set(known.models) == {"x", "y"}
    assert set(later.models) == {"y"}


def test_a_level_that_is_heard_of_is_taken_once() -> None:
    before = logging.getLogger("server").level
    try:
        heard = heed(NOTHING, Switched(log=LevelChange("error", 1.0)))
        assert request_log.level() == "error"
        request_log.set_level("debug")
        heed(heard, heard)  # nothing new
        assert request_log.level() == "debug"
    finally:
        for name in request_log.ROOTS:
            logging.getLogger(name).setLevel(before)
