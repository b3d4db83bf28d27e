"""Fixtures that more than one test package uses."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from engine.compile.plan import Plan
    from engine.engine import Engine
    from engine.runtime.base import Runtime

# Read at import by the hub client: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"

DEFAULT_MODEL = Path(__file__).parent.parent / "models" / "tintype"


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Tests marked ``anyio`` run on asyncio, as the server does."""
    return "asyncio"


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a family's name to its tiny checkpoint, each written once a session.

    The folders are shared: a test that changes one copies it first.
    """
    from tests.tiny import write_checkpoint

    root = tmp_path_factory.mktemp("checkpoints")

    def path_of(family: str) -> Path:
        folder = root / f"tiny-{family}"
        return folder if folder.exists() else write_checkpoint(family, folder)

    return path_of


@pytest.fixture(scope="session")
def default_model(tiny_checkpoint: Callable[[str], Path]) -> Path:
    """The model that ships with the project; where it is not there, a tiny one of its kind."""
    if (DEFAULT_MODEL / "model_index.json").is_file():
        return DEFAULT_MODEL
    return tiny_checkpoint("text")


@pytest.fixture(scope="session")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that the session's plans are built in, each once."""
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="session")
def tiny_plan(tiny_checkpoint: Callable[[str], Path], plans: Path) -> Callable[[str], Plan]:
    """A function from a family's name to the fp32 ONNX Runtime plan of its tiny checkpoint."""
    from engine.checkpoint import Checkpoint
    from engine.compile.plan import PlanStore

    def plan_of(family: str) -> Plan:
        return PlanStore(plans).build(Checkpoint.open(tiny_checkpoint(family)))

    return plan_of


@pytest.fixture(scope="session")
def cpu_runtime() -> Iterator[Runtime]:
    """ONNX Runtime on one thread."""
    from engine.runtime import open_runtime

    runtime = open_runtime("onnxruntime", threads=1)
    yield runtime
    runtime.close()


@pytest.fixture
def tiny_engine(tiny_plan: Callable[[str], Plan], cpu_runtime: Runtime) -> Iterator[Engine]:
    """A running engine with the tiny checkpoint of the default model's kind."""
    from engine.engine import Engine
    from engine.model import Model

    engine = Engine(device=cpu_runtime.device)
    engine.load(Model.open(tiny_plan("text"), cpu_runtime))
    engine.start()
    yield engine
    engine.close(drain=False)
