"""Scenes that show what a prompt asks for, and scenes that miss it by one mistake."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

from tempflow.digits.captions import NAMES
from tempflow.rewards.geneval.rules import Detection, Found, strict
from tempflow.scenes.canvas import BLANK, CELLS, COLOURS, Scene, box_of_cell

NAMES_OF_COLOURS = tuple(COLOURS)


def class_of(name: str, colour: str) -> int:
    """The class number of a digit in a colour."""
    return NAMES.index(name) * len(COLOURS) + NAMES_OF_COLOURS.index(colour)


def name_and_colour(number: int) -> tuple[str, str]:
    """The words for a class number that is not BLANK."""
    digit, colour = divmod(number, len(COLOURS))
    return NAMES[digit], NAMES_OF_COLOURS[colour]


def asked_for(metadata: Mapping[str, Any], rng: random.Random) -> Scene:
    """A scene of the digits asked for and no others, at random places, in random colours where none are named."""
    things = list(_things(metadata, rng))
    while True:
        cells = rng.sample(range(CELLS), len(things))
        scene = [BLANK] * CELLS
        for cell, thing in zip(cells, things, strict=True):
            scene[cell] = thing
        if shows(scene, metadata):
            return scene


def _things(metadata: Mapping[str, Any], rng: random.Random) -> Iterator[int]:
    for clause in metadata["include"]:
        for _ in range(clause["count"]):
            yield class_of(clause["class"], clause.get("color") or rng.choice(NAMES_OF_COLOURS))


def shows(scene: Scene, metadata: Mapping[str, Any]) -> bool:
    """Whether every count, colour and place is as the metadata asks (`strict`); other digits do not matter."""
    found: dict[str, list[Detection]] = {}
    colours = {}
    for cell, number in enumerate(scene):
        if number != BLANK:
            name, colour = name_and_colour(number)
            box = box_of_cell(cell)
            found.setdefault(name, []).append(Detection(name, 1.0, box, None))
            colours[box] = colour
    seen: Found = found
    return bool(strict(seen, lambda objects, _: [colours[each.box] for each in objects], metadata))


def spoilt(scene: Scene, rng: random.Random) -> Scene:
    """The scene with one mistake: another digit, another colour, two cells swapped, a digit too many or too few."""
    cells, filled = list(scene), [cell for cell, number in enumerate(scene) if number != BLANK]
    blank = [cell for cell, number in enumerate(scene) if number == BLANK]
    place, mistake = rng.choice(filled), rng.random()
    digit, colour = divmod(cells[place], len(COLOURS))
    if mistake < 0.25:
        cells[place] = rng.choice([other for other in range(10) if other != digit]) * len(COLOURS) + colour
    elif mistake < 0.5:
        others = [other for other in range(len(COLOURS)) if other != colour]
        cells[place] = digit * len(COLOURS) + rng.choice(others)
    elif mistake < 0.75:
        other = rng.choice([cell for cell in range(CELLS) if cell != place])
        cells[place], cells[other] = cells[other], cells[place]
    elif mistake < 0.875:
        cells[place] = BLANK
    else:
        cells[rng.choice(blank)] = cells[place]
    return cells


def missed(metadata: Mapping[str, Any], rng: random.Random) -> Scene:
    """A scene that does not show what is asked for, by one mistake, or by two where one is no harm."""
    scene = asked_for(metadata, rng)
    while shows(scene, metadata):
        scene = spoilt(scene, rng)
    return scene
