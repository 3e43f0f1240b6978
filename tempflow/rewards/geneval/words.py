"""The words of GenEval's prompts: classes, colours, numbers, and how they become phrases."""

from __future__ import annotations

from collections.abc import Callable

CLASSES = [
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
]  # fmt: skip
"""The 80 classes of COCO under the names that GenEval gives them."""


COLOURS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]


NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


NOUNS = {
    "person": ("{}person", "{}people"),
    "sheep": ("{}sheep", "{}sheep"),
    "knife": ("{}knife", "{}knives"),
    "skis": ("pair of {}skis", "pairs of {}skis"),
    "scissors": ("pair of {}scissors", "pairs of {}scissors"),
    "broccoli": ("head of {}broccoli", "heads of {}broccoli"),
}
"""English singular and plural where an s does not make it; {} is where a colour stands."""


Phrase = Callable[..., str]
"""(class, colour, count) -> words; colour and count may be left out"""


def genevals(name: str, colour: str = "", count: int = 1) -> str:
    """`a red bus`, `a skis`, `two skises`: GenEval's rule."""
    noun = f"{colour} {name}" if colour else name
    if count > 1:
        return f"{NUMBERS[count]} {noun}{'es' if name.endswith('s') else 's'}"
    return _with_article(noun)


def english(name: str, colour: str = "", count: int = 1) -> str:
    """`a red bus`, `a pair of skis`, `two pairs of skis`."""
    ending = "es" if name.endswith(("s", "sh", "ch", "x")) else "s"
    one, many = NOUNS.get(name, ("{}" + name, "{}" + name + ending))
    noun = (one if count == 1 else many).format(f"{colour} " if colour else "")
    if count > 1:
        return f"{NUMBERS[count]} {noun}"
    return _with_article(noun)


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


WORDINGS = {"geneval": genevals, "english": english}
