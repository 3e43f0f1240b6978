"""What `--help` prints."""

from __future__ import annotations

from dataclasses import fields

from tempflow.settings.fields import Config
from tempflow.settings.reading import plain, presets


def help_text() -> str:
    """Every field with its default and its sentence."""
    lines = [
        "usage: torchrun tempflow/train.py [PRESET or FILE.yaml] [section.field=value ...]",
        f"presets: {', '.join(presets())} (default: digits)",
    ]
    defaults = Config()
    for part in fields(Config):
        lines.append(f"\n{part.name}")
        values = getattr(defaults, part.name)
        described = type(values).__pydantic_fields__
        for name, info in described.items():
            default = plain(getattr(values, name))
            lines.append(f"  {part.name}.{name}={'null' if default is None else default}\n      {info.description}")
    return "\n".join(lines)
