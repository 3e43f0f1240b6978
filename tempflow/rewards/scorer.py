"""Scorers: `(images uint8 (B, 3, H, W), prompts) -> B numbers`. One file per scorer; yours by import path."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tempflow.common.errors import BadInput
from tempflow.common.tensors import chunks
from tempflow.prompts import Prompt
from tempflow.rewards.names import SCORERS


class ScorerFailed(BadInput):
    """A scorer that broke, and did not refuse: the same call may succeed another time."""


def _broken(setting: str, name: str, error: BaseException, doing: str) -> ScorerFailed:
    """The line about an exception of a scorer, with the place in its code."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f", {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return ScorerFailed(setting, name, f"{doing}: {type(error).__name__} {error}{place}")


@dataclass(frozen=True)
class Scorer:
    """A scoring function under its name, called with batches of `rows` images, its answers checked."""

    setting: str
    name: str
    function: Callable[[Tensor, Sequence[Prompt]], Tensor | Sequence[float]]
    rows: int
    parallel: int = 0
    """calls that may wait for another machine at once; 0 for a scorer that computes here"""

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(B, 3, H, W) uint8 images and B prompts -> (B,) fp32.

        Raises:
            BadInput: the function refuses its input, or answers with a wrong number of values or an infinite one.
                NaN is passed on: it says that the scorer has no opinion of this image.
        """
        parts = [self._score(images[part], prompts[part]) for part in chunks(len(images), self.rows)]
        return torch.cat(parts)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Lets the function look at prompts before there is an image, if it has a method `check` for that.

        Raises:
            BadInput: it cannot judge one of them.
        """
        check = getattr(self.function, "check", None)
        if check is None:
            return
        try:
            check(prompts)
        except BadInput:
            raise
        except ValueError as error:
            raise BadInput(self.setting, self.name, f"the scorer refuses a prompt: {error}") from error
        except (Exception, SystemExit) as error:
            raise _broken(self.setting, self.name, error, "the scorer failed as it looked at the prompts") from error

    def _score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        try:
            with torch.no_grad():
                scores = torch.as_tensor(self.function(images, prompts), dtype=torch.float32).cpu()
        except BadInput:
            raise  # it says already what is wrong
        except (ValueError, TypeError) as error:
            hint = f"the scorer refuses its input or answers with no numbers: {error}"
            raise BadInput(self.setting, self.name, hint) from error
        except (Exception, SystemExit) as error:
            raise _broken(self.setting, self.name, error, "the scorer failed") from error
        if scores.shape != (len(images),):
            hint = f"must return one number per image: expected ({len(images)},), found {tuple(scores.shape)}"
            raise BadInput(self.setting, self.name, hint)
        if torch.isinf(scores).any():
            text = prompts[int(torch.nonzero(torch.isinf(scores))[0, 0])].text
            raise BadInput(self.setting, self.name, f'returned an infinite value for "{text}"; give a finite one')
        return scores


def check_options(options: Mapping[str, Any], used: Collection[str | None]) -> None:
    """Refuses options of a scorer that the run does not use; most likely its name is misspelt."""
    for name in options:
        if name not in used:
            hint = f"the run has no scorer of this name; it has {', '.join(filter(None, used))}"
            raise BadInput("reward.options", name, hint)


def load_scorer(
    setting: str,
    name: str,
    rows: int,
    options: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
) -> Scorer:
    """The scorer called `name` in SCORERS, or at `module:attribute`.

    Args:
        setting: the field that names it, for error messages.
        options: keyword arguments for a scorer that is a class, from `reward.options`.
        device: where such a scorer computes unless its options say otherwise.

    One that needs something of its prompts has a method `check(prompts)`, which raises ValueError where it is missing.
    A scorer that waits for another machine has an attribute `waits`: how many calls of it may be under way at once.
    """
    found = _find(setting, name)
    if isinstance(found, type):
        try:
            found = _construct(found, name, dict(options or {}), device)
        except BadInput:
            raise
        except (Exception, SystemExit) as error:
            raise _broken(setting, name, error, "cannot be made with its options") from error
    elif options:
        hint = "takes no options: it is no class; remove them"
        raise BadInput(f"reward.options.{name}", dict(options), hint)
    return Scorer(setting, name, found, rows, getattr(found, "waits", 0))


def _find(setting: str, name: str) -> Callable[..., Any]:
    path = SCORERS.get(name, name)
    module, colon, attribute = path.partition(":")
    if not (module and colon and attribute):
        raise BadInput(setting, name, f"no such scorer; choose one of {', '.join(SCORERS)} or give module:attribute")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a script's own folder is on the path, the user's working folder is not
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, SyntaxError) as error:
        raise BadInput(setting, name, f"cannot be imported ({error})") from error
    except (Exception, SystemExit) as error:
        raise _broken(setting, name, error, "cannot be imported") from error
    if not callable(found):
        raise BadInput(setting, name, "is not callable; give a function (images, prompts) -> scores, or a class of one")
    return found


def _construct(kind: type, name: str, options: dict[str, Any], device: torch.device | None) -> Callable[..., Any]:
    known = {
        key: parameter.default is inspect.Parameter.empty
        for key, parameter in inspect.signature(kind).parameters.items()
        if parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    }
    for key, value in options.items():
        if key not in known:
            hint = f"no such option of this scorer; its options: {', '.join(known) or 'none'}"
            raise BadInput(f"reward.options.{name}.{key}", value, hint)
    if "device" in known and device is not None:
        options.setdefault("device", device)
    for key, required in known.items():
        if required and key not in options:
            raise BadInput(f"reward.options.{name}.{key}", None, "this scorer needs it; give a value")
    if "device" in known and "device" in options:
        _check_device(name, options["device"])
    return kind(**options)


def _check_device(name: str, device: Any) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch asserts that it was built for the device
        reason = str(error).splitlines()[0]
        raise BadInput(f"reward.options.{name}.device", device, f"cannot be used here ({reason})") from error
