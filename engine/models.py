"""Which models an engine serves, and who still uses one: what makes unloading in traffic safe."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from engine.errors import InvalidRequestError, OverloadedError
from engine.model import Model
from engine.rows import Walk


@dataclass(slots=True, eq=False)
class Served:
    """A model under the name that requests call it by. ``users`` are unfinished requests."""

    name: str
    model: Model
    users: int = 0


class ModelTable:
    """Names to models, safe from any thread.

    A request holds its model from :meth:`acquire` to :meth:`release`; a model that is taken out
    gets no new requests, and its network stays in ``walks`` until its last user is gone.

    Attributes:
        walks: the network of each plan by digest; what the step loop reads.
    """

    def __init__(self) -> None:
        self.walks: dict[str, Walk] = {}
        self._served: dict[str, Served] = {}
        self._changed = threading.Condition()

    def add(self, name: str, model: Model) -> None:
        """Serve ``model`` as ``name``.

        Raises:
            InvalidRequestError: the name is taken, or its plan is loaded already.
        """
        with self._changed:
            if name in self._served:
                raise InvalidRequestError(f"{name} is loaded already", field="model")
            self._admit(model)
            self._served[name] = Served(name, model)

    def replace(self, name: str, model: Model) -> Served:
        """Serve ``model`` as ``name`` from now on; returns the old one, which may have users.

        Raises:
            InvalidRequestError: nothing is served as ``name``, or the new plan is loaded already.
        """
        with self._changed:
            old = self._find(name)
            self._admit(model)
            self._served[name] = Served(name, model)
            return old

    def retire(self, name: str, timeout_s: float | None = None) -> Model:
        """Stop serving ``name``, wait for its users, and hand its model back to be closed.

        Raises:
            InvalidRequestError: nothing is served as ``name``.
            OverloadedError: it is still in use after ``timeout_s`` seconds, and served as before.
        """
        with self._changed:
            served = self._find(name)
            del self._served[name]
            if not self._changed.wait_for(lambda: served.users == 0, timeout_s):
                self._served.setdefault(name, served)
                raise OverloadedError(f"{name} still draws {served.users} pictures")
            self._drop(served)
        return served.model

    def finish(self, served: Served, timeout_s: float | None = None) -> Model:
        """Wait for the users of a model that :meth:`replace` took out, and hand it back.

        Raises:
            OverloadedError: it is still in use after ``timeout_s`` seconds; to be asked again.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: served.users == 0, timeout_s):
                raise OverloadedError(f"{served.name} still draws {served.users} pictures")
            self._drop(served)
        return served.model

    def acquire(self, name: str | None) -> Served:
        """Use a model; the only one when ``name`` is left out.

        Raises:
            InvalidRequestError: nothing is served under that name; says what is.
        """
        with self._changed:
            served = self._find(name)
            served.users += 1
            return served

    def release(self, served: Served) -> None:
        """End a use."""
        with self._changed:
            served.users -= 1
            self._changed.notify_all()

    def get(self, name: str | None) -> Model:
        """The model served as ``name``; the only one when it is left out.

        Raises:
            InvalidRequestError: nothing is served under that name; says what is.
        """
        with self._changed:
            return self._find(name).model

    def users(self, name: str) -> int:
        """Unfinished requests of a model.

        Raises:
            InvalidRequestError: nothing is served under that name; says what is.
        """
        with self._changed:
            return self._find(name).users

    @property
    def names(self) -> tuple[str, ...]:
        """Of what is served, in the order of loading."""
        with self._changed:
            return tuple(self._served)

    def clear(self) -> tuple[Model, ...]:
        """Forget every model and return them. Only when nothing runs any more."""
        with self._changed:
            models = tuple(served.model for served in self._served.values())
            self._served.clear()
            self.walks.clear()
            return models

    def _admit(self, model: Model) -> None:
        if model.digest in self.walks:
            raise InvalidRequestError(
                f"plan {model.digest[:12]} of {model.spec.name} is loaded already;"
                " give the loaded model an alias instead",
                field="model",
            )
        self.walks[model.digest] = model.denoiser

    def _drop(self, served: Served) -> None:
        self.walks.pop(served.model.digest, None)

    def _find(self, name: str | None) -> Served:
        if name is None and len(self._served) == 1:
            return next(iter(self._served.values()))
        if name is None or name not in self._served:
            allowed = ", ".join(sorted(self._served)) or "none is loaded"
            raise InvalidRequestError(f"unknown model {name!r}; allowed: {allowed}", field="model")
        return self._served[name]
