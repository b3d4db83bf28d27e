"""Models that do not all fit: who is opened, who is closed, who waits, and that nobody starves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from engine.errors import ClosedError, InvalidRequestError
from server.memory import Entry, missing_bytes, patience_s, victim
from server.shelf import ModelShelf

WAIT_S = 10.0


class House:
    """Opens and closes models that are only names, and writes down when."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.broken: set[str] = set()
        self.door = threading.Event()
        self.door.set()

    def open(self, name: str) -> int:
        assert self.door.wait(WAIT_S)
        if name in self.broken:
            raise OSError(f"{name} is broken")
        self.log.append(f"+{name}")
        return 10

    def close(self, name: str) -> None:
        self.log.append(f"-{name}")


@pytest.fixture
def house() -> House:
    return House()


@pytest.fixture
def shelf_of(house: House) -> Iterator[Callable[..., ModelShelf]]:
    """A function from names, a budget and a patience to a running shelf; each model takes 10."""
    shelves: list[ModelShelf] = []

    def build(names: str, *, budget: int = 20, patience_s: float = 3600.0) -> ModelShelf:
        shelf = ModelShelf(
            budget, open_model=house.open, close_model=house.close, patience_s=patience_s
        )
        for name in names:
            shelf.add(name, 10)
        shelf.start()
        shelves.append(shelf)
        return shelf

    yield build
    house.door.set()
    for shelf in shelves:
        shelf.close()


def use(shelf: ModelShelf, name: str) -> None:
    shelf.acquire(name).result(WAIT_S)
    shelf.release(name)


def test_what_fits_is_opened_once(house: House, shelf_of: Callable[..., ModelShelf]) -> None:
    shelf = shelf_of("ab")
    for name in "abab":
        use(shelf, name)
    assert house.log == ["+a", "+b"]
    assert shelf.open_bytes == 20


def test_the_idle_one_longest_unused_makes_room(
    house: House, shelf_of: Callable[..., ModelShelf]
) -> None:
    shelf = shelf_of("abc")
    for name in ("a", "b", "a", "c", "a"):
        use(shelf, name)
    assert house.log == ["+a", "+b", "-b", "+c"]
    use(shelf, "b")
    assert house.log[4:] == ["-c", "+b"]


def test_one_in_use_is_left_alone_while_others_are_idle(
    house: House, shelf_of: Callable[..., ModelShelf]
) -> None:
    shelf = shelf_of("abc")
    shelf.acquire("a").result(WAIT_S)
    use(shelf, "b")
    use(shelf, "c")
    assert house.log == ["+a", "+b", "-b", "+c"]


def test_one_that_waits_too_long_gets_its_turn(
    house: House, shelf_of: Callable[..., ModelShelf]
) -> None:
    """The busy model finishes what it has; what is new for it waits until it is back."""
    shelf = shelf_of("ab", budget=10, patience_s=0.0)
    shelf.acquire("a").result(WAIT_S)
    other = shelf.acquire("b")
    with pytest.raises(TimeoutError):
        other.result(0.05)
    again = shelf.acquire("a")
    assert not again.done()
    shelf.release("a")
    other.result(WAIT_S)
    assert house.log == ["+a", "-a", "+b"]
    shelf.release("b")
    again.result(WAIT_S)
    assert house.log == ["+a", "-a", "+b", "-b", "+a"]


def test_without_room_it_waits_for_an_end(
    house: House, shelf_of: Callable[..., ModelShelf]
) -> None:
    shelf = shelf_of("ab", budget=10)
    shelf.acquire("a").result(WAIT_S)
    other = shelf.acquire("b")
    use(shelf, "a")  # patience is an hour: others go on
    assert not other.done()
    shelf.release("a")
    other.result(WAIT_S)
    assert house.log == ["+a", "-a", "+b"]


def test_a_model_above_the_budget_is_opened_alone(
    house: House, shelf_of: Callable[..., ModelShelf]
) -> None:
    shelf = shelf_of("ab", budget=5)
    use(shelf, "a")
    use(shelf, "b")
    assert house.log == ["+a", "-a", "+b"]


def test_one_that_cannot_be_opened_fails_those_who_wait_and_may_work_later(
    house: House, shelf_of: Callable[..., ModelShelf]
) -> None:
    shelf = shelf_of("a")
    house.broken.add("a")
    with pytest.raises(OSError, match="broken"):
        shelf.acquire("a").result(WAIT_S)
    house.broken.clear()
    use(shelf, "a")


def test_who_gives_up_waiting_uses_nothing(
    house: House, shelf_of: Callable[..., ModelShelf]
) -> None:
    shelf = shelf_of("ab", budget=10)
    house.door.clear()
    first, second = shelf.acquire("a"), shelf.acquire("a")
    assert second.cancel()
    house.door.set()
    first.result(WAIT_S)
    shelf.release("a")
    use(shelf, "b")  # a is idle again, so it can make room
    assert house.log == ["+a", "-a", "+b"]


def test_removing_lets_uses_end_and_takes_no_new_ones(
    house: House, shelf_of: Callable[..., ModelShelf]
) -> None:
    shelf = shelf_of("ab")
    shelf.acquire("a").result(WAIT_S)
    removed = shelf.remove("a")
    with pytest.raises(InvalidRequestError, match="allowed: b"):
        shelf.acquire("a")
    assert not removed.done()
    shelf.release("a")
    removed.result(WAIT_S)
    assert house.log == ["+a", "-a"]
    with pytest.raises(InvalidRequestError):
        shelf.remove("a")


def test_jobs_run_between_moves(house: House, shelf_of: Callable[..., ModelShelf]) -> None:
    shelf = shelf_of("a")
    house.door.clear()
    opening = shelf.acquire("a")
    job = shelf.between_moves(lambda: house.log.append("job"))
    house.door.set()
    job.result(WAIT_S)
    opening.result(WAIT_S)
    assert sorted(house.log) == ["+a", "job"]
    failing = shelf.between_moves(lambda: house.log.remove("never there"))
    with pytest.raises(ValueError, match="not in list"):
        failing.result(WAIT_S)


def test_closing_fails_who_waits(house: House, shelf_of: Callable[..., ModelShelf]) -> None:
    shelf = shelf_of("ab", budget=10)
    shelf.acquire("a").result(WAIT_S)
    other = shelf.acquire("b")
    shelf.close()
    with pytest.raises(ClosedError):
        other.result(WAIT_S)
    with pytest.raises(ClosedError):
        shelf.acquire("a")
    assert house.log == ["+a"]


# ---------------------------------------------------------------------- the policy alone


def test_policy_in_numbers() -> None:
    old = Entry("old", 30, open=True, used_at_s=1.0)
    new = Entry("new", 30, open=True, used_at_s=2.0)
    busy = Entry("busy", 30, open=True, users=1, used_at_s=0.0)
    closed = Entry("closed", 50)
    assert missing_bytes([old, new, busy, closed], closed, 100) == 40
    assert victim([new, busy, old, closed], may_push=True) is old
    assert victim([busy, closed], may_push=False) is None
    assert victim([busy, closed], may_push=True) is busy
    assert patience_s(Entry("quick", 1, opening_s=0.1), 10.0) == 10.0
    assert patience_s(Entry("slow", 1, opening_s=30.0), 10.0) == 150.0
