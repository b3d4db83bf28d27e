"""Compile every configured model, in a process that ends and takes exporter and torch with it.

``python -m server.precompile`` reads a :class:`ServeConfig` as JSON from standard input and writes
a line of JSON for everything that happens. :func:`precompile` is the other end of that pipe.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

from engine.errors import DarkroomError
from server.config import ServeConfig
from server.errors import StartError

OnProgress = Callable[[str, str, int, int], None]
"""Told (model id, stage, done, total)."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """A model's plan is there."""

    model: str
    digest: str


def precompile(config: ServeConfig, on_progress: OnProgress) -> list[Compiled]:
    """The plans of all configured models, built where they are not there yet.

    Raises:
        StartError: one of them cannot be compiled; says which and why.
    """
    compiled: list[Compiled] = []
    with subprocess.Popen(
        [sys.executable, "-m", "server.precompile"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(config.model_dump_json())
            process.stdin.close()
            for line in process.stdout:
                said = json.loads(line)
                if "error" in said:
                    raise StartError(f"{said['model']}: {said['error']}")
                if "digest" in said:
                    compiled.append(Compiled(said["model"], said["digest"]))
                else:
                    on_progress(said["model"], said["stage"], said["done"], said["total"])
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise StartError(f"compiling failed with status {process.returncode}")
    return compiled


def main() -> None:
    """The process at the other end."""
    from server.settings import Settings
    from server.worker_models import ModelHost

    config = ServeConfig.model_validate_json(sys.stdin.read())
    host = ModelHost(config, Settings.from_environment())

    def progress(model: str, stage: str, done: int, total: int) -> None:
        _say(model=model, stage=stage, done=done, total=total)

    for model in config.models:
        try:
            plan = host.plan(model, progress)
        except DarkroomError as error:
            _say(model=model.id, error=f"{type(error).__name__}: {error}")
            return
        _say(model=model.id, digest=plan.digest)


def _say(**fields: str | int) -> None:
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    main()
