"""Stacks: what lies on what, and which presets exclude one another."""

from itertools import product

import pytest

from tempflow.settings.reading import load, read_values
from tempflow.settings.stacks import names_of

METHODS = [name for name in names_of("methods") if name != "guard"]


def test_presets_are_laid_on_one_another_from_left_to_right(tmp_path):
    config = load(["flux1_dev", "g2rpo", "hpsv3", "learn.iterations=20"])
    assert config.model.path == "black-forest-labs/FLUX.1-dev" and config.sample.guidance == 3.5
    assert config.tails.stride == [1, 2] and config.sample.noise_level == 0.7, "the method's, not the model's"
    assert config.reward.name == "hpsv3" and config.learn.iterations == 20
    for name, rows in (("a", 3), ("b", 5)):
        (tmp_path / f"{name}.yaml").write_text(f"learn: {{rows: {rows}}}\n")
    a, b = str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")
    assert (load([a, b]).learn.rows, load([b, a]).learn.rows) == (5, 3)
    assert load(["sd35_geneval", a]).learn.rows == 3
    assert load(["g2rpo", "sd35_medium"]) == load(["sd35_medium", "g2rpo"]), "the same noise level"


@pytest.mark.parametrize("name", names_of("methods"))
def test_methods_alone_lie_on_digits(name):
    assert load([name]) == load(["digits", name])
    assert load([name, "learn.lr=1"]) == load(["digits", name, "learn.lr=1"])


def test_other_stacks_do_not_lie_on_digits(tmp_path):
    (tmp_path / "own.yaml").write_text("learn: {lr: 0.5}\n")
    assert load([str(tmp_path / "own.yaml"), "flow_grpo"]).sample.steps == 10
    assert load(["hpsv3"]).sample.steps == load(["sd35_medium"]).sample.steps == 10


@pytest.mark.parametrize(
    ("stack", "first", "second"),
    [
        ("sd35_medium flux1_dev", "sd35_medium", "flux1_dev"),
        ("sd35_geneval flux1_dev", "sd35_medium", "flux1_dev"),
        ("flux1_dev_80gb g2rpo qwen_image_80gb", "flux1_dev", "qwen_image"),
        ("sd35_medium_full_48gb sd35_large", "sd35_medium", "sd35_large"),
        ("digits z_image", "tiny_sd3", "z_image"),
        ("flow_grpo mixgrpo", "flow_grpo", "mixgrpo"),
        ("mixgrpo hpsv3 mixgrpo_flash guard", "mixgrpo", "mixgrpo_flash"),
    ],
)
def test_two_models_or_two_methods_are_refused(refusal, tmp_path, stack, first, second):
    (tmp_path / "own.yaml").write_text(f"extends: [{', '.join(stack.split())}]\n")
    for arguments in (stack.split(), [tmp_path / "own.yaml"]):
        error = refusal(arguments)
        assert error.field == "preset" and f"{first} and {second};" in str(error)


def test_the_same_model_or_method_twice_is_fine(tmp_path):
    assert load(["sd35_geneval", "sd35_medium", "sd35_pickscore"]).reward.name == "pickscore"
    (tmp_path / "own.yaml").write_text("extends: [sd35_medium, flow_grpo]\n")
    assert load([str(tmp_path / "own.yaml"), "geneval", "flow_grpo"]) == load(["sd35_medium", "geneval", "flow_grpo"])


def test_a_models_file_of_ones_own_may_be_swapped(tmp_path):
    (tmp_path / "own.yaml").write_text("extends: sd35_medium_24gb\nmodel: {path: elsewhere/sd35}\n")
    config = load([str(tmp_path / "own.yaml"), "dance_grpo"])
    assert config.model.path == "elsewhere/sd35" and config.sample.noise_level == 0.3


@pytest.mark.parametrize(
    ("stack", "lost"),
    [
        ("g2rpo flux1_dev hpsv3", "sample.noise_level"),
        ("dance_grpo sd35_geneval", "sample.noise_level"),
        ("flow_grpo digits", "explore.noises"),
        ("guard flow_grpo", "objective.weighting"),
    ],
)
def test_no_preset_takes_a_method_apart(refusal, tmp_path, stack, lost):
    (tmp_path / "own.yaml").write_text(f"extends: [{', '.join(stack.split())}]\n")
    for arguments in (stack.split(), [tmp_path / "own.yaml"]):
        error = refusal(arguments)
        assert error.field == "preset" and lost in str(error)


@pytest.mark.parametrize("method", METHODS)
def test_guard_goes_on_top_of_any_method(method):
    plain, guarded = load(["digits", method]), load(["digits", method, "guard"])
    objective = guarded.objective
    assert (objective.weighting, objective.ratio, objective.clip) == ("inverse_step", "guard", 2e-6)
    assert guarded.explore == plain.explore and guarded.credit == plain.credit and guarded.sample == plain.sample


@pytest.mark.parametrize(("task", "method"), product(("geneval", "pickscore", "hpsv3", "ocr"), METHODS))
def test_a_method_is_whole_wherever_a_task_is_named(task, method):
    assert load(["sd35_medium", method, task]) == load(["sd35_medium", task, method])
    set_by_method = read_values(method)
    config = load(["sd35_medium", task, method])
    for section, fields in set_by_method.items():
        for field, value in fields.items():
            found = getattr(getattr(config, section), field)
            assert found == (float(value) if isinstance(found, float) else value)


def test_a_file_of_ones_own_may_change_a_method(tmp_path):
    (tmp_path / "own.yaml").write_text("objective: {clip: 0.5}\n")
    assert load(["digits", "flow_grpo", str(tmp_path / "own.yaml")]).objective.clip == 0.5
    assert load(["digits", "flow_grpo", "objective.clip=0.5"]).objective.clip == 0.5


def test_extending_a_method_brings_it(refusal, tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: [flow_grpo, guard]\nobjective: {clip: 4.0e-6}\n")
    mine = str(tmp_path / "mine.yaml")
    config = load(["digits", mine])
    assert (config.objective.clip, config.objective.ratio, config.explore.noises) == (4e-6, "guard", 24)
    assert refusal(["digits", mine, "mixgrpo"]).field == "preset"
    assert "explore.noises" in str(refusal([mine, "digits"]))
