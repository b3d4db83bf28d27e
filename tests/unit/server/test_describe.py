"""What ``darkroom inspect`` prints of an int8 plan."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from engine.compile import quantize
from server.describe import INT8_TABLE, describe_plan, describe_solver

FOUND = {
    "snr_db": 31.04,
    "int8_share_of_macs": 0.75,
    "segments": {"down.0": 41.6, "mid": 200.0},
    "steps": [{"timestep": float(t), "snr_db": 20.0 + t / 100} for t in range(999, 0, -37)],
    "groups": [
        {
            "segment": segment,
            "nodes": [name],
            "weights": [f"module.body.{name}"],
            "macs": macs,
            "saved": 1,
            "snr_db": snr_db,
            "int8": int8,
        }
        for segment, name, macs, snr_db, int8 in (
            ("down.0", "conv1", 300, 50.0, True),
            ("down.0", "conv2", 100, 34.3, False),
            ("mid", "conv3", 100, 60.0, False),
        )
    ],
}


def manifest(**files: str) -> Any:
    latent = SimpleNamespace(channels=4, factor_px=4, native_px=64)
    return cast(
        Any,
        SimpleNamespace(
            model=SimpleNamespace(
                name="tiny",
                latent=latent,
                scheduler_config={"_class_name": "LMSDiscreteScheduler"},
            ),
            backend="onnxruntime",
            precision="int8",
            digest="d" * 64,
            versions={},
            unet=(),
            adapter_sites=(),
            files=files,
        ),
    )


def described(folder: Path, **files: str) -> str:
    console = Console(width=120, record=True, file=(folder / "out").open("w"))
    describe_plan(console, manifest(**files), folder)
    console.file.close()
    return console.export_text()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / INT8_TABLE).write_text(json.dumps(FOUND))
    return tmp_path


def rows_of(said: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in said.splitlines()
        if "│" in line
    ]


def test_an_int8_plan_says_what_it_costs_and_where(folder: Path) -> None:
    said = described(folder, **{INT8_TABLE: "sha"})
    assert "75 % of the multiplications, 1 of 3 groups" in said
    assert "31.0 dB" in said
    rows = rows_of(said)
    assert ["down.0", "1 of 2", "75 %", "41.6 dB"] in rows
    assert ["mid", "0 of 1", "0 %", ""] in rows
    assert ["conv2", "down.0", "34.3 dB", "float"] in rows
    first = next(row for row in rows if row[0].startswith("999 to"))
    assert first[1].endswith("dB")
    assert len([row for row in rows if " to " in row[0]]) == 8


def test_a_float_plan_has_no_such_table(folder: Path) -> None:
    assert "int8" not in described(folder).replace("onnxruntime int8", "")


def test_it_reads_the_file_that_quantization_writes() -> None:
    assert INT8_TABLE == quantize.TABLE


def test_a_solver_that_stands_in_for_the_checkpoints_own_is_told(tmp_path: Path) -> None:
    told = described(tmp_path)
    assert "solver dpmpp_2m in place of LMSDiscreteScheduler: another linear multistep" in told
    assert describe_solver({"_class_name": "EulerDiscreteScheduler"}) == (
        "euler (EulerDiscreteScheduler)"
    )
