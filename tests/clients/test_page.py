"""The page in a real browser, with a real server behind it."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image as Pillow
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright

from engine.types import Image
from tests.clients import browser as chromium

ARTEFACTS = Path(__file__).parents[2] / "out" / "clients"
DESKTOP = {"width": 1280, "height": 900}
PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 844},
    "device_scale_factor": 2,
    "is_mobile": True,
    "has_touch": True,
}
SLOW_MS = 120_000.0
"""Patience with machines that do something else beside; nothing is timed by it."""

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser(request: pytest.FixtureRequest) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        executable = chromium.find(playwright)
        if executable is None:
            pytest.skip(chromium.ADVICE)
        launched = playwright.chromium.launch(executable_path=executable, args=chromium.arguments())
        yield launched
        launched.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Open]:
    """Open the page of a server; in the end nothing was complained about or asked elsewhere."""
    complaints: list[str] = []
    asked: list[str] = []
    contexts = []

    def goto(url: str, *, expected: str = "", **options: Any) -> Page:
        context = browser.new_context(**{"viewport": DESKTOP, **options})
        contexts.append(context)
        context.set_default_timeout(SLOW_MS)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console",
            lambda message: (
                complaints.append(message.text)
                if message.type in ("error", "warning")
                and not (expected and expected in message.text)
                else None
            ),
        )
        page.on("request", lambda request: note(request, url))
        page.goto(url)
        expect(page.get_by_text("Ready:")).to_be_visible(timeout=SLOW_MS)
        return page

    def note(request: Request, url: str) -> None:
        if not request.url.startswith((url, "data:", "blob:")):
            asked.append(request.url)

    yield goto
    for context in contexts:
        context.close()
    assert complaints == []
    assert asked == []


def draw(page: Page, prompt: str) -> None:
    """As somebody at a keyboard does: the prompt has the focus and is selected."""
    expect(page.get_by_label("What should it draw?")).to_be_focused()
    page.keyboard.press("Control+A")
    page.keyboard.type(prompt)
    page.keyboard.press("Enter")


def finished(page: Page, count: int = 1) -> None:
    links = page.get_by_role("link", name=re.compile("^Download"))
    expect(links).to_have_count(count, timeout=SLOW_MS)
    expect(page.get_by_role("progressbar")).to_be_hidden()


def watch_frames(page: Page) -> None:
    """Keep every source that a picture ever had, in order."""
    page.evaluate(
        """() => {
          window.frames_seen = [];
          new MutationObserver((changes) => {
            for (const { target } of changes)
              if (target.tagName === "IMG") window.frames_seen.push(target.getAttribute("src"));
          }).observe(document.getElementById("pictures"),
                     { subtree: true, attributes: true, attributeFilter: ["src"] });
        }"""
    )


def shown(page: Page, index: int = 0) -> Image:
    """The finished picture's pixels, as its link downloads them."""
    links = page.get_by_role("link", name=re.compile("^Download"))
    with page.expect_download() as download:
        links.nth(index).click()
    return pixels(Path(download.value.path()).read_bytes())


def pixels(data: bytes) -> Image:
    with Pillow.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB"), dtype=np.uint8)


def keep(page: Page, name: str, *, full_page: bool = True) -> None:
    """A screenshot as artefact; ``docs/page.png`` is a copy of ``page``."""
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    path = ARTEFACTS / f"{name}.png"
    page.screenshot(path=path, full_page=full_page, animations="disabled")


# ---------------------------------------------------------------------- every run


def test_a_prompt_becomes_a_picture(visit: Open, tiny_server: str) -> None:
    page = visit(tiny_server)
    watch_frames(page)
    draw(page, "a red umbrella")
    finished(page)
    frames = page.evaluate("frames_seen")
    assert len(set(frames)) > 3, "previews, and the picture"
    seed = page.get_by_text(re.compile(r"^seed \d+$")).inner_text().split()[1]
    body = {"prompt": "a red umbrella", "seed": int(seed), "steps": 20}
    reply = httpx.post(f"{tiny_server}/v1/images/generations", json=body, timeout=SLOW_MS / 1000)
    expected = pixels(base64.b64decode(reply.json()["data"][0]["b64_json"]))
    np.testing.assert_array_equal(shown(page), expected)


# ---------------------------------------------------------------------- the default model


@pytest.mark.full
def test_a_newcomer_types_a_prompt_and_watches_it_develop(visit: Open, served: str) -> None:
    page = visit(served, color_scheme="dark")
    watch_frames(page)
    draw(page, "three red apples")
    finished(page)
    frames = page.evaluate("frames_seen")
    assert len(set(frames)) >= 5, "previews, as many as one can see"
    assert shown(page).shape == (128, 128, 3)
    expect(page.get_by_text("Where the time went")).to_be_visible()
    for phase in ("Denoising", "Decoding"):
        expect(page.locator("#phases").get_by_text(phase)).to_be_visible()
    scrub = page.get_by_label("Develop again")
    scrub.focus()
    page.keyboard.press("Home")
    expect(scrub).to_have_attribute("aria-valuetext", re.compile("^step 1 of"))
    assert page.locator("#pictures img").get_attribute("src") == frames[0]
    page.keyboard.press("End")
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    keep(page, "page", full_page=False)


@pytest.mark.full
def test_the_same_seed_draws_the_same_and_a_new_one_does_not(visit: Open, served: str) -> None:
    page = visit(served)
    draw(page, "a desert island")
    finished(page)
    first = shown(page)
    page.get_by_role("button", name="Same seed").click()
    finished(page)
    np.testing.assert_array_equal(shown(page), first)
    page.get_by_role("button", name="New seed").click()
    finished(page)
    assert (shown(page) != first).any()
    earlier = page.locator("#history-list").get_by_role("button")
    expect(earlier).to_have_count(3)
    earlier.last.click()
    np.testing.assert_array_equal(shown(page), first)


@pytest.mark.full
def test_cancel_stops_the_work_and_not_only_the_waiting(visit: Open, served: str) -> None:
    page = visit(served)
    page.get_by_label("Steps").fill("50")
    page.get_by_role("combobox", name="Pictures").select_option("4")
    page.get_by_label("What should it draw?").focus()
    with page.expect_response(re.compile("/v1/jobs$")) as started:
        draw(page, "a castle on a black background")
    expect(page.get_by_text(re.compile(r"^\d+ %$"))).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#pictures").get_by_text("cancelled")).to_have_count(4)
    job = started.value.json()["id"]
    until_s = time.monotonic() + SLOW_MS / 1000
    while time.monotonic() < until_s:
        status = httpx.get(f"{served}/v1/jobs/{job}").json()["status"]
        if status not in ("queued", "running"):
            break
    assert status == "cancelled"
    expect(page.get_by_role("button", name="Draw", exact=True)).to_be_visible()


@pytest.mark.full
def test_the_code_on_the_page_draws_the_same_pictures(
    visit: Open, served: str, tmp_path: Path
) -> None:
    page = visit(served)
    page.get_by_role("combobox", name="Pictures").select_option("2")
    page.get_by_label("What should it draw?").focus()
    draw(page, """a dog next to "an 'umbrella'" \\""")
    finished(page, 2)
    pictures = [shown(page, 0), shown(page, 1)]
    curl = page.locator("#code-text").inner_text()
    page.get_by_role("tab", name="curl").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Python")).to_have_attribute("aria-selected", "true")
    python = page.locator("#code-text").inner_text()
    for name, command in (
        ("curl", ["bash", "-ec", f"set -o pipefail; {curl}"]),
        ("python", [sys.executable, "-c", python]),
    ):
        folder = tmp_path / name
        folder.mkdir()
        subprocess.run(command, cwd=folder, check=True, timeout=SLOW_MS / 1000)
        for i, picture in enumerate(pictures):
            made = pixels((folder / f"picture-{i + 1}.png").read_bytes())
            np.testing.assert_array_equal(made, picture)


@pytest.mark.full
def test_a_picture_can_start_from_another(visit: Open, served: str, tmp_path: Path) -> None:
    page = visit(served)
    draw(page, "three red apples")
    finished(page)
    first = shown(page)
    Pillow.fromarray(first).save(tmp_path / "start.png")
    page.get_by_role("button", name="Start from it").click()
    page.get_by_label("How far from it").fill("0.3")
    page.get_by_label("What should it draw?").fill("@three lemons; and 'a pear'")
    page.keyboard.press("Enter")
    finished(page)
    changed = shown(page)
    assert (changed != first).any()
    curl = page.locator("#code-text").inner_text()
    page.get_by_role("tab", name="Python").click()
    python = page.locator("#code-text").inner_text()
    for name, command in (
        ("picture", ["bash", "-ec", f"set -o pipefail; {curl}"]),
        ("picture-1", [sys.executable, "-c", python]),
    ):
        subprocess.run(command, cwd=tmp_path, check=True, timeout=SLOW_MS / 1000)
        np.testing.assert_array_equal(pixels((tmp_path / f"{name}.png").read_bytes()), changed)
    page.get_by_role("button", name="Start from nothing again").click()
    expect(page.get_by_label("Start from a picture")).to_be_focused()
    page.get_by_label("Start from a picture").set_input_files(tmp_path / "start.png")
    expect(page.get_by_alt_text("The picture to start from")).to_be_visible()


@pytest.mark.full
def test_what_the_server_refuses_is_said_beside_the_field(visit: Open, served: str) -> None:
    page = visit(served, expected="status of 4")
    page.evaluate("document.getElementById('prompt').removeAttribute('maxlength')")
    page.get_by_label("What should it draw?").fill("cat " * 2000)
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("4000")
    expect(page.get_by_label("What should it draw?")).to_have_attribute("aria-invalid", "true")
    page.get_by_label("What should it draw?").fill("")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("Say what it should draw")


# ---------------------------------------------------------------------- for everybody


@pytest.mark.full
def test_on_a_phone_a_tap_draws_and_the_picture_is_in_sight(visit: Open, served: str) -> None:
    page = visit(served, **PHONE, color_scheme="light")
    keep(page, "phone-first")
    page.get_by_role("button", name="three red apples").tap()
    finished(page)
    keep(page, "phone")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "no sideways scroll"
    expect(page.locator("#pictures img")).to_be_in_viewport()
    small = page.evaluate(
        """() => [...document.querySelectorAll("button, summary, select, input:not([type=range])")]
          .filter((it) => it.checkVisibility() && it.getBoundingClientRect().height < 32)
          .map((it) => it.textContent || it.id)"""
    )
    assert small == [], "large enough for a thumb"


@pytest.mark.full
def test_everything_has_a_role_and_a_name(visit: Open, served: str) -> None:
    page = visit(served)
    draw(page, "a tractor")
    finished(page)
    for role, name in (
        ("heading", "Darkroom"),
        ("textbox", "What should it draw?"),
        ("button", "Draw"),
        ("combobox", "Size"),
        ("combobox", "Solver"),
        ("combobox", "Pictures"),
        ("slider", "Steps"),
        ("slider", "Guidance"),
        ("slider", "Develop again"),
        ("textbox", "Seed"),
        ("textbox", "Keep out"),
        ("tab", "curl"),
        ("tabpanel", "curl"),
        ("img", "a tractor"),
        ("link", "API"),
    ):
        expect(page.get_by_role(role, name=name)).to_have_count(1)  # type: ignore[arg-type]
    nameless = [
        line
        for line in page.locator("body").aria_snapshot().splitlines()
        if re.fullmatch(r"\s*- (button|link|textbox|combobox|slider|img|tab)\b:?", line)
    ]
    assert nameless == []
    expect(page.locator("[role=status]").filter(has_text="Finished")).to_have_count(1)
    assert page.evaluate("document.documentElement.lang") == "en"


@pytest.mark.full
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_text_stands_out_from_what_is_behind_it(visit: Open, served: str, scheme: str) -> None:
    """WCAG 2.2, 1.4.3: a contrast of at least 4.5."""
    page = visit(served, color_scheme=scheme)
    draw(page, "a koala")
    finished(page)
    faint = page.evaluate((Path(__file__).parent / "contrast.js").read_text())
    assert faint == []
    keep(page, f"page-{scheme}")


@pytest.mark.full
def test_a_key_is_asked_for_only_where_the_server_wants_one(
    browser: Browser, locked_server: tuple[str, str]
) -> None:
    url, key = locked_server
    context = browser.new_context(viewport=DESKTOP)  # type: ignore[arg-type]
    context.set_default_timeout(SLOW_MS)
    page = context.new_page()
    page.goto(url)
    field = page.get_by_label("API key")
    expect(field).to_be_focused()
    page.keyboard.type(key)
    page.keyboard.press("Enter")
    expect(page.get_by_text("Ready:")).to_be_visible()
    page.get_by_label("What should it draw?").fill("a red umbrella")
    page.keyboard.press("Enter")
    finished(page)
    code = page.locator("#code-text").inner_text()
    assert "DARKROOM_API_KEY" in code
    assert key not in code
    page.reload()
    expect(page.get_by_text("Ready:")).to_be_visible()
    context.close()
