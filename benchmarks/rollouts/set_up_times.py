"""How long setting up a variant may take before one of its kind has been set up: assumed, not measured."""

from __future__ import annotations

from typing import Any

PLAIN = 20.0
"""seconds of any set-up: weights, two short iterations to warm up"""
ADDED = {
    "tails.level": {"compile": 75.0, "compiled_graph": 90.0, "graph": 10.0},
    "tails.autotune": {True: 240.0},
    "tails.compile_vae": {True: 60.0},
    "learn.compile": {True: 90.0},
    "tails.fp8": {True: 30.0},
    "tails.guidance_above": {0.5: 30.0},
}
"""setting -> value -> seconds of compilation and capture more, with a cold cache"""
MARGIN = 1.3
"""how much longer than the last of its kind the next may take"""


def kind_of(settings: dict[str, Any]) -> tuple[str, ...]:
    """The settings of a variant that cost set-up time, as text: variants of one kind take about as long."""
    return tuple(f"{name}={settings[name]}" for name, values in ADDED.items() if settings.get(name) in values)


def assumed_seconds(kind: tuple[str, ...]) -> float:
    """Seconds of a set-up of that kind."""
    added = {f"{name}={value}": seconds for name, values in ADDED.items() for value, seconds in values.items()}
    return PLAIN + sum(added[part] for part in kind)
