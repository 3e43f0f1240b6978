"""Pages in a real browser without a window: chromium, where one is installed, driven by playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@dataclass
class Opened:
    """A page, and what it complained of or asked for."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    """words on the console, errors of scripts"""
    requests: list[str] = field(default_factory=list)
    """whatever is neither the file itself nor in it"""
    processor_seconds: float = 0.0
    """which the page's process took until it was loaded, on however busy a machine"""


def chromium() -> str | None:
    """The path of the browser, if there is one."""
    return next((found for found in map(shutil.which, NAMES) if found), None)


@contextmanager
def browser() -> Iterator[Any]:
    """The browser, as playwright has it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@contextmanager
def opened(started: Any, path: Path, **options: Any) -> Iterator[Opened]:
    """A file in a tab of its own; `options` such as color_scheme, viewport."""
    context = started.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
    tab = Opened(context.new_page())
    tab.page.on("console", lambda message: tab.complaints.append(message.text))
    tab.page.on("pageerror", lambda error: tab.complaints.append(str(error)))
    tab.page.on("request", lambda request: tab.requests.append(request.url))
    measuring = context.new_cdp_session(tab.page)
    measuring.send("Performance.enable")
    tab.page.goto(path.resolve().as_uri())
    found = {each["name"]: each["value"] for each in measuring.send("Performance.getMetrics")["metrics"]}
    tab.processor_seconds = found["ProcessTime"]
    tab.requests = [url for url in tab.requests if not url.startswith(("data:", path.resolve().as_uri()))]
    yield tab
    context.close()
