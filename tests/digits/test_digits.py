"""The embedded digits benchmark: its prompts, judges and pipeline keep what they promise."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tempflow.digits
from tempflow.digits.canvas import BLANK, POSITIONS, Renderer, cells_of, classes_of, compose, load_splits
from tempflow.digits.captions import KINDS, NAMES, PLURALS, Caption
from tempflow.digits.classifiers import load_classifier
from tempflow.digits.making import figures
from tempflow.digits.making.generator import (
    encode_pictures,
    flow_loss,
    random_canvases,
    random_classes,
    train_autoencoder,
)
from tempflow.digits.making.make import make_prompts
from tempflow.digits.scorers import DigitsGold, DigitsReward

ASSETS = Path(tempflow.digits.__file__).parent


@dataclass
class FakePrompt:
    text: str
    metadata: dict = field(default_factory=dict)


def read_prompts(name: str) -> list[dict]:
    return [json.loads(line) for line in (ASSETS / "prompts" / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def splits():
    pytest.importorskip("sklearn")
    return load_splits()


@pytest.fixture(scope="module")
def real_canvases(splits):
    """Canvases of digits no classifier was trained on, each with a prompt it satisfies."""
    split = splits["pipeline"]
    rows = read_prompts("test") * 2
    classes = torch.tensor([classes_of(row["grids"][-1]) for row in rows])
    images = Renderer(split.heldout_images, split.heldout_labels)(classes, torch.Generator().manual_seed(3))
    return images, [FakePrompt(row["prompt"], {"grids": row["grids"]}) for row in rows]


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import StableDiffusion3Pipeline

    loaded = StableDiffusion3Pipeline.from_pretrained(ASSETS / "pipeline")
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_prompts_are_made_as_shipped(tmp_path):
    """To the byte: whoever makes the benchmark anew compares figures with those of the shipped prompts."""
    make_prompts(tmp_path)
    for name in ("train", "test"):
        made = (tmp_path / "prompts" / f"{name}.jsonl").read_bytes()
        assert made == (ASSETS / "prompts" / f"{name}.jsonl").read_bytes()


def test_a_fresh_autoencoder_has_latents_of_mean_0_and_deviation_1(splits):
    """However little it was trained: the transformer learns on what the scaling and shift make of them."""
    draw = Renderer(splits["pipeline"].images, splits["pipeline"].labels)
    autoencoder = train_autoencoder(random_canvases(draw), 16, 5, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        latents = encode_pictures(autoencoder, draw(random_classes(256, generator), generator))
    assert latents.shape == (256, 4, 8, 8)
    assert latents.mean().abs() < 0.05 and 0.95 < latents.std() < 1.05


def test_the_flow_is_trained_towards_noise_minus_data():
    """A network that knows the data gives exactly that from the noisy latents, and has no loss."""
    data = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def knows(hidden_states, timestep, encoder_hidden_states, pooled_projections, return_dict):
        assert encoder_hidden_states[:, 0, 0].tolist() == [0, 0, 0, 1, 1, 1]  # three pictures for each of two texts
        return ((hidden_states - data) / (timestep / 1000).view(-1, 1, 1, 1),)

    embeds = torch.arange(2.0).view(2, 1, 1).expand(2, 3, 8), None, torch.zeros(2, 8), None
    pipeline = SimpleNamespace(transformer=knows, encode_prompt=lambda *texts, **settings: embeds)
    assert flow_loss(pipeline, ["one", "two"], data, 0, torch.Generator().manual_seed(2)) < 1e-6
    assert flow_loss(pipeline, ["one", "two"], data + 1, 0, torch.Generator().manual_seed(2)) > 0.5


def test_the_report_counts_by_prompt(monkeypatch):
    """Four prompts of eight pictures, of which 0, 8, 3 and 1 follow: 12 of 32, and two prompts have both."""
    captions = [Caption("single", str(number), ((None,) * 4,)) for number in (0, 8, 3, 1)]
    judge = lambda path: lambda images, prompts: images.float()  # noqa: E731
    followed = torch.cat([(torch.arange(8) < int(caption.text)) for caption in captions])
    monkeypatch.setattr(figures, "test_prompts", lambda: captions)
    monkeypatch.setattr(figures, "generate", lambda pipeline, texts, seed: followed)
    monkeypatch.setattr(figures, "DigitsGold", judge)
    monkeypatch.setattr(figures, "DigitsReward", judge)
    line = next(figures.report_base(ASSETS, None))
    assert "4 test prompts x 8" in line and "gold 0.3750" in line and "successes and failures 0.500" in line


def test_train_and_test_share_no_prompt():
    train, test = ({row["prompt"] for row in read_prompts(name)} for name in ("train", "test"))
    assert len(train) == len(read_prompts("train"))
    assert not train & test
    assert 128 <= len(test) <= 192
    assert {row["kind"] for row in read_prompts("test")} == set(KINDS)


def test_train_holds_every_word_digit_and_position():
    train, test = read_prompts("train"), read_prompts("test")
    words = {word for row in train for word in row["prompt"].split()}
    assert words >= {word for row in test for word in row["prompt"].split()}
    placed = {(cell, digit) for row in train for grid in row["grids"] for cell, digit in enumerate(grid)}
    assert placed >= {(cell, digit) for cell in range(4) for digit in (*range(10), None)}


@pytest.mark.parametrize("name", ["train", "test"])
def test_grids_hold_only_the_digits_the_prompt_names(name):
    for row in read_prompts(name):
        words = row["prompt"].replace("exactly ", "").split()
        if row["kind"] == "count":
            words = words[1:]  # the first is the number
        named = {number for number in range(10) if {NAMES[number], PLURALS[number]} & set(words)}
        for grid in row["grids"]:
            assert {digit for digit in grid if digit is not None} == named, row


@pytest.mark.parametrize("name", ["train", "test"])
def test_grids_agree_with_positions_and_counts(name):
    for row in read_prompts(name):
        text = row["prompt"]
        if row["kind"] in ("single", "pair"):
            for cell, position in enumerate(POSITIONS):
                assert (row["grids"][0][cell] is not None) == (position in text), row
        if row["kind"] == "count":
            number = NAMES.index(text.removeprefix("exactly ").split()[0])
            assert {4 - grid.count(None) for grid in row["grids"]} == {number}, row
            assert len({tuple(grid) for grid in row["grids"]}) == [4, 6, 4, 1][number - 1], row


def relation_holds(text: str, grid: list) -> bool:
    """Whether the grid shows the first digit of the text above, below, left or right of the second."""
    first, second = (NAMES.index(word) for word in text.split() if word in NAMES)
    row_one, column_one = divmod(grid.index(first), 2)
    row_two, column_two = divmod(grid.index(second), 2)
    steps = {"above": (-1, 0), "below": (1, 0), "left": (0, -1), "right": (0, 1)}
    relation = next(word for word in text.split() if word in steps)
    return (row_one - row_two, column_one - column_two) == steps[relation]


@pytest.mark.parametrize("name", ["train", "test"])
def test_relation_grids_show_the_relation(name):
    relations = [row for row in read_prompts(name) if row["kind"] == "relation"]
    assert all(len(row["grids"]) == 2 for row in relations)
    assert all(relation_holds(row["prompt"], grid) for row in relations for grid in row["grids"])


def test_splits_share_no_digit(splits):
    members = [split.members for split in splits.values()]
    assert sum(map(len, members)) == len(frozenset.union(*members)) == 1797
    for split in splits.values():
        assert len(split.members) == len(split.labels) + len(split.heldout_labels)


def test_cells_come_back_in_the_order_they_were_composed():
    cells = torch.randint(256, (5, 4, 8, 8), dtype=torch.uint8)
    images = compose(cells)
    assert torch.equal(images[:, 0, :8, 8:], cells[:, 1])  # the second cell is top right
    assert torch.allclose(cells_of(images) * 255, cells.float(), atol=1e-3)


def test_satisfying_canvases_score_high(real_canvases):
    images, prompts = real_canvases
    assert DigitsGold()(images, prompts).mean() >= 0.95
    assert DigitsReward()(images, prompts).mean() >= 0.95


def test_one_wrong_cell_fails_and_costs_a_quarter(real_canvases, splits):
    images, prompts = real_canvases
    unwanted = [min(set(range(10)) - {grid[0] for grid in prompt.metadata["grids"]}) for prompt in prompts]
    split = splits["pipeline"]
    draw = Renderer(split.heldout_images, split.heldout_labels)
    others = draw(torch.tensor(unwanted)[:, None].expand(-1, 4), torch.Generator().manual_seed(4))
    spoilt = images.clone()
    spoilt[:, :, :8, :8] = others[:, :, :8, :8]
    assert DigitsGold()(spoilt, prompts).mean() < 0.05
    cost = DigitsReward()(images, prompts) - DigitsReward()(spoilt, prompts)
    assert 0.2 < cost.mean() < 0.3


def test_empty_canvases_satisfy_no_prompt_that_wants_digits(real_canvases):
    images, prompts = real_canvases
    black = torch.zeros_like(images)
    assert DigitsGold()(black, prompts).max() == 0
    assert DigitsReward()(black, prompts).max() < 0.8


def test_any_acceptable_grid_is_enough(splits):
    split = splits["gold"]
    draw = Renderer(split.images, split.labels)
    grids = [[2, None, None, None], [None, None, 2, None]]
    images = draw(torch.tensor([classes_of(grid) for grid in grids]), torch.Generator().manual_seed(0))
    both, first = FakePrompt("a two", {"grids": grids}), FakePrompt("a two", {"grids": grids[:1]})
    assert DigitsGold()(images, [both, both]).tolist() == [1, 1]
    assert DigitsGold()(images, [first, first]).tolist() == [1, 0]
    assert DigitsReward()(images, [first, first]).diff().item() < -0.3


def test_gold_is_strict_and_reward_graded(real_canvases):
    images, prompts = real_canvases
    noisy = (images.float() * 0.5 + 90 * torch.rand(images.shape)).to(torch.uint8)
    gold, reward = DigitsGold()(noisy, prompts), DigitsReward()(noisy, prompts)
    assert gold.dtype == reward.dtype == torch.float32 and gold.shape == reward.shape == (len(images),)
    assert set(gold.tolist()) <= {0.0, 1.0}
    assert reward.min() >= 0 and reward.max() <= 1 and len(reward.unique()) > 10


def test_judges_have_different_architectures():
    kinds = [{type(part).__name__ for part in load_classifier(name, ASSETS / f"{name}.safetensors").modules()}
             for name in ("reward", "gold")]  # fmt: skip
    assert "Conv2d" in kinds[0] and "Conv2d" not in kinds[1]
    assert "MultiheadAttention" in kinds[1] and "MultiheadAttention" not in kinds[0]


@pytest.mark.parametrize("metadata", [{}, {"grids": []}, {"grids": [[1, 2]]}, {"grids": [[1, 2, 3, 11]]}])
def test_unusable_grids_are_refused_by_name(metadata):
    with pytest.raises(ValueError, match=r'"a lonely two".*"grids"'):
        DigitsReward()(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), [FakePrompt("a lonely two", metadata)])


def test_pictures_of_another_size_are_refused():
    prompt = FakePrompt("nothing", {"grids": [[None] * 4]})
    with pytest.raises(ValueError, match=r"found \(1, 3, 32, 32\), expected \(B, 3, 16, 16\)"):
        DigitsGold()(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), [prompt])


def test_scorers_load_without_scikit_learn():
    code = "import sys; sys.modules['sklearn'] = None; from tempflow.digits.scorers import DigitsGold; DigitsGold()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_assets_are_small():
    assert sum(file.stat().st_size for file in (ASSETS / "pipeline").rglob("*") if file.is_file()) <= 8 * 2**20
    assert all((ASSETS / f"{name}.safetensors").stat().st_size < 300_000 for name in ("reward", "gold"))


def test_every_word_of_every_prompt_is_one_known_token(pipeline):
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
        for row in read_prompts("train") + read_prompts("test"):
            ids = tokenizer(row["prompt"]).input_ids
            assert len(ids) == len(row["prompt"].split()) + 2 <= tokenizer.model_max_length, row["prompt"]
            assert tokenizer.unk_token_id not in ids[1:-1], row["prompt"]


def test_plain_pipeline_draws_canvases_that_follow_prompts_sometimes(pipeline):
    rows = read_prompts("test")[::3]
    texts = [row["prompt"] for row in rows]
    images = pipeline(texts, num_inference_steps=10, guidance_scale=1.0, output_type="pt", max_sequence_length=16,
                      generator=torch.Generator().manual_seed(0)).images  # fmt: skip
    assert images.shape == (len(rows), 3, 16, 16) and torch.isfinite(images).all()
    prompts = [FakePrompt(row["prompt"], {"grids": row["grids"]}) for row in rows]
    followed = DigitsGold()((images * 255).round().to(torch.uint8), prompts).mean()
    assert 0.2 < followed < 0.8


def test_blank_cells_read_as_blank():
    classifier = load_classifier("gold", ASSETS / "gold.safetensors")
    assert classifier(torch.zeros(1, 8, 8)).argmax().item() == BLANK
