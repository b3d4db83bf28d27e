"""Which models are served, and that none is taken away from a request that uses it."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import cast

import pytest

from engine.errors import InvalidRequestError, OverloadedError
from engine.model import Model
from engine.models import ModelTable


def model(digest: str) -> Model:
    fake = SimpleNamespace(
        digest=digest, denoiser=object(), spec=SimpleNamespace(name=f"name-of-{digest}")
    )
    return cast(Model, fake)


def test_a_name_and_a_plan_are_served_once() -> None:
    table = ModelTable()
    table.add("a", model("1"))
    with pytest.raises(InvalidRequestError, match="a is loaded already"):
        table.add("a", model("2"))
    with pytest.raises(InvalidRequestError, match="give the loaded model an alias"):
        table.add("b", model("1"))
    assert table.names == ("a",)
    assert set(table.walks) == {"1"}


def test_the_only_model_needs_no_name() -> None:
    table = ModelTable()
    with pytest.raises(InvalidRequestError, match="none is loaded"):
        table.get(None)
    only = model("1")
    table.add("a", only)
    assert table.get(None) is only
    table.add("b", model("2"))
    with pytest.raises(InvalidRequestError, match="allowed: a, b"):
        table.get(None)


def test_taking_one_out_waits_for_its_users() -> None:
    table = ModelTable()
    used = model("1")
    table.add("a", used)
    served = table.acquire("a")
    taken: list[Model] = []
    thread = threading.Thread(target=lambda: taken.append(table.retire("a")))
    thread.start()
    while "a" in table.names:
        thread.join(0.001)
    with pytest.raises(InvalidRequestError):
        table.acquire("a")
    assert not taken
    assert "1" in table.walks
    table.release(served)
    thread.join(10.0)
    assert taken == [used]
    assert table.walks == {}


def test_what_is_still_in_use_stays_as_it_was() -> None:
    table = ModelTable()
    table.add("a", model("1"))
    served = table.acquire("a")
    with pytest.raises(OverloadedError, match="1 pictures"):
        table.retire("a", timeout_s=0.0)
    table.release(served)
    table.release(table.acquire("a"))
    assert table.users("a") == 0


def test_a_new_model_takes_the_name_at_once() -> None:
    table = ModelTable()
    old, new = model("1"), model("2")
    table.add("a", old)
    served = table.acquire("a")
    replaced = table.replace("a", new)
    assert table.get("a") is new
    assert set(table.walks) == {"1", "2"}
    with pytest.raises(OverloadedError):
        table.finish(replaced, timeout_s=0.0)
    table.release(served)
    assert table.finish(replaced, timeout_s=0.0) is old
    assert set(table.walks) == {"2"}
