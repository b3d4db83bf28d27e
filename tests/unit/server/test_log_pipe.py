"""The one stream of log lines, through a real named pipe."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.config import LoggingConfig
from server.log_pipe import LogPipe, log_to

CHILD = """
import logging, pathlib, sys
from server.config import LoggingConfig
from server.log_pipe import log_to
log_to(pathlib.Path(sys.argv[1]), LoggingConfig())
logging.getLogger("server.child").info("from %s", sys.argv[2])
"""


@pytest.fixture(autouse=True)
def _loggers_as_they_were() -> Iterator[None]:
    loggers = [logging.getLogger(n) for n in ("server", "engine", "cache", "asyncio", "uvicorn")]
    before = [(each, each.handlers, each.propagate, each.level) for each in loggers]
    yield
    for each, handlers, propagate, level in before:
        each.handlers, each.propagate = handlers, propagate
        each.setLevel(level)


def test_lines_of_several_processes_come_out_whole_and_the_pipe_goes() -> None:
    out = io.StringIO()
    pipe = LogPipe(out)
    folder = pipe.path.parent
    children = [
        subprocess.Popen([sys.executable, "-c", CHILD, str(pipe.path), name])
        for name in ("one", "two")
    ]
    assert [child.wait(120) for child in children] == [0, 0]
    pipe.close()
    events = [json.loads(line)["event"] for line in out.getvalue().splitlines()]
    assert sorted(events) == ["from one", "from two"]
    assert not folder.exists()


def test_without_a_pipe_it_is_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log_to(tmp_path / "no such pipe" / "log", LoggingConfig())
    logging.getLogger("server.test").warning("still heard")
    assert "still heard" in capsys.readouterr().err
