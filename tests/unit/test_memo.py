"""Results that are found again: by identity, by value, never stale, never more than allowed."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from engine.memo import TensorMemo


class Doubling:
    """Doubles the tensor ``x`` through a memo, and counts how often it really did."""

    def __init__(self, memo: TensorMemo) -> None:
        self.memo = memo
        self.runs = 0

    def __call__(self, x: Tensor, **more: Tensor) -> Tensor:
        def compute() -> dict[str, Tensor]:
            self.runs += 1
            return {"y": 2 * x}

        return self.memo.recall({"x": x, **more}, compute)["y"]


@pytest.fixture
def double() -> Doubling:
    return Doubling(TensorMemo(max_entries=2))


def test_the_same_tensor_and_an_equal_one_are_known(double: Doubling) -> None:
    x = torch.randn(3, 4)
    first = double(x)
    assert double(x) is first
    assert double(x.clone()) is first
    assert torch.equal(first, 2 * x)
    assert double.runs == 1


def test_an_equal_tensor_takes_the_place_of_the_one_that_it_equals(
    double: Doubling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values are compared once, not for as long as the newer tensor lives."""
    x = torch.randn(3, 4)
    first, again = double(x), x.clone()
    assert double(again) is first
    monkeypatch.setattr(torch, "equal", lambda *_: pytest.fail("compared by value"))
    assert double(again) is first
    again.add_(1)
    monkeypatch.undo()
    assert torch.equal(double(again), 2 * again)
    assert double.runs == 2


def test_anything_else_is_computed(double: Doubling) -> None:
    x = torch.ones(4)
    factor = torch.ones(1)
    double(x)
    others = [
        torch.full((4,), 3.0),
        torch.ones(2, 2),
        torch.ones(1),  # would broadcast
        torch.ones(4, dtype=torch.float64),
        torch.full((4,), torch.nan),
    ]
    for runs, other in enumerate(others, start=2):
        torch.testing.assert_close(double(other), 2 * other, equal_nan=True)
        assert double.runs == runs
    double(x, factor=factor)
    double(x, factor=factor + 1)
    double(x, other=factor)
    assert double.runs == len(others) + 4


def test_a_tensor_that_was_written_to_is_another(double: Doubling) -> None:
    x = torch.ones(4)
    before = x.clone()
    double(x)
    x[1:].add_(1)  # through a view
    assert torch.equal(double(x), 2 * x)
    assert double.runs == 2
    assert torch.equal(double(before), 2 * before)
    assert double.runs == 3


def test_tensors_whose_writes_torch_does_not_count_are_never_known(double: Doubling) -> None:
    with torch.inference_mode():
        x = torch.ones(4)
        double(x)
        x.add_(1)
        assert torch.equal(double(x), 2 * x)
    assert double.runs == 2


def test_the_latest_used_are_kept(double: Doubling) -> None:
    a, b, c = (torch.full((2,), value) for value in (1.0, 2.0, 3.0))
    for x in (a, b, a, b):
        double(x)
    assert double.runs == 2  # two lanes that take turns
    double(a)
    double(c)  # in place of b
    double(a)
    assert double.runs == 3
    double(b)
    assert double.runs == 4


def test_memory_is_bounded_but_for_the_latest() -> None:
    x = torch.zeros(100)
    double = Doubling(TensorMemo(max_entries=4, max_bytes=2 * 2 * x.nbytes))
    for value in range(3):
        double(x + value)
    double(x + 1)
    assert double.runs == 3
    double(x)
    assert double.runs == 4  # the third had taken its place
    large = torch.zeros(1000)
    double(large)
    double(large)
    assert double.runs == 5
    double(x)
    assert double.runs == 6


def test_it_forgets(double: Doubling) -> None:
    x = torch.ones(2)
    double(x)
    double.memo.clear()
    double(x)
    assert double.runs == 2
    double.memo.close()
    double(x)
    double(x)
    assert double.runs == 4


def test_what_is_computed_while_it_closes_is_not_kept() -> None:
    memo = TensorMemo()
    x = torch.ones(2)
    runs: list[None] = []

    def compute() -> dict[str, Tensor]:
        runs.append(None)
        memo.close()
        return {"y": x}

    for _ in range(2):
        assert memo.recall({"x": x}, compute)["y"] is x
    assert len(runs) == 2


def test_a_failed_computation_leaves_nothing(double: Doubling) -> None:
    x = torch.ones(2)

    def fail() -> dict[str, Tensor]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        double.memo.recall({"x": x}, fail)
    assert torch.equal(double(x), 2 * x)
    assert double.runs == 1


def test_many_threads_get_what_belongs_to_their_inputs() -> None:
    double = Doubling(TensorMemo(max_entries=3))
    inputs = [torch.full((8,), float(i)) for i in range(5)]
    together = threading.Barrier(4)
    wrong: list[object] = []

    def work(offset: int) -> None:
        together.wait()
        for i in range(200):
            x = inputs[(i // 3 + offset) % len(inputs)].clone()
            if not torch.equal(double(x), 2 * x):
                wrong.append(x)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert double.runs < 4 * 200
    assert len(double.memo._entries) == 3
