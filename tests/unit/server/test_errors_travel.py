"""Errors cross processes: each must come out of a pickle as it went in."""

from __future__ import annotations

import copy
import pickle

import pytest

from engine.errors import DarkroomError, InvalidRequestError, LimitExceededError, OverloadedError
from server.errors import (
    DeadlineTooShortError,
    NoRoomError,
    RateLimitedError,
    UnprocessableError,
)


@pytest.mark.parametrize(
    "error",
    [
        DarkroomError("plain"),
        InvalidRequestError("wrong", field="steps"),
        LimitExceededError("too many", field="steps", limit=150),
        OverloadedError("full", retry_after_s=2.5),
        NoRoomError("full", bound="tenant", retry_after_s=2.5),
        RateLimitedError("slow down", retry_after_s=1.0),
        DeadlineTooShortError("too late", retry_after_s=3.0),
        UnprocessableError("odd size", field="size"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_survives_a_pickle(error: DarkroomError) -> None:
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is type(error)
        assert str(twin) == str(error)
        assert vars(twin) == vars(error)
