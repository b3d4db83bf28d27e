"""Several models in a budget of memory: opened when asked for, closed when others need the room."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from engine.errors import ClosedError, InvalidRequestError
from engine.ports import Clock, SystemClock
from server.memory import Entry, missing_bytes, patience_s, victim

_log = logging.getLogger(__name__)


class ModelShelf:
    """Keeps the models that are in use open, within a budget.

    Requests for a model that is closed wait until it is open; requests for others go on. The least
    recently used idle model makes room. Where none is idle for long, the least recently used one
    gets no new requests, finishes those that it has, and makes room then: nothing starves.

    One thread opens and closes, so two moves never overlap. Every method may be called from any
    thread.

    Args:
        open_model: opens a model and returns the bytes that it takes; may take long.
        close_model: closes a model, which nobody uses any more.
        patience_s: least time for which a model in use is left alone.
    """

    def __init__(
        self,
        budget_bytes: int,
        *,
        open_model: Callable[[str], int],
        close_model: Callable[[str], None],
        clock: Clock | None = None,
        patience_s: float = 10.0,
    ) -> None:
        self.budget_bytes = budget_bytes
        self._open_model = open_model
        self._close_model = close_model
        self._clock = clock or SystemClock()
        self._patience_s = patience_s
        self._entries: dict[str, Entry] = {}
        self._waiting: dict[str, deque[tuple[float, Future[None]]]] = {}
        self._jobs: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="darkroom-shelf", daemon=True)

    # ------------------------------------------------------------------ from any thread

    def start(self) -> None:
        """Begin to open and close."""
        self._thread.start()

    def add(self, name: str, size_bytes: int) -> None:
        """Make a model known; it stays closed until it is asked for.

        Args:
            size_bytes: that it will take, as far as can be said.
        """
        with self._changed:
            self._entries[name] = Entry(name, size_bytes, used_at_s=self._clock.now_s())

    def acquire(self, name: str) -> Future[None]:
        """Ask for a model; done when it is open. To be given back by :meth:`release`.

        A future that is still pending may be cancelled instead; then there is nothing to release.
        It fails with what kept the model from being opened.

        Raises:
            InvalidRequestError: there is no such model.
            ClosedError: the shelf is closing.
        """
        future: Future[None] = Future()
        with self._changed:
            if self._closing:
                raise ClosedError("the worker is closing and opens no more models")
            if name not in self._entries or self._entries[name].leaving:
                allowed = ", ".join(n for n, entry in self._entries.items() if not entry.leaving)
                raise InvalidRequestError(
                    f"unknown model {name!r}; allowed: {allowed}", field="model"
                )
            now_s = self._clock.now_s()
            self._waiting.setdefault(name, deque()).append((now_s, future))
            if self._entries[name].open:
                self._serve(self._entries[name])
            self._changed.notify_all()
        return future

    def release(self, name: str) -> None:
        """End a use."""
        with self._changed:
            entry = self._entries[name]
            entry.users -= 1
            entry.used_at_s = self._clock.now_s()
            self._changed.notify_all()

    def between_moves(self, job: Callable[[], None]) -> Future[None]:
        """Run ``job`` on the shelf's thread, while nothing is opened or closed."""
        future: Future[None] = Future()
        with self._changed:
            if self._closing:
                raise ClosedError("the worker is closing")
            self._jobs.append((job, future))
            self._changed.notify_all()
        return future

    def remove(self, name: str) -> Future[None]:
        """Forget a model: no new uses; done when those that it has are over and it is closed.

        Raises:
            InvalidRequestError: there is no such model.
        """

        def close_for_good() -> None:
            self._close_unused(self._entries[name])
            with self._changed:
                del self._entries[name]

        with self._changed:
            if name not in self._entries or self._entries[name].leaving:
                raise InvalidRequestError(f"unknown model {name!r}", field="model")
            self._entries[name].leaving = True
            self._fail(name, InvalidRequestError(f"{name} was removed", field="model"))
        return self.between_moves(close_for_good)

    def resize(self, name: str, size_bytes: int) -> None:
        """Correct what a model takes."""
        with self._changed:
            self._entries[name].size_bytes = size_bytes
            self._changed.notify_all()

    def is_open(self, name: str) -> bool:
        """Whether a model is open now."""
        with self._changed:
            return name in self._entries and self._entries[name].open

    @property
    def open_bytes(self) -> int:
        """Bytes of what is open."""
        with self._changed:
            return sum(entry.size_bytes for entry in self._entries.values() if entry.open)

    def close(self) -> None:
        """Stop moving; who still waits fails. Open models stay open, for their owner to close."""
        with self._changed:
            self._closing = True
            for name in list(self._waiting):
                self._fail(name, ClosedError("the worker is closing"))
            for _, future in self._jobs:
                future.cancel()
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    # ------------------------------------------------------------------ on the shelf's thread

    def _run(self) -> None:
        while (move := self._next_move()) is not None:
            move()

    def _next_move(self) -> Callable[[], None] | None:
        """Wait until there is something to do; None when the shelf closes."""
        with self._changed:
            while not self._closing:
                if self._jobs:
                    job, future = self._jobs.popleft()
                    return lambda: _carry_out(job, future)
                wanted = self._longest_waiting()
                if wanted is None:
                    self._changed.wait()
                    continue
                since_s, entry = wanted
                lacking = missing_bytes(self._entries.values(), entry, self.budget_bytes)
                waited_s = self._clock.now_s() - since_s
                left_s = patience_s(entry, self._patience_s) - waited_s
                room_from = victim(self._entries.values(), may_push=left_s <= 0)
                if lacking <= 0 or not any(other.open for other in self._entries.values()):
                    return lambda: self._open(entry)
                if room_from is not None:
                    return lambda: self._close_unused(room_from)
                self._changed.wait(left_s)
        return None

    def _longest_waiting(self) -> tuple[float, Entry] | None:
        for name in list(self._waiting):
            waiting = self._waiting[name]
            while waiting and waiting[0][1].cancelled():
                waiting.popleft()
            if not waiting:
                del self._waiting[name]
        if not self._waiting:
            return None
        name = min(self._waiting, key=lambda name: self._waiting[name][0][0])
        return self._waiting[name][0][0], self._entries[name]

    def _open(self, entry: Entry) -> None:
        began_s = self._clock.now_s()
        try:
            size_bytes = self._open_model(entry.name)
        except Exception as error:
            _log.exception("model %s cannot be opened", entry.name)
            with self._changed:
                self._fail(entry.name, error)
            return
        with self._changed:
            entry.open = True
            entry.size_bytes = size_bytes
            entry.opening_s = self._clock.now_s() - began_s
            entry.used_at_s = self._clock.now_s()
            self._serve(entry)

    def _close_unused(self, entry: Entry) -> None:
        """Give a model no new uses, wait for the end of those that it has, and close it."""
        with self._changed:
            was_open, entry.open = entry.open, False
            self._changed.wait_for(lambda: entry.users == 0 or self._closing)
            if not was_open or self._closing:
                return
        try:
            self._close_model(entry.name)
        except Exception:
            _log.exception("model %s was not closed cleanly", entry.name)

    # ------------------------------------------------------------------ with the lock held

    def _serve(self, entry: Entry) -> None:
        """Let everybody who waits for an open model use it."""
        for _, future in self._waiting.pop(entry.name, ()):
            if future.set_running_or_notify_cancel():
                entry.users += 1
                entry.used_at_s = self._clock.now_s()
                future.set_result(None)

    def _fail(self, name: str, error: Exception) -> None:
        for _, future in self._waiting.pop(name, ()):
            if future.set_running_or_notify_cancel():
                future.set_exception(error)


def _carry_out(job: Callable[[], None], future: Future[None]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        job()
    except Exception as error:
        future.set_exception(error)
    else:
        future.set_result(None)
