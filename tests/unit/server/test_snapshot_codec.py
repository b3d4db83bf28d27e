"""Snapshots as bytes: nothing lost, nothing believed that was changed."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
import torch

from engine.errors import InvalidRequestError
from engine.types import Snapshot, SnapshotGrade
from server.snapshot_codec import Standing, decode_standing, encode_standing

NOTHING = torch.empty(0)


def standing(*, history: int = 1, clean: bool = True) -> Standing:
    generator = torch.Generator().manual_seed(3)
    state = torch.zeros(5, 4, 6, 8)
    state[: 1 + history] = torch.randn((1 + history, 4, 6, 8), generator=generator)
    return Standing(
        seed=2**63 - 1,
        snapshot=Snapshot(
            SnapshotGrade.FULL,
            log_snr=-1.5,
            x=state[0],
            clean=torch.randn((4, 6, 8), generator=generator) if clean else None,
            state=state,
            row=7,
            generator_state=generator.get_state().numpy().tobytes(),
            plan_digest="p" * 64,
            table_digest="t" * 64,
            entered_at=-0.25,
        ),
    )


def without_tensors(snapshot: Snapshot) -> Snapshot:
    return replace(snapshot, x=NOTHING, clean=None, state=None)


@pytest.mark.parametrize("history", [0, 1, 4])
@pytest.mark.parametrize("clean", [True, False])
def test_there_and_back(history: int, clean: bool) -> None:
    before = standing(history=history, clean=clean)
    after = decode_standing(encode_standing(before))
    assert after.seed == before.seed
    was, now = before.snapshot, after.snapshot
    assert was.state is not None
    assert now.state is not None
    assert torch.equal(now.state, was.state)
    assert torch.equal(now.x, was.x)
    if was.clean is None:
        assert now.clean is None
    else:
        assert now.clean is not None
        assert torch.equal(now.clean, was.clean)
    assert without_tensors(now) == without_tensors(was)


def test_empty_history_stays_at_home() -> None:
    plane = 4 * 6 * 8 * 4
    young, old = encode_standing(standing(history=0)), encode_standing(standing(history=4))
    assert len(old) - len(young) == pytest.approx(4 * plane, abs=32)


def test_what_was_changed_or_cut_is_refused() -> None:
    data = encode_standing(standing())
    for place in (8, 40, len(data) // 2, len(data) - 40, len(data) - 1):
        changed = bytearray(data)
        changed[place] ^= 1
        with pytest.raises(InvalidRequestError):
            decode_standing(bytes(changed))
    for end in (0, 3, 10, 60, len(data) - 1):
        with pytest.raises(InvalidRequestError):
            decode_standing(data[:end])


def test_another_version_is_refused_by_number() -> None:
    data = bytearray(encode_standing(standing()))
    struct.pack_into("<H", data, 4, 99)
    with pytest.raises(InvalidRequestError, match="version 99"):
        decode_standing(bytes(data))


def test_only_full_snapshots_travel() -> None:
    partial = Snapshot(SnapshotGrade.STATE, log_snr=0.0, x=torch.zeros(4, 2, 2), clean=None)
    with pytest.raises(InvalidRequestError, match="full"):
        encode_standing(Standing(1, partial))
