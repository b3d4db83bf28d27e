"""The page's files: whole, self-contained, and served so that browsers keep what they have."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
from html.parser import HTMLParser
from typing import get_args

import httpx
import pytest
from fastapi import FastAPI

from server.api import playground
from server.schemas.base import SolverName

ASSETS = playground.read_assets()
SCRIPTS = sorted(name for name in ASSETS if name.endswith(".js"))


class Page(HTMLParser):
    """What the checks need to know of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.linked: set[str] = set()
        self.ids: list[str] = []
        self.refers_to: set[str] = set()
        self.inline: list[str] = []
        self.unlabelled: set[str] = set()
        self.labelled: set[str] = set()
        self._open: str | None = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self._open = tag
        self.inline += [name for name in given if name.startswith("on") or name == "style"]
        self.linked |= {given[name] for name in ("src", "href") if name in given}
        if "id" in given:
            self.ids.append(given["id"])
        for name in ("for", "aria-controls", "aria-describedby", "aria-labelledby"):
            self.refers_to |= set(given.get(name, "").split())
        if tag == "label":
            self.labelled.add(given["for"])
        if tag in ("input", "select", "textarea"):
            self.unlabelled.add(given["id"])

    def handle_data(self, data: str) -> None:
        if self._open in ("script", "style") and data.strip():
            self.inline.append(data.strip())


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(ASSETS["index.html"].data.decode())


def test_every_file_that_the_page_names_is_served(page: Page) -> None:
    ours = {link.removeprefix("/playground/") for link in page.linked if "/playground/" in link}
    assert ours >= {"style.css", "app.js", "icon.svg"}
    assert ours <= set(ASSETS)
    for name in SCRIPTS:
        imported = re.findall(r'from "\./([^"]+)"', ASSETS[name].data.decode())
        assert set(imported) <= set(ASSETS), name


def test_nothing_comes_from_elsewhere(page: Page) -> None:
    assert {link for link in page.linked if not link.startswith(("/", "#"))} == set()
    for name, asset in ASSETS.items():
        links = set(re.findall(r"(?:https?:)?//[a-z][\w.-]+\.[a-z]+", asset.data.decode()))
        assert links <= {"http://www.w3.org"}, name  # the name of SVG, not an address


def test_nothing_is_inline(page: Page) -> None:
    """The policy of this server runs no inline script and applies no inline style."""
    assert page.inline == []


def test_ids_are_unique_and_what_refers_to_them_is_right(page: Page) -> None:
    assert len(page.ids) == len(set(page.ids))
    assert page.refers_to <= set(page.ids)
    wanted = {
        wanted
        for name in SCRIPTS
        for wanted in re.findall(r'element\("([\w-]+)"\)', ASSETS[name].data.decode())
    }
    assert wanted
    assert wanted <= set(page.ids)


def test_every_field_has_a_label(page: Page) -> None:
    assert page.unlabelled
    assert page.unlabelled <= page.labelled


def test_the_menu_offers_what_the_api_takes() -> None:
    assert tuple(json.loads(ASSETS["solvers.json"].data)) == get_args(SolverName)


def test_the_page_is_small() -> None:
    """Quick on a phone: everything in one round trip's worth of windows."""
    assert sum(len(asset.packed) for asset in ASSETS.values()) < 40_000


def get(path: str, **headers: str) -> httpx.Response:
    app = FastAPI()
    app.include_router(playground.routes())

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://page") as client:
            sent = {name.replace("_", "-"): value for name, value in headers.items()}
            return await client.get(path, headers=sent)

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/playground/style.css", "text/css; charset=utf-8"),
        ("/playground/app.js", "text/javascript; charset=utf-8"),
        ("/playground/icon.svg", "image/svg+xml"),
    ],
)
def test_files_are_served_with_their_type(path: str, media_type: str) -> None:
    reply = get(path)
    assert reply.status_code == 200
    assert reply.headers["content-type"] == media_type
    assert reply.content == ASSETS[path.rpartition("/")[2] or "index.html"].data


def test_a_browser_that_has_a_file_is_told_so() -> None:
    tag = get("/").headers["etag"]
    for known in (tag, f'"other", W/{tag}'):
        again = get("/", if_none_match=known)
        assert (again.status_code, again.content) == (304, b"")
    assert get("/", if_none_match='"other"').status_code == 200


def test_compression_only_where_it_is_understood() -> None:
    assert "content-encoding" not in get("/", accept_encoding="identity").headers
    assert "content-encoding" not in get("/", accept_encoding="gzip;q=0").headers
    packed = get("/", accept_encoding="br, gzip")
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.headers["vary"] == "accept-encoding"
    assert packed.content == ASSETS["index.html"].data
    assert gzip.decompress(ASSETS["index.html"].packed) == ASSETS["index.html"].data
