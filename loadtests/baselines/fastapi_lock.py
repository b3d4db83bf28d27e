"""Diffusers behind FastAPI with a lock: one request at a time, the others wait.

python -m loadtests.baselines.fastapi_lock --model models/tintype --port 8100 --threads 2
"""

from __future__ import annotations

import threading
from typing import Any

import uvicorn
from fastapi import FastAPI

from loadtests.baselines.common import Body, draw, open_pipeline, options, reply


def main() -> None:
    """Load the model, then listen."""
    chosen = options(__doc__.partition("\n")[0])
    pipeline = open_pipeline(chosen.model, chosen.threads)
    lock = threading.Lock()
    app = FastAPI()

    @app.post("/v1/images/generations")
    def generate(body: Body) -> dict[str, Any]:
        with lock:
            return reply(draw(pipeline, [body])[0])

    @app.get("/health")
    def health() -> str:
        return "ok"

    uvicorn.run(app, host="127.0.0.1", port=chosen.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
