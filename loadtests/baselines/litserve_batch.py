"""Diffusers behind LitServe with its dynamic batching: requests that come together share a run.

python -m loadtests.baselines.litserve_batch --model models/tintype \
    --port 8101 --threads 2
"""

# No `from __future__ import annotations` here: LitServe reads the annotations as they stand.
from pathlib import Path
from typing import Any

import litserve

from loadtests.baselines.common import Body, draw, open_pipeline, options, reply

REQUEST_TIMEOUT_S = 600.0
"""LitServe's default of 30 s would turn overload into errors instead of waiting."""


class Pictures(litserve.LitAPI):  # type: ignore[misc] # untyped package
    """The model as LitServe wants it; it stacks decoded requests into lists by itself."""

    def __init__(self, folder: Path, threads: int, **batching: Any) -> None:
        super().__init__(api_path="/v1/images/generations", **batching)
        self._folder = folder
        self._threads = threads

    def setup(self, device: str) -> None:  # noqa: ARG002
        self._pipeline = open_pipeline(self._folder, self._threads)

    def decode_request(self, request: Body) -> Body:
        return request

    def batch(self, inputs: list[Body]) -> list[Body]:
        return inputs

    def predict(self, bodies: list[Body]) -> list[str]:
        # A Diffusers call has one number of steps and one guidance for all.
        drawn: dict[int, str] = {}
        for kind in {(body.steps, body.guidance) for body in bodies}:
            chosen = [i for i, body in enumerate(bodies) if (body.steps, body.guidance) == kind]
            drawn |= zip(chosen, draw(self._pipeline, [bodies[i] for i in chosen]), strict=True)
        return [drawn[i] for i in range(len(bodies))]

    def unbatch(self, output: list[str]) -> list[str]:
        return output

    def encode_response(self, output: str) -> dict[str, Any]:
        return reply(output)


def main() -> None:
    """Start the server; the model is loaded in a worker process of its own."""
    chosen = options(__doc__.partition("\n")[0])
    api = Pictures(
        chosen.model,
        chosen.threads,
        max_batch_size=chosen.max_batch,
        batch_timeout=chosen.batch_timeout_s,
    )
    server = litserve.LitServer(api, accelerator="cpu", timeout=REQUEST_TIMEOUT_S)
    server.run(host="127.0.0.1", port=chosen.port, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
