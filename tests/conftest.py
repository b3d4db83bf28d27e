"""Fixtures that more than one test package uses."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

# Read at import by the hub client: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"

DEFAULT_MODEL = Path(__file__).parent.parent / "models" / "tintype"


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
