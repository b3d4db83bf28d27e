"""What is offered instead of a refusal, and what the picture then says of it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from engine.errors import OverloadedError
from engine.types import GenerateRequest
from server.ladder import Admitted, admitted, drawing
from server.messages import Drawn, ModelInfo, PictureTask
from server.orders import Order
from tests.unit.server.scripted import MODEL, ScriptedDispatcher

LCM = replace(MODEL, solver_default="lcm", guidance_default=1.0)


@dataclass
class Crowded(ScriptedDispatcher):
    """Has room for requests of so many UNet rows a picture, and notes every task it is offered."""

    room_rows: int = 0
    model: ModelInfo = MODEL
    asked: list[PictureTask] = field(default_factory=list)

    def draw(self, tasks: Any) -> Any:
        self.asked.append(tasks[0])
        full = self.model.rows(tasks[0].request) > self.room_rows
        self.refusal = OverloadedError("full", retry_after_s=3.0) if full else None
        return super().draw(tasks)


def order(model: ModelInfo, count: int = 1, **request: Any) -> Order:
    tasks = tuple(
        PictureTask(
            id=f"t.{i}",
            request_id="r",
            tenant="a",
            model=model.id,
            index=i,
            request=GenerateRequest(prompt="a red umbrella", seed=7 + i, **request),
        )
        for i in range(count)
    )
    return Order(model=model, tasks=tasks, width_px=64, height_px=64)


def offers(model: ModelInfo, **request: Any) -> list[tuple[int, str | None]]:
    """(steps, solver) of everything that is offered where nothing is taken."""
    crowded = Crowded(model=model)
    with pytest.raises(OverloadedError):
        asyncio.run(admitted(crowded, order(model, **request), degrade=True))
    return [(task.request.steps, task.request.solver) for task in crowded.asked]


def drawn(crowded: Crowded, asked: Order) -> tuple[Admitted, list[Drawn]]:
    async def draw() -> tuple[Admitted, list[Drawn]]:
        async with drawing(crowded, asked, degrade=True) as found:
            return found, await found.pictures()

    return asyncio.run(draw())


def test_a_distilled_model_takes_its_own_solver_where_another_was_asked_for() -> None:
    asked = order(LCM, 2, steps=30, solver="dpmpp_2m", schedule="karras", guidance=7.0, eta=0.5)
    crowded = Crowded(model=LCM, room_rows=6)
    found, pictures = drawn(crowded, asked)
    assert [task.request.steps for task in crowded.asked] == [30, 6]
    assert [(p.steps, p.solver, p.seed) for p in pictures] == [(6, "lcm", 7), (6, "lcm", 8)]
    expected = "6 lcm steps instead of 30 dpmpp_2m steps"
    assert {p.approximations["degraded"] for p in pictures} == {expected}
    request = found.order.tasks[1].request
    assert (request.schedule, request.guidance, request.eta) == (None, None, None)
    assert found.order.rows == 12


def test_below_its_own_solver_it_goes_on_with_fewer_of_its_steps() -> None:
    assert offers(LCM, steps=60, solver="ddim") == [
        (60, "ddim"),
        (12, "lcm"),
        (9, "lcm"),
        (6, "lcm"),
        (4, "lcm"),
    ]


@pytest.mark.parametrize(
    ("model", "request_"),
    [
        (MODEL, {"solver": "ddim"}),  # not distilled: few steps of lcm would draw noise
        (LCM, {"solver": "tcd"}),
        (LCM, {}),
    ],
    ids=["not distilled", "another few-step solver", "its own"],
)
def test_the_solver_stays_where_that_is_no_gain(model: ModelInfo, request_: dict[str, Any]) -> None:
    solver = request_.get("solver")
    assert offers(model, steps=16, **request_) == [
        (16, solver),
        (12, solver),
        (8, solver),
        (4, solver),
    ]


def test_a_few_steps_of_another_solver_stay_as_they_are() -> None:
    assert offers(LCM, steps=4, solver="ddim") == [(4, "ddim")]


def test_every_rung_is_a_new_task_that_says_what_it_spares() -> None:
    crowded = Crowded(room_rows=20)
    _, [picture] = drawn(crowded, order(MODEL, steps=20))
    assert picture.approximations["degraded"] == "10 of 20 steps"
    assert len({task.id for task in crowded.asked}) == 3
    # Two rows a step with guidance, at native size.
    assert [task.spared_steps for task in crowded.asked] == [0, 10, 20]


def test_what_is_taken_as_it_was_asked_for_names_nothing() -> None:
    _, [picture] = drawn(Crowded(model=LCM, room_rows=100), order(LCM, steps=20, solver="ddim"))
    assert "degraded" not in picture.approximations
    assert (picture.steps, picture.solver) == (20, "ddim")
