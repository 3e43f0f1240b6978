"""The settings of a run as others may see them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tempflow.export.base import Base
from tempflow.settings.fields import Config

ADDRESS = re.compile(r"\s*[a-z][a-z0-9+.-]*://", re.IGNORECASE)
"""How an address of a server begins; a password may be in it."""
PRIVATE = re.compile(r"(^|_)(urls?|address|hosts?|servers?|token|token_file|password|secret|api_?key)$", re.IGNORECASE)
"""Ends of the names of options that tell where a server is, or how it is entered."""


def public(config: Config, name: str, base: Base) -> Config:
    """The settings without what concerns this machine alone.

    Args:
        name: of the run.
    """
    model = replace(config.model, path=base.shown, text_cache=None)
    options = {scorer: _public_option(given) for scorer, given in config.reward.options.items()}
    reward = replace(config.reward, servers=[], token_file=None, options=options)
    return replace(config, model=model, reward=reward, run=replace(config.run, dir=f"runs/{name}"))


def _public_option(value: Any) -> Any:
    """A value without the addresses and passwords in it, however deep they lie."""
    if isinstance(value, Mapping):
        kept = {name: one for name, one in value.items() if not (PRIVATE.search(str(name)) or _is_address(one))}
        return {name: _public_option(one) for name, one in kept.items()}
    if isinstance(value, list | tuple):
        return [_public_option(one) for one in value if not _is_address(one)]
    return value


def _is_address(value: Any) -> bool:
    return isinstance(value, str) and bool(ADDRESS.match(value))


def without_home(text: str) -> str:
    """Text in which paths in the user's own folder begin with `~/`.

    The folder itself stays, since `~` alone is null in YAML; so do paths that only have its name in them.
    """
    home = os.path.expanduser("~")  # unlike Path.home() it fails for no user; without a folder it may be / or ~
    return text if home == "/" else re.sub(rf"(?<![\w./~-]){re.escape(home)}/", "~/", text)
