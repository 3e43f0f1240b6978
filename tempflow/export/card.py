"""The model card of a hub folder: README.md with its pictures, and what the run wrote of itself."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from PIL import Image

from tempflow.common.errors import BadInput
from tempflow.export.base import Base, find_base
from tempflow.export.public import public, without_home
from tempflow.export.subject import Subject
from tempflow.export.tables import duration, load_code, one_line, plan, row_after, scores, settings
from tempflow.export.upload import HubOptions
from tempflow.records.rows import read_metrics
from tempflow.settings.fields import Config
from tempflow.settings.reading import to_yaml

SHOWN = 4
"""Prompts whose pictures the card shows."""
SMALLEST = 160
"""Pixels of a picture's height below which it is enlarged, pixel by pixel."""
TAGS = ["text-to-image", "flow-matching", "reinforcement-learning", "tempflow-grpo"]

Rows = Sequence[Mapping[str, Any]]


def write_card(subject: Subject, folder: Path, options: HubOptions) -> None:
    """Writes the card, and what it shows, beside the weights."""
    run = subject.run
    base, rows = find_base(subject, options.base_model), read_metrics(run.folder / "metrics.jsonl")
    for name, source in (("curves.png", run.folder / "report.png"), ("metrics.jsonl", run.folder / "metrics.jsonl"),
                         *((file.name, file) for file in base.files)):  # fmt: skip
        if source.is_file():
            shutil.copyfile(source, folder / name)
    config = public(run.config, subject.name, base)
    (folder / "config.yaml").write_text(without_home(to_yaml(config)), encoding="utf-8")
    prompts = _pictures(run.folder, folder, rows, run.iteration)
    parts = [
        _front(subject, base),
        _title(subject, base),
        _before_and_after(prompts, rows, run.iteration),
        scores(rows, run),
        load_code(subject, base, options.repository, prompts),
        _training(subject, rows, (folder / "curves.png").is_file(), config),
        _licence(base),
    ]
    (folder / "README.md").write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def _front(subject: Subject, base: Base) -> str:
    """What the hub reads of the card."""
    tags = [*(["lora"] if subject.lora else []), *TAGS]
    data = ModelCardData(base_model=base.hub, library_name="diffusers", pipeline_tag="text-to-image", tags=tags,
                         **base.licence)  # fmt: skip
    return f"---\n{data.to_yaml()}\n---"


def _title(subject: Subject, base: Base) -> str:
    run, reward = subject.run, ", ".join(_reward_names(subject.run.config))
    what = "A LoRA for" if subject.lora else "A transformer for"
    return (
        f"# {subject.name}\n\n"
        f"{what} {base.link}, trained by reinforcement learning (TempFlow-GRPO) for the reward {reward}: "
        f"{run.iteration:,} iterations, {'averaged' if run.weights == 'averaged' else 'unaveraged'} weights."
    )


def _reward_names(config: Config) -> list[str]:
    name = config.reward.name
    return [f"`{name}`"] if isinstance(name, str) else [f"{weight:g} x `{one}`" for one, weight in name.items()]


def _before_and_after(prompts: list[str], rows: Rows, iteration: int) -> str:
    """A table of pictures, a row for each prompt."""
    if not prompts:
        return ""
    lines = [f"| {one_line(prompt)} | ![before](pictures/before_{n}.png) | ![after](pictures/after_{n}.png) |"
             for n, prompt in enumerate(prompts, 1)]  # fmt: skip
    done = _shown_step(rows, iteration)
    head = f"| prompt | before | after {done:,} iterations |\n|---|---|---|"
    return "\n".join(["## Before and after\n", "Held-out prompts, the same initial noises.\n", head, *lines])


def _shown_step(rows: Rows, iteration: int) -> int:
    after = row_after(rows, iteration)
    return after["step"] if after else iteration


def _pictures(run: Path, folder: Path, rows: Rows, iteration: int) -> list[str]:
    """Cuts the pictures before and after out of the run's strips; returns their prompts, none where there are none."""
    prompts = list(rows[0].get("picture_prompts", [])) if rows else []
    strips = [run / "pictures" / f"step_{step:06d}.png" for step in (0, _shown_step(rows, iteration))]
    if not prompts or not all(strip.is_file() for strip in strips):
        return []
    (folder / "pictures").mkdir()
    for word, path in zip(("before", "after"), strips, strict=True):
        _cut(_strip(path, len(prompts)), len(prompts), folder / "pictures", word)
    return prompts[:SHOWN]


def _strip(path: Path, count: int) -> Image.Image:
    """A strip of `count` pictures.

    Raises:
        BadInput: the file is none.
    """
    try:
        with Image.open(path) as strip:
            pixels = strip.convert("RGB")
    except (OSError, ValueError) as error:
        raise BadInput("pictures", path, f"not readable as a picture ({error})") from error
    if pixels.width % count:
        raise BadInput("pictures", path, f"{pixels.width} pixels wide, which is not a strip of {count} pictures")
    return pixels


def _cut(strip: Image.Image, count: int, folder: Path, word: str) -> None:
    """The first pictures of a strip of `count`, enlarged where they are small."""
    width, times = strip.width // count, -(-SMALLEST // strip.height)
    for n in range(min(SHOWN, count)):
        piece = strip.crop((n * width, 0, (n + 1) * width, strip.height))
        larger = piece.resize((width * times, strip.height * times), Image.Resampling.NEAREST)
        larger.save(folder / f"{word}_{n + 1}.png")


def _training(subject: Subject, rows: Rows, curves: bool, config: Config) -> str:
    """How it was trained: time, curves, settings, the plan in words."""
    now = next((row for row in reversed(rows) if 0 < row["step"] <= subject.run.iteration), None)
    took = f"{now.get('rollouts', 0):,} pictures were explored, in {duration(now.get('seconds', 0))}. " if now else ""
    parts = [
        f"## How it was trained\n\n{took}Every setting is in [config.yaml](config.yaml), every figure in "
        "[metrics.jsonl](metrics.jsonl).",
        "![curves of the run](curves.png)" if curves else "",
        settings(config),
        f"The plan of the run, as of one process:\n\n{plan(subject)}",
    ]
    return "\n\n".join(part for part in parts if part)


def _licence(base: Base) -> str:
    told, link = (base.licence.get(name) for name in ("license_name", "license_link"))
    name = told or base.licence.get("license")
    shown = f"[{name}]({link})" if link else name
    words = f"The base's licence, as its files tell it, is {shown}." if name else "The base's files tell no licence."
    return f"## Licence\n\n{words} These weights are a change of that model, and what it allows goes for them, too."
