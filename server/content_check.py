"""The operator's own check of every picture before it leaves a worker. Off by default.

``content.check: mypackage.safety:check`` in the configuration names a callable like this one::

    def check(picture: CheckedPicture) -> str | None:
        '''None lets the picture go; any text refuses it, and the client is told that text.'''

It is called on a worker's thread, for one picture at a time, and may load a model when it is first
called. A check that raises refuses the picture: nothing leaves unchecked. Previews are not drawn
where a check is configured, since they would show what it has not seen.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

from engine.errors import InvalidRequestError
from engine.types import Image
from server.errors import ContentRefusedError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedPicture:
    """What a check may look at. ``image`` is (height, width, 3) uint8 and must not be changed."""

    image: Image
    prompt: str
    negative_prompt: str
    tenant: str
    model: str
    request_id: str


class ContentCheck(Protocol):
    """The operator's callable."""

    def __call__(self, picture: CheckedPicture, /) -> str | None:
        """None to release the picture, or why not, in words for the client."""
        ...


def load_check(path: str | None) -> ContentCheck | None:
    """Import the callable that ``package.module:name`` names; None for none.

    Raises:
        InvalidRequestError: there is no such module or name, or it cannot be called.
    """
    if path is None:
        return None
    module, _, name = path.partition(":")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InvalidRequestError(
            f"content.check: {path!r} cannot be imported: {error}", field="content.check"
        ) from error
    if not callable(found):
        raise InvalidRequestError(f"content.check: {path!r} is not callable", field="content.check")
    check: ContentCheck = found
    return check


def release(check: ContentCheck | None, picture: CheckedPicture) -> None:
    """Return if the picture may go.

    Raises:
        ContentRefusedError: it may not, or the check failed.
    """
    if check is None:
        return
    try:
        reason = check(picture)
    except Exception as error:
        _log.exception("the content check failed on request %s", picture.request_id)
        raise ContentRefusedError("the picture could not be checked, so it is held back") from error
    if reason is not None:
        raise ContentRefusedError(f"the content check refused this picture: {reason}")
