"""Every error that the engine raises on purpose, in one tree.

::

    DarkroomError
    ├── InvalidRequestError      the caller asked for something that can never work      (HTTP 400)
    │   └── LimitExceededError   it would work, but a configured bound forbids it        (HTTP 400)
    ├── UnsupportedError         a part or combination that Darkroom does not serve      (HTTP 422)
    ├── CheckpointError          a model folder cannot be used
    │   ├── UnsafeCheckpointError    it holds pickled weights
    │   └── CorruptCheckpointError   truncated, tampered with, or inconsistent
    ├── PlanError                a compiled plan cannot be built or loaded
    │   ├── PlanCorruptError     its files do not match its digest
    │   └── PlanStorageError     it could not be written (disk full, permissions)
    ├── BackendUnavailableError  the runtime or device asked for is not usable here
    ├── ExecutionError           a graph failed, or produced NaN, for one trajectory      (HTTP 500)
    │   └── OutOfMemoryError     the device's memory is too small for it                  (HTTP 500)
    ├── CancelledError           the trajectory was cancelled                             (HTTP 499)
    ├── DeadlineExceededError    its deadline passed before it finished                   (HTTP 504)
    ├── OverloadedError          a bounded queue is full                                  (HTTP 429)
    └── ClosedError              the engine is closing and takes no more work             (HTTP 503)

The HTTP column is a hint for :mod:`server.errors`, which owns the mapping. Messages say what was
wrong and what is allowed; they never contain a prompt.
"""

from __future__ import annotations

from typing import Any


class DarkroomError(Exception):
    """Base of every error raised on purpose. Errors travel between processes: they pickle."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own would call the constructor without its keyword-only arguments.
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(
    kind: type[DarkroomError], args: tuple[Any, ...], state: dict[str, Any]
) -> DarkroomError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class InvalidRequestError(DarkroomError):
    """The request can never work as it stands; ``field`` names the offending parameter."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class LimitExceededError(InvalidRequestError):
    """The request passes a configured bound; ``limit`` is that bound, in the field's own unit."""

    def __init__(self, message: str, *, field: str | None = None, limit: float | int) -> None:
        super().__init__(message, field=field)
        self.limit = limit


class UnsupportedError(DarkroomError):
    """A known feature, or combination of features, that Darkroom does not serve."""


class CheckpointError(DarkroomError):
    """A model folder cannot be used; the message names the file and the reason."""


class UnsafeCheckpointError(CheckpointError):
    """The folder holds pickled weights, which can run code when loaded."""


class CorruptCheckpointError(CheckpointError):
    """A file is truncated, was tampered with, or contradicts its config."""


class PlanError(DarkroomError):
    """A compiled plan cannot be built or loaded."""


class PlanCorruptError(PlanError):
    """The files of a plan do not match the hashes in its manifest."""


class PlanStorageError(PlanError):
    """A plan could not be written: disk full, read-only, or no permission."""


class BackendUnavailableError(DarkroomError):
    """The requested runtime or device is not usable on this machine."""


class ExecutionError(DarkroomError):
    """Running a graph failed, or gave a non-finite result, for one trajectory."""


class OutOfMemoryError(ExecutionError):
    """The device has no memory left for a batch; a smaller one may succeed."""


class CancelledError(DarkroomError):
    """The trajectory was cancelled by its owner."""


class DeadlineExceededError(DarkroomError):
    """The trajectory's deadline passed before its last step."""


class OverloadedError(DarkroomError):
    """A bounded queue is full; try again after ``retry_after_s`` seconds."""

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ClosedError(DarkroomError):
    """The engine is closing, or closed, and takes no more work."""
