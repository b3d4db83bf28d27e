"""The files of deploy/, for the tests that hold them against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"


def documents(path: Path) -> list[Any]:
    """Every document of a YAML file that is not empty."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def alerts() -> list[dict[str, Any]]:
    """Every alert of Prometheus' rules."""
    groups = documents(DEPLOY / "prometheus" / "rules" / "alerts.yml")[0]["groups"]
    return [rule for group in groups for rule in group["rules"]]
