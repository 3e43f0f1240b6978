"""GenEval's rules (arXiv 2310.11513): are the asked objects there, as many, so coloured, so placed?

A prompt's metadata is a line of GenEval's or Flow-GRPO's files:

    {"tag": "color_attr", "include": [{"class": "cup", "count": 1, "color": "red"},
                                      {"class": "dog", "count": 1, "color": "white", "position": ["left of", 0]}],
     "exclude": [{"class": "cup", "count": 2}]}

`position` says where the object stands from the one of include[number]. The option `score` chooses:

* graded (default), Flow-GRPO's reward: the mean over clauses of 1 - |wanted - found| / wanted for the count, the same
  for objects of the right colour, and 1 or 0 for the position. Counts must be exact, and a clause whose count is wrong
  gets 0 for colour and position. (Flow-GRPO's server gives a wrong position 1/2 by appending 0 and then 1; here it is
  0. It ignores `exclude`; so do we where the class is also included, whose count is exact, else it is a term 1 or 0.)
* strict, Flow-GRPO's "strict": 1 if every term of graded is 1.
* geneval, the benchmark's own judgement: 1 if at least `count` objects are found, the most confident ones fit, and
  no `exclude` is reached.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tempflow.prompts import Prompt
from tempflow.rewards.geneval.words import COLOURS
from tempflow.rewards.parts.pixels import check_images


@dataclass(frozen=True)
class Detection:
    """One object in a picture."""

    name: str
    confidence: float
    box: tuple[float, float, float, float]
    """left, top, right, bottom in pixels; right and bottom are just outside"""
    mask: Tensor | None
    """(H, W) bool; None where the whole box counts"""


Clause = Mapping[str, Any]
Found = Mapping[str, Sequence[Detection]]
ColoursOf = Callable[[Sequence[Detection], str], Sequence[str]]
"""(objects, class) -> a colour each"""

CONFIDENCE, COUNTING_CONFIDENCE = 0.3, 0.9
MOST = 16
"""objects of one class that are looked at"""
POSITION_SLACK = 0.1
RELATIONS = ("left of", "right of", "above", "below")


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """Where a box (left, top, right, bottom) lies from another: left of, right of, above, below, or two of them.

    Distances between centres count only beyond a tenth of the two boxes' joint sides, and a direction only if it
    makes more than half of the distance.
    """
    offsets, beyond = [], []
    for low, high in ((0, 2), (1, 3)):
        offset = (box[low] + box[high] - other[low] - other[high]) / 2
        slack = POSITION_SLACK * (abs(box[high] - box[low]) + abs(other[high] - other[low]))
        offsets.append(offset)
        beyond.append(math.copysign(max(abs(offset) - slack, 0.0), offset))
    if max(map(abs, beyond)) < 1e-3:
        return set()
    across, down = (value / math.hypot(*offsets) for value in beyond)
    named = {"left of": across < -0.5, "right of": across > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {name for name, true in named.items() if true}


def kept(detections: Sequence[Detection], tag: str) -> dict[str, list[Detection]]:
    """Confident objects by class, the most confident first; counting asks for more confidence."""
    threshold = COUNTING_CONFIDENCE if tag == "counting" else CONFIDENCE
    result: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda found: -found.confidence):
        same = result.setdefault(detection.name, [])
        if detection.confidence > threshold and len(same) < MOST:
            same.append(detection)
    return {name: same for name, same in result.items() if same}


def _placed(objects: Sequence[Detection], clause: Clause, groups: Sequence[Sequence[Detection] | None]) -> bool:
    """Whether all objects stand as the clause says from all objects that fulfilled the clause it refers to."""
    relation, number = clause["position"]
    targets = groups[number]
    if targets is None:
        return False
    return all(relation in relations(found.box, target.box) for found in objects for target in targets)


def graded_terms(found: Found, colours: ColoursOf, metadata: Mapping[str, Any]) -> list[float]:
    """Terms of the graded score, each at most 1; a count that is off by more than the count itself is below 0."""
    terms: list[float] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in metadata.get("include", ()):
        objects, count = found.get(clause["class"], ()), clause["count"]
        own = [1 - abs(count - len(objects)) / count]
        if "color" in clause:
            right = list(colours(objects, clause["class"])).count(clause["color"]) if own[0] == 1 else 0
            own.append(1 - abs(count - right) / count)
        if "position" in clause:
            own.append(float(min(own) == 1 and _placed(objects, clause, groups)))
        groups.append(objects if min(own) == 1 else None)
        terms += own
    included = {clause["class"] for clause in metadata.get("include", ())}
    for clause in metadata.get("exclude", ()):
        if clause["class"] not in included:
            terms.append(float(len(found.get(clause["class"], ())) < clause["count"]))
    return terms


def graded(found: Found, colours: ColoursOf, metadata: Mapping[str, Any]) -> float:
    """Flow-GRPO's graded reward."""
    terms = graded_terms(found, colours, metadata)
    return sum(terms) / len(terms)


def strict(found: Found, colours: ColoursOf, metadata: Mapping[str, Any]) -> float:
    """1 if every count, colour and position is exactly as asked, else 0."""
    return float(all(term == 1 for term in graded_terms(found, colours, metadata)))


def benchmark(found: Found, colours: ColoursOf, metadata: Mapping[str, Any]) -> float:
    """GenEval's own judgement, 1 or 0."""
    groups: list[Sequence[Detection] | None] = []
    for clause in metadata.get("include", ()):
        count = clause["count"]
        objects = found.get(clause["class"], ())[:count]
        fits = len(objects) == count
        if fits and "color" in clause:
            fits = list(colours(objects, clause["class"])).count(clause["color"]) >= count
        if fits and "position" in clause:
            fits = _placed(objects, clause, groups)
        groups.append(objects if fits else None)
    excluded = (len(found.get(clause["class"], ())) >= clause["count"] for clause in metadata.get("exclude", ()))
    return float(all(group is not None for group in groups) and not any(excluded))


SCORES = {"graded": graded, "strict": strict, "geneval": benchmark}


class ByRules:
    """A judge of objects, however they are found: what is shared by all that score by GenEval's rules."""

    judge: Callable[[Found, ColoursOf, Mapping[str, Any]], float]
    """one of SCORES"""
    detect: Any
    """uint8 images (B, 3, H, W) -> a list of `Detection` each; `names` are the classes it knows"""
    colour_names: Sequence[str] = COLOURS
    """what `colours` can say"""

    def colours(self, image: Tensor, objects: Sequence[Detection], name: str) -> Sequence[str]:
        """A colour for each object of a class in a uint8 image (3, H, W)."""
        raise NotImplementedError

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> list[float]:
        """uint8 (B, 3, H, W) and B prompts with GenEval metadata -> B scores."""
        check_images(images, prompts)
        self.check(prompts)
        found = self.detect(images)
        return [self._judge(*row) for row in zip(images, found, prompts, strict=True)]

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises ValueError unless each prompt has GenEval metadata."""
        for prompt in prompts:
            check_metadata(prompt, self.detect.names, self.colour_names)

    def _judge(self, image: Tensor, detections: Sequence[Detection], prompt: Prompt) -> float:
        objects = kept(detections, prompt.metadata.get("tag", ""))
        return self.judge(objects, lambda group, name: self.colours(image, group, name), prompt.metadata)


def check_metadata(prompt: Prompt, names: Sequence[str], colours: Sequence[str] = COLOURS) -> None:
    """Raises ValueError, naming the prompt, unless its metadata are GenEval's, of these classes and colours."""
    include, exclude = prompt.metadata.get("include"), prompt.metadata.get("exclude", [])
    if not isinstance(include, list) or not isinstance(exclude, list) or not include + exclude:
        raise ValueError(
            f'prompt "{prompt.text}" has include={include!r}; give GenEval metadata such as '
            '"include": [{"class": "cup", "count": 1, "color": "red"}]'
        )
    for place, clause in enumerate(include + exclude):
        if trouble := _trouble(clause, min(place, len(include)), names, colours):
            raise ValueError(f'prompt "{prompt.text}": {clause!r}: {trouble}')


def _trouble(clause: Any, place: int, names: Sequence[str], colours: Sequence[str]) -> str | None:
    """What is wrong with a clause; `place` is how many clauses its position may refer to."""
    if not isinstance(clause, Mapping) or clause.get("class") not in names:
        return f"class must be one that the detector knows: {', '.join(names)}"
    if not isinstance(clause.get("count"), int) or clause["count"] < 1:
        return "count must be a whole number from 1"
    if clause.get("color", colours[0]) not in colours:
        return f"color must be one of {', '.join(colours)}"
    relation, *number = clause.get("position", (RELATIONS[0], 0))
    if relation not in RELATIONS or ("position" in clause and (len(number) != 1 or number[0] not in range(place))):
        return f"position must be [relation, number of an earlier clause], with {', '.join(RELATIONS)}"
    return None
