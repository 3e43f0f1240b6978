"""report.html: the template, its styles and scripts, and what they show, put together as one file."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from tempflow.common.errors import BadInput
from tempflow.common.files import write_atomically
from tempflow.records.page.gather import Page, gather

ASSETS = Path(__file__).resolve().parent / "assets"
STYLES = ("uplot/uPlot.min.css", "page.css")
LICENCE = "uplot/LICENSE"
"""of what others wrote among the scripts; it asks to go with every copy"""
SCRIPTS = ("uplot/uPlot.iife.min.js", "charts.js", "pictures.js", "page.js")


def write_page(folder: Path) -> Path:
    """Writes `folder/report.html` from its metrics.jsonl, scores, pictures and settings.

    Raises:
        BadInput: files that are not those of a run, or a folder that cannot be written.
    """
    page = render(gather(folder))
    try:
        write_atomically(folder / "report.html", page.encode())
    except OSError as error:
        raise BadInput("run.dir", folder, f"report.html cannot be written ({error.strerror})") from error
    return folder / "report.html"


def render(page: Page) -> str:
    """The page. Whatever is a user's text goes through the template, which escapes it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(loader=FileSystemLoader(ASSETS), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters["figure"] = figure
    styles = Markup("\n".join(map(_asset, STYLES)))
    scripts = Markup("\n".join([f"/*\n{_asset(LICENCE)}*/", *map(_asset, SCRIPTS)]))
    return environment.get_template("page.html").render(
        page=page, styles=styles, scripts=scripts, scripts_hash=_hash(scripts)
    )


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """By which the page's policy knows its own script, and runs no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def figure(value: Any) -> str:
    """A number in four digits, or to its ones; nothing where there is none."""
    if not isinstance(value, int | float):
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
