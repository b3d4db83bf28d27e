"""What a person may choose of a plan reaches the store; what does not go together is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from engine.checkpoint import Checkpoint
from engine.compile.choices import PlanChoices
from engine.compile.plan import PlanStore
from engine.compile.quantize import int8_transform
from engine.errors import InvalidRequestError, UnsupportedError


class AskedStore:
    """Remembers what it is asked to build."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}

    def build(self, checkpoint: Checkpoint, **asked: Any) -> None:
        self.asked = asked


def asked(checkpoint: Path, **choices: Any) -> dict[str, Any]:
    store = AskedStore()
    PlanChoices(**choices).build(cast(PlanStore, store), Checkpoint.open(checkpoint))
    return store.asked


def test_without_choices_a_store_decides(tiny_checkpoint: Callable[[str], Path]) -> None:
    found = asked(tiny_checkpoint("sd15"))
    assert (found["backend"], found["precision"]) == ("onnxruntime", "fp32")
    assert found["transform"] is None
    assert found["target"] is None


def test_the_dial_of_int8_is_in_the_recipe_and_its_default_is_the_same_plan(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    usual = int8_transform("onnxruntime").recipe
    for dial_db, same in ((30.0, True), (34.5, False)):
        found = asked(tiny_checkpoint("sd15"), precision="int8", min_snr_db=dial_db)
        assert found["transform"].recipe["min_snr_db"] == dial_db
        assert (found["transform"].recipe == usual) == same


def test_engines_are_for_the_gpus_that_were_named(tiny_checkpoint: Callable[[str], Path]) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", exc_type=ImportError)
    found = asked(tiny_checkpoint("sdxl"), backend="tensorrt", capability="8.9")
    assert (found["target"].capability, found["target"].flavour) == ("8.9", "tensorrt_rtx")
    with pytest.raises(UnsupportedError, match=r"7\.2 is not covered: tensorrt covers"):
        asked(tiny_checkpoint("sdxl"), backend="tensorrt", capability="7.2")


@pytest.mark.parametrize(
    ("choices", "field"),
    [
        ({"capability": "8.9"}, "gpu"),
        ({"min_snr_db": 30.0}, "min_snr_db"),
        ({"backend": "tensorrt", "min_snr_db": 30.0}, "min_snr_db"),
    ],
)
def test_what_does_not_go_together_is_refused(choices: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        PlanChoices(**choices)
    assert refused.value.field == field
