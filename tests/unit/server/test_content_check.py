"""Which checks can be configured."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from engine.errors import InvalidRequestError
from server.config import ContentConfig
from server.content_check import load_check


def test_off_by_default() -> None:
    assert load_check(ContentConfig().check) is None


def test_it_is_found_by_its_path() -> None:
    assert load_check("math:floor") is not None


@pytest.mark.parametrize("path", ["no_such_module:check", "math:no_such_name", "math:pi"])
def test_what_cannot_be_called_is_refused_at_start(path: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"content\.check"):
        load_check(path)


@pytest.mark.parametrize("path", ["/etc/passwd", "module", "a:b:c", "import os;os"])
def test_only_dotted_paths_are_configured(path: str) -> None:
    with pytest.raises(ValidationError):
        ContentConfig(check=path)
