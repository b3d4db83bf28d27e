"""Which Chromium the page is tested in.

    python -m tests.clients.browser     # says which; installs Playwright's own where there is none

``make test-full`` runs that first. Debian's and Ubuntu's ``chromium`` package is as good.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Playwright, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
ADVICE = "no Chromium here: `apt install chromium`, or `.venv/bin/playwright install chromium`"


def find(playwright: Playwright) -> str | None:
    """Path of Playwright's own Chromium, else of the system's; None without either."""
    own = playwright.chromium.executable_path
    if Path(own).exists():
        return own
    return next((path for path in map(shutil.which, NAMES) if path), None)


def arguments() -> list[str]:
    """Chromium's sandbox refuses to start for root, as in most containers."""
    return ["--no-sandbox"] if os.geteuid() == 0 else []


def main() -> None:
    """Say which browser, or get one."""
    with sync_playwright() as playwright:
        found = find(playwright)
    if found is None:
        subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"], check=True)
        return
    print(found)


if __name__ == "__main__":
    main()
