"""A checkpoint whose scheduler is not served, drawn by another solver; and nobody is misled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from engine.checkpoint import Checkpoint
from engine.compile.plan import PlanStore
from engine.engine import Engine
from engine.model import Model
from engine.runtime import open_runtime
from engine.types import GenerateRequest
from server.api.models import reply_of
from server.cli import app
from server.config import ModelConfig
from server.worker_models import describe

SUBSTITUTION = "LMSDiscrete as dpmpp_2m"


@pytest.fixture
def lms(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    return with_scheduler(tiny_checkpoint("text"), tmp_path / "models/lms", "LMSDiscreteScheduler")


def with_scheduler(checkpoint: Path, folder: Path, name: str) -> Path:
    shutil.copytree(checkpoint, folder)
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": name}))
    return folder


def test_the_reply_names_the_solver_that_stood_in_unless_it_was_asked_for(
    lms: Path, tmp_path: Path
) -> None:
    runtime = open_runtime("torch", threads=torch.get_num_threads())
    engine = Engine(device=runtime.device)
    plan = PlanStore(tmp_path / "plans").build(Checkpoint.open(lms), backend="torch")
    engine.load(Model.open(plan, runtime))
    engine.start()
    plain = engine.generate(GenerateRequest(prompt="a red umbrella", steps=3, seed=1))
    named = engine.generate(
        GenerateRequest(prompt="a red umbrella", steps=3, seed=1, solver="dpmpp_2m")
    )
    engine.close()
    runtime.close()
    assert plain.solver == named.solver == "dpmpp_2m"
    assert plain.approximations == {"scheduler": SUBSTITUTION}
    assert named.approximations == {}
    # Whoever lists the models reads the same before drawing.
    listed = reply_of(describe(ModelConfig(id="lms"), plan), aliases=(), default=True).darkroom
    assert listed.scheduler_stand_in == SUBSTITUTION
    assert listed.scheduler_class == "LMSDiscreteScheduler"
    assert listed.scheduler_note.startswith("another linear multistep solver")
    assert listed.solver_default == plain.solver


def test_the_command_names_it_and_refuses_what_has_no_substitute(
    lms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_scheduler(lms, lms.with_name("edm"), "EDMEulerScheduler")
    monkeypatch.setenv("DARKROOM_MODELS", str(lms.parent))
    monkeypatch.setenv("DARKROOM_HOME", str(lms.parent / "home"))
    # A console keeps the width that it finds when its module is imported, by whichever test.
    monkeypatch.setattr("server.models_cli._out", Console(width=400))
    found = CliRunner().invoke(app, ["models"])
    rows = {line.split()[1]: line for line in found.output.splitlines() if "│" in line}
    assert "dpmpp_2m in place of LMSDiscreteScheduler" in rows["lms"]
    assert "no: scheduler/scheduler_config.json: _class_name='EDMEulerScheduler'" in rows["edm"]
    inspected = CliRunner().invoke(app, ["inspect", "lms"])
    told = json.loads(inspected.output)["solver"]
    assert told.startswith("dpmpp_2m in place of LMSDiscreteScheduler: ")
    refused = CliRunner().invoke(app, ["compile", "edm"])
    assert refused.exit_code != 0
    assert not (lms.parent / "home/plans").exists()  # refused before anything was compiled
