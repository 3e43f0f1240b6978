"""Scorers are found by name or import path, and their answers are checked."""

import subprocess
import sys

import pytest
import torch

from tempflow.errors import BadInput
from tempflow.prompts import Prompt
from tempflow.rewards import Scorer, load_scorer

IMAGES = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 4, 4)
PROMPTS = [Prompt(str(number)) for number in range(5)]


def agreement(images, prompts):
    """1 where image and prompt belong together."""
    return [float(image[0, 0, 0] == int(prompt.text)) for image, prompt in zip(images, prompts, strict=True)]


def test_scorer_by_import_path(tmp_path, monkeypatch):
    (tmp_path / "my_scorers.py").write_text(
        "class Bright:\n    def __call__(self, images, prompts):\n        return images.float().mean((1, 2, 3))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    scorer = load_scorer("reward.name", "my_scorers:Bright", 2)
    assert torch.equal(scorer(IMAGES, PROMPTS), torch.arange(5.0))
    sys.modules.pop("my_scorers")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda images, prompts: torch.zeros(len(images) + 1), r"expected \(2,\), found \(3,\)"),
        (lambda images, prompts: torch.zeros(len(images), 1), "one number per image"),
        (lambda images, prompts: torch.full((len(images),), float("nan")), "NaN"),
        (lambda images, prompts: torch.tensor([0.0, float("inf")])[: len(images)], "infinite"),
        (lambda images, prompts: ["high"] * len(images), "refuses"),
        (lambda images, prompts: None, "refuses"),
    ],
)
def test_wrong_answers_are_refused(answer, words):
    with pytest.raises(BadInput, match=words) as caught:
        Scorer("reward.name", "mine", answer, 2)(IMAGES[:4], PROMPTS[:4])
    assert caught.value.field == "reward.name"


def test_scores_carry_no_gradient():
    """A neural scorer need not say no_grad itself."""
    weight = torch.nn.Parameter(torch.ones(1))
    scorer = Scorer("reward.name", "neural", lambda images, prompts: images.float().mean((1, 2, 3)) * weight, 2)
    assert not scorer(IMAGES, PROMPTS).requires_grad


def test_scorer_of_the_working_folder_is_found_by_the_script(tmp_path):
    """`torchrun tempflow/train.py` has the script's folder on its path, not the user's."""
    (tmp_path / "scorers_here.py").write_text("def half(images, prompts):\n    return [0.5] * len(images)\n")
    code = "import sys; sys.path.pop(0); import tempflow.rewards as r; r.load_scorer('r', 'scorers_here:half', 1)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)


@pytest.mark.parametrize("name", [":x", ".a:x", "pickscoer", "no_such_module:score", "math:no_function", "math:pi"])
def test_unknown_scorers_are_refused(name):
    with pytest.raises(BadInput) as caught:
        load_scorer("reward.gold", name, 2)
    assert caught.value.field == "reward.gold"
