"""Every shell block of the README that calls curl, run as it stands but for the address."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image as Pillow

pytestmark = pytest.mark.full
README = Path(__file__).parents[2] / "README.md"
ADDRESS = "http://127.0.0.1:8000"
BLOCKS = [
    block
    for block in re.findall(r"```sh\n(.*?)```", README.read_text(), re.DOTALL)
    if "curl" in block
]
TIMEOUT_S = 300.0


def test_there_are_some() -> None:
    assert BLOCKS
    assert all(ADDRESS in block for block in BLOCKS)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_it_works_as_it_is_written(block: str, served: str, tmp_path: Path) -> None:
    script = f"set -euo pipefail\n{block.replace(ADDRESS, served)}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    assert '"error"' not in done.stdout
    for name in re.findall(r"[\w-]+\.(?:png|jpeg|webp)", block):
        with Pillow.open(tmp_path / name) as picture:
            assert picture.size >= (96, 96)
