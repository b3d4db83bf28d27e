"""What the README shows, run as it stands but for the address."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image as Pillow

from server.config import ServeConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
ADDRESS = "http://127.0.0.1:8000"
TIMEOUT_S = 300.0


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", blocks("yaml"))
def test_configurations_are_taken(block: str) -> None:
    assert ServeConfig.model_validate(yaml.safe_load(block)).auth_on


def test_links_lead_somewhere() -> None:
    links = set(re.findall(r"\]\(([^)#]+)\)", README)) | set(re.findall(r'src="([^"]+)"', README))
    assert "docs/page.png" in links
    assert {
        link for link in links if not link.startswith("http") and not (ROOT / link).exists()
    } == set()


@pytest.mark.full
@pytest.mark.parametrize("block", blocks("sh"))
def test_commands_work(block: str, served: str, tmp_path: Path) -> None:
    assert ADDRESS in block
    script = f"set -euo pipefail\n{block.replace(ADDRESS, served)}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    for name in re.findall(r"> ([\w-]+\.png)", block):
        with Pillow.open(tmp_path / name) as picture:
            assert picture.size == (128, 128)
    if '"stream": true' in block:
        events = done.stdout.splitlines()
        assert events == ["event: image_generation.partial_image"] * 3 + [
            "event: image_generation.completed"
        ]


@pytest.mark.full
@pytest.mark.parametrize("block", blocks("python"))
def test_programs_work(block: str, served: str) -> None:
    assert ADDRESS in block
    program = f"{block.replace(ADDRESS, served)}\nassert reply.data[0].b64_json"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=TIMEOUT_S)
