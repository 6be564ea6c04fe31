"""Headless Chromium for the tests of pages, and what a page must not do while it is open."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Open", "chromium", "in_browser", "open_report", "record_surprises"]

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; Debian's is the package 'chromium'")

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
FLAGS += ["--disable-sync", "--no-first-run"]
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def record_surprises(page: Any, surprises: list[str]) -> None:
    """Write down every dialog, which is closed, and every error of a page."""
    page.on("dialog", lambda d: (surprises.append(f"dialog {d.message}"), d.dismiss()))
    page.on("pageerror", lambda e: surprises.append(f"error {e}"))


def open_report(browser: Any, path: Path, surprises: list[str], fragment: str = "", **options: Any) -> Any:
    """A report in a context of its own, ready; a surprise is whatever it does but show itself."""
    page = browser.new_context(**options).new_page()
    record_surprises(page, surprises)
    page.on("console", lambda m: surprises.append(f"console {m.text}"))
    page.on("request", lambda r: None if r.url.startswith(path.as_uri()) else surprises.append(f"request {r.url}"))
    page.on("popup", lambda p: surprises.append("popup"))
    page.goto(path.as_uri() + fragment)
    page.wait_for_selector("html[data-ready]", state="attached", timeout=20_000)
    return page
