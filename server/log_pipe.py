"""One stream of log lines for all processes of one machine.

Ray would show a replica's lines with a coloured prefix each, which no JSON reader takes. So whoever
starts the application makes a named pipe, the replicas write to it, and a thread copies it out.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, TextIO

from server.config import LoggingConfig
from server.request_log import configure_logging

_READ_BYTES = 1 << 16
_LIBRARIES = ("asyncio", "uvicorn")
"""What they have to say is in their own files otherwise, where nobody looks."""


class LogPipe:
    """The reading end. :meth:`close` copies what is still in it and removes the pipe."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stderr
        self._folder = tempfile.TemporaryDirectory(prefix="darkroom-")
        self.path = Path(self._folder.name) / "log"
        os.mkfifo(self.path, mode=0o600)
        # For writing too: without a writer of our own, the last replica's end would be the pipe's.
        self._descriptor = os.open(self.path, os.O_RDWR)
        self._copying = threading.Thread(target=self._copy, name="darkroom-log", daemon=True)
        self._copying.start()

    def close(self) -> None:
        """End after the last line."""
        os.write(self._descriptor, _END)
        self._copying.join()
        os.close(self._descriptor)
        self._folder.cleanup()

    def _copy(self) -> None:
        while not (read := os.read(self._descriptor, _READ_BYTES)).endswith(_END):
            self._write(read)
        self._write(read.removesuffix(_END))

    def _write(self, lines: bytes) -> None:
        self._out.write(lines.decode(errors="replace"))
        self._out.flush()


_END = b"\x04"


def log_to(pipe: Path | None, config: LoggingConfig) -> None:
    """Send this process's log lines to ``pipe``, or to standard error where there is none."""
    stream: IO[str] | None = None
    if pipe is not None:
        try:
            stream = pipe.open("w", buffering=1, encoding="utf-8")
        except OSError:
            logging.getLogger(__name__).warning("no log pipe at %s; using standard error", pipe)
    configure_logging(config, stream)
    ours = logging.getLogger("server")
    for name in _LIBRARIES:
        library = logging.getLogger(name)
        library.handlers = ours.handlers
        library.propagate = False
        library.setLevel(logging.WARNING)
