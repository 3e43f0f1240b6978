"""Scorers are found by name or import path, and their answers are checked."""

import subprocess
import sys

import pytest
import torch

from tempflow.common.errors import BadInput
from tempflow.prompts import Prompt
from tempflow.rewards.scorer import Scorer, check_options, load_scorer

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
        (lambda images, prompts: torch.tensor([0.0, float("inf")])[: len(images)], "infinite"),
        (lambda images, prompts: ["high"] * len(images), "refuses"),
        (lambda images, prompts: None, "refuses"),
    ],
)
def test_wrong_answers_are_refused(answer, words):
    with pytest.raises(BadInput, match=words) as caught:
        Scorer("reward.name", "mine", answer, 2)(IMAGES[:4], PROMPTS[:4])
    assert caught.value.field == "reward.name"


def test_nan_is_passed_on():
    """A scorer without an opinion of an image says NaN."""
    scores = Scorer("reward.name", "mine", lambda images, prompts: [1.0, float("nan")], 2)(IMAGES[:2], PROMPTS[:2])
    assert scores[0] == 1 and scores[1].isnan()


OPTIONED = """
class Shifted:
    def __init__(self, shift, scale=1.0, device="cpu"):
        self.shift, self.scale, self.device = shift, scale, device

    def __call__(self, images, prompts):
        return [self.shift + self.scale] * len(images)


def plain(images, prompts):
    return [0.0] * len(images)
"""


@pytest.fixture
def optioned(tmp_path, monkeypatch):
    (tmp_path / "optioned_scorers.py").write_text(OPTIONED)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "optioned_scorers:Shifted"
    sys.modules.pop("optioned_scorers", None)


def test_options_and_device_reach_the_scorer(optioned):
    scorer = load_scorer("reward.name", optioned, 2, {"shift": 2.0, "scale": 0.5}, torch.device("meta"))
    assert scorer(IMAGES, PROMPTS).tolist() == [2.5] * 5
    assert scorer.function.device == torch.device("meta")
    assert load_scorer("r", optioned, 2, {"shift": 1, "device": "cpu"}, torch.device("meta")).function.device == "cpu"


def test_wrong_options_are_refused(optioned):
    with pytest.raises(BadInput, match=r"options\.optioned_scorers:Shifted\.shfit=1: no such option.*shift, scale"):
        load_scorer("reward.name", optioned, 2, {"shfit": 1})
    with pytest.raises(BadInput, match=r"Shifted\.shift=None: this scorer needs it"):
        load_scorer("reward.name", optioned, 2)
    with pytest.raises(BadInput, match=r"Shifted\.device=gpu: cannot be used here"):
        load_scorer("reward.name", optioned, 2, {"shift": 1, "device": "gpu"})
    with pytest.raises(BadInput, match="takes no options"):
        load_scorer("reward.name", "optioned_scorers:plain", 2, {"shift": 1})
    with pytest.raises(BadInput, match=r"reward\.options=pickscoer: the run has no scorer of this name; it has digits"):
        check_options({"pickscoer": {}}, ("digits", None))


def test_scores_carry_no_gradient():
    """A neural scorer need not say no_grad itself."""
    weight = torch.nn.Parameter(torch.ones(1))
    scorer = Scorer("reward.name", "neural", lambda images, prompts: images.float().mean((1, 2, 3)) * weight, 2)
    assert not scorer(IMAGES, PROMPTS).requires_grad


def test_scorer_of_the_working_folder_is_found_by_the_script(tmp_path):
    """`torchrun tempflow/train.py` has the script's folder on its path, not the user's."""
    (tmp_path / "scorers_here.py").write_text("def half(images, prompts):\n    return [0.5] * len(images)\n")
    code = (
        "import sys; sys.path.pop(0); from tempflow.rewards.scorer import load_scorer; "
        "load_scorer('r', 'scorers_here:half', 1)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)


@pytest.mark.parametrize("name", [":x", ".a:x", "pickscoer", "no_such_module:score", "math:no_function", "math:pi"])
def test_unknown_scorers_are_refused(name):
    with pytest.raises(BadInput) as caught:
        load_scorer("reward.gold", name, 2)
    assert caught.value.field == "reward.gold"
