"""Prompts in the manner of GenEval (arXiv 2310.11513), with the metadata its scorers read.

    tempflow prompts FOLDER --count 50000 --test 480 --exclude evaluation_metadata.jsonl

writes `train_metadata.jsonl` and `test_metadata.jsonl` into the folder, which can be given as `prompts.train` and
`prompts.test`. The same arguments give the same files. No prompt of the test file or of an excluded file is in the
training file, nor one that asks for the same picture in other words ("a cat left of a dog", "a dog right of a cat").

A kind of which every prompt is kept out has none in the file; its share goes to the others, and a line says so. That is
so of single objects in the command above, as the benchmark asks for all 80. `--test 0` writes no test file.

The texts are worded as GenEval's generator (prompts/create_prompts.py) does, by rule and not by grammar: "a skis", "two
persons", "four knifes". `--wording english` says "a pair of skis", "two people", "four knives" instead, which
changes 7 % of GenEval's 553 texts.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, islice, pairwise, permutations, product
from pathlib import Path
from typing import Any

from tempflow.common.draws import PROMPTS, shuffled
from tempflow.common.errors import BadInput
from tempflow.common.files import write_atomically
from tempflow.prompts import Prompt
from tempflow.rewards.geneval.words import CLASSES, COLOURS, OPPOSITES, Phrase, genevals


def single_object(name: str, phrase: Phrase = genevals) -> dict[str, Any]:
    return _task("single_object", phrase(name), [_object(name)])


def two_object(first: str, second: str, phrase: Phrase = genevals) -> dict[str, Any]:
    return _task("two_object", f"{phrase(first)} and {phrase(second)}", [_object(first), _object(second)])


def counting(name: str, count: int, phrase: Phrase = genevals) -> dict[str, Any]:
    task = _task("counting", phrase(name, count=count), [_object(name, count=count)])
    return task | {"exclude": [_object(name, count=count + 1)]}


def colors(name: str, colour: str, phrase: Phrase = genevals) -> dict[str, Any]:
    return _task("colors", phrase(name, colour), [_object(name, color=colour)])


def position(classes: tuple[str, str], where: str, phrase: Phrase = genevals) -> dict[str, Any]:
    first, second = classes
    include = [_object(second), _object(first, position=[where, 0])]
    return _task("position", f"{phrase(first)} {where} {phrase(second)}", include)


def color_attr(classes: tuple[str, str], colours: tuple[str, str], phrase: Phrase = genevals) -> dict[str, Any]:
    described = [phrase(name, colour) for name, colour in zip(classes, colours, strict=True)]
    include = [_object(name, color=colour) for name, colour in zip(classes, colours, strict=True)]
    return _task("color_attr", " and ".join(described), include)


def choices(most: int, classes: Sequence[str] = CLASSES, colours: Sequence[str] = COLOURS) -> dict[str, list[tuple]]:
    """All that each task can ask for: the arguments of its function. Counts go up to `most`."""
    coloured = [name for name in classes if name != "person"]
    return {
        "single_object": [(name,) for name in classes],
        "two_object": list(permutations(classes, 2)),
        "counting": list(product(classes, range(2, most + 1))),
        "colors": list(product(coloured, colours)),
        "position": list(product(permutations(classes, 2), OPPOSITES)),
        "color_attr": list(product(permutations(coloured, 2), permutations(colours, 2))),
    }


TASKS = {task.__name__: task for task in (single_object, two_object, counting, colors, position, color_attr)}


def _object(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


def _task(tag: str, described: str, include: list[dict[str, Any]]) -> dict[str, Any]:
    return {"tag": tag, "include": include, "prompt": f"a photo of {described}"}


def content(metadata: dict[str, Any]) -> str:
    """What a prompt's metadata asks for, the same for two prompts that ask for the same picture."""
    objects = [dict(entry) for entry in metadata["include"]]
    placed = objects[-1].get("position")
    if placed and placed[0] in ("right of", "below"):  # B right of A is A left of B
        first, second = objects[0]["class"], objects[-1]["class"]
        objects = [_object(second), _object(first, position=[OPPOSITES[placed[0]], 0])]
    elif not placed:
        objects.sort(key=lambda entry: json.dumps(entry, sort_keys=True))
    return json.dumps(objects, sort_keys=True)


def generate(
    count: int, mix: dict[str, int], seed: int, most: int, taken: set[str], phrase: Phrase = genevals
) -> list[dict[str, Any]]:
    """`count` prompts in the proportions of `mix`, none with a text or content in `taken`.

    A task with fewer different prompts than its share is walked through again, so that the proportions hold.

    Raises:
        BadInput: every prompt of every kind is taken.
    """
    if not count:
        return []
    walks = {tag: _walk(tag, pool, seed, taken, phrase) for tag, pool in choices(most).items() if mix.get(tag)}
    first = {tag: next(walk, None) for tag, walk in walks.items()}
    shares = {tag: mix[tag] for tag in mix if first.get(tag)}
    _tell([tag for tag in walks if not first[tag]], not shares)
    total, sums = sum(shares.values()), [0, *accumulate(shares.values())]
    chosen: list[dict[str, Any]] = []
    for tag, (before, after) in zip(shares, pairwise(sums), strict=True):
        share = count * after // total - count * before // total
        chosen += islice(chain([first[tag]], walks[tag]), share)
    return [chosen[place] for place in shuffled(len(chosen), seed, PROMPTS, len(TASKS))]


def _tell(empty: list[str], all_empty: bool) -> None:
    """Says which kinds have no prompt left.

    Raises:
        BadInput: no kind has.
    """
    if all_empty:
        raise BadInput("--exclude", ", ".join(empty), "leaves no prompt of any kind; exclude less")
    for tag in empty:
        print(f"{tag}: every prompt of this kind is kept out; its share goes to the others", file=sys.stderr)


def _walk(tag: str, pool: list[tuple], seed: int, taken: set[str], phrase: Phrase) -> Iterator[dict[str, Any]]:
    """All prompts of a task that are not taken, in random order, over and over; ends at once if there is none."""
    order = shuffled(len(pool), seed, PROMPTS, list(TASKS).index(tag))
    found = True
    while found:
        found = False
        for task in (TASKS[tag](*pool[place], phrase=phrase) for place in order):
            if task["prompt"] not in taken and content(task) not in taken:
                found = True
                yield task


def identities(prompts: Sequence[Prompt]) -> set[str]:
    """Texts and contents of prompts that must not come again."""
    return {prompt.text for prompt in prompts} | {content(p.metadata) for p in prompts if p.metadata.get("include")}


def write(folder: Path, split: str, tasks: list[dict[str, Any]]) -> None:
    """The prompts as one JSON object a line, no file of none; a file that is there already is left alone.

    Raises:
        BadInput: there is such a file, or it cannot be written.
    """
    file = check_free(folder, split)
    if not tasks:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, "".join(json.dumps(task) + "\n" for task in tasks).encode())
    except OSError as error:
        raise BadInput("folder", folder, f"{file.name} cannot be written ({error.strerror})") from error


def check_free(folder: Path, split: str) -> Path:
    """The file of a split in the folder, which is not there yet.

    Raises:
        BadInput: it is.
    """
    file = folder / f"{split}_metadata.jsonl"
    if os.path.lexists(file):
        raise BadInput("folder", folder, f"holds a {file.name} already; remove it or choose another folder")
    return file
