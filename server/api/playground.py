"""The page at ``/``: a handful of static files, read once and served compressed.

No template and no build step; what the page knows about models it asks ``/v1/models``.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from typing import get_args

from fastapi import APIRouter, Request, Response

from server.errors import NotFoundError
from server.schemas.base import SolverName
from server.services import Services

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "json": "application/json",
    "svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """A file as it goes over the wire."""

    media_type: str
    data: bytes
    packed: bytes
    """The same, compressed with gzip."""
    etag: str

    @classmethod
    def of(cls, name: str, data: bytes) -> Asset:
        """Compress ``data``, and name it by its content."""
        return cls(
            media_type=_TYPES[name.rpartition(".")[2]],
            data=data,
            packed=gzip.compress(data, mtime=0),
            etag=f'"{hashlib.sha256(data).hexdigest()[:32]}"',
        )

    def reply(self, request: Request) -> Response:
        """The file, or 304 where the browser has it: it asks each time, so updates show at once."""
        headers = {
            "cache-control": "no-cache",
            "etag": self.etag,
            "vary": "accept-encoding",
        }
        # Proxies that compress mark the tag as weak.
        known = request.headers.get("if-none-match", "").replace("W/", "")
        if self.etag in (tag.strip() for tag in known.split(",")):
            return Response(status_code=304, headers=headers)
        if _takes_gzip(request.headers.get("accept-encoding", "")):
            headers["content-encoding"] = "gzip"
            return Response(self.packed, media_type=self.media_type, headers=headers)
        return Response(self.data, media_type=self.media_type, headers=headers)


def _takes_gzip(accepted: str) -> bool:
    for part in accepted.split(","):
        name, _, quality = part.replace(" ", "").lower().partition(";q=")
        if name == "gzip":
            return quality.strip("0.") != "" or quality == ""
    return False


def read_assets() -> dict[str, Asset]:
    """Every file of the page by its name, and the solvers that its menu offers."""
    folder = resources.files("server").joinpath("playground")
    files = {
        entry.name: entry.read_bytes()
        for entry in folder.iterdir()
        if entry.name.rpartition(".")[2] in _TYPES
    }
    files["solvers.json"] = json.dumps(get_args(SolverName)).encode()
    return {name: Asset.of(name, data) for name, data in files.items()}


def routes(_services: Services | None = None) -> APIRouter:
    """The page and its files. They hold nothing secret, so they need no key, and no services."""
    router = APIRouter(include_in_schema=False)
    assets = read_assets()

    @router.get("/")
    async def page(request: Request) -> Response:
        return assets["index.html"].reply(request)

    @router.get("/playground/{name}")
    async def asset(name: str, request: Request) -> Response:
        if name not in assets:
            raise NotFoundError("the page has no such file")
        return assets[name].reply(request)

    return router
