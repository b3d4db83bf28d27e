"""A start that fails is one line that says why, and a status; nothing of it stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.served import darkroom_serve

pytestmark = pytest.mark.full


def test_a_worker_that_cannot_get_warm_is_a_failed_start(
    tiny_checkpoint: Callable[[str], Path], plans: Path, tmp_path: Path
) -> None:
    content = {"check": "nowhere.to.be_found:check"}
    with (
        pytest.raises(RuntimeError, match="did not come up") as failed,
        darkroom_serve(tiny_checkpoint("text"), plans, tmp_path / "home", content=content),
    ):
        pass
    said = str(failed.value)
    assert "StartError: InvalidRequestError: content.check" in said
    assert "Traceback" not in said
    left = [p for p in psutil.Process().children(recursive=True) if "ray" in " ".join(p.cmdline())]
    assert left == []
