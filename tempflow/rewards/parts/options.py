"""Options and device of scorers, as command lines give them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tempflow.common.errors import BadInput
from tempflow.common.yaml_values import Unreadable, read_word


def read_options(arguments: Sequence[str], rewards: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`key=value` or `reward.key=value` -> options by reward."""
    options: dict[str, dict[str, Any]] = {reward: {} for reward in rewards}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        reward = next((known for known in rewards if name.startswith(f"{known}.")), None)
        if not equals or (reward is None and len(rewards) > 1):
            form = "KEY=VALUE" if len(rewards) == 1 else f"REWARD.KEY=VALUE with one of {', '.join(rewards)}"
            raise BadInput("--option", argument, f"must have the form {form}")
        try:
            value = read_word(text)
        except Unreadable as error:
            raise BadInput("--option", argument, f"not readable as a YAML value ({error}); quote it") from error
        options[reward or rewards[0]][name if reward is None else name.removeprefix(f"{reward}.")] = value
    return options


def read_device(name: str) -> torch.device:
    """The device called so; `auto` is a GPU if there is one.

    Raises:
        BadInput: torch knows none of this name.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise BadInput("--device", name, "is no device of torch, such as cpu, cuda or cuda:1, nor auto") from error
