"""The command line contract: presets, YAML, `section.field=value`, and what is refused."""

import pytest

from tempflow.common.errors import BadInput
from tempflow.settings.checks import check_consistency
from tempflow.settings.fields import Config
from tempflow.settings.help import help_text
from tempflow.settings.reading import field_names, load, presets, to_yaml


def test_default_is_the_digits_preset():
    assert load([]) == load(["digits"])


def test_overrides_are_typed():
    config = load(["digits", "learn.lr=1e-4", "explore.forks=[0,2,4]", "learn.betas=[0.8,0.99]", "run.resume=true",
                   "sample.height=null", "run.dir=7", "learn.iterations=5"])  # fmt: skip
    assert config.learn.lr == 1e-4 and config.explore.forks == [0, 2, 4] and config.learn.betas == (0.8, 0.99)
    assert config.run.resume is True and config.sample.height is None and config.run.dir == "7"
    assert load(["learn.lr=2e-4", "explore.forks=random:3"]).branch.steps == "random:3"


def test_configuration_reloads_from_what_a_run_writes(tmp_path):
    config = load(["digits", "objective.kl=0.01", "explore.forks=[1, 2]", "run.trackers=[]"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load([str(tmp_path / "config.yaml")]) == config


def test_a_preset_may_extend_another(tmp_path):
    base, child = tmp_path / "base.yaml", tmp_path / "child.yaml"
    base.write_text("learn: {lr: 0.5, kl: 0.25}\n")
    child.write_text("extends: base.yaml\nlearn: {kl: 0.75}\n")  # beside the file that names it
    config = load([str(child)])
    assert (config.learn.lr, config.objective.kl) == (0.5, 0.75)


@pytest.mark.parametrize(
    ("arguments", "field", "words"),
    [
        (["lern.lr=1"], "lern", "learn"),
        (["learn.learning_rate=1"], "learn.learning_rate", "nearest: learn."),
        (["branch.sibling=4"], "branch.sibling", "explore.siblings"),
        (["learn.lr=fast"], "learn.lr", "valid number"),
        (["learn.lr=-1"], "learn.lr", "greater than 0"),
        (["explore.siblings=2.5"], "explore.siblings", "integer"),
        (["credit.group=sed"], "credit.group", "seed"),
        (["learn.lr=nan"], "learn.lr", "finite"),
        (["learn.lr=[1"], "learn.lr", "YAML"),
        (["digits", "learn"], "argument", "section.field=value"),
        (["lr=3"], "argument", "section.field=value"),
        (["sd35_digits"], "preset", "presets: digits"),
    ],
)
def test_wrong_arguments_are_refused_with_the_nearest_name(arguments, field, words):
    with pytest.raises(BadInput) as caught:
        load(arguments)
    assert caught.value.field == field and words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    ["learn: {lr: [}", "- a\n- b\n", "learn: 3\n", "learn: {lr: 1}\nextra: {x: 1}\n", "extends: [x]\n"],
)
def test_broken_files_are_refused(tmp_path, content):
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(BadInput):
        load([str(path)])


def test_help_has_a_sentence_for_every_field():
    text = help_text()
    for name in field_names():
        sentence = text.split(f"  {name}=")[1].split("\n")[1]
        assert sentence.strip() not in ("", "None"), name
    assert all(preset in text for preset in presets())


def test_presets_are_valid():
    for name in presets():
        assert isinstance(load([name]), Config)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_default_run_works_with_several_processes(processes):
    check_consistency(load([]), processes)
    check_consistency(Config(), processes)


def test_presets_that_extend_each_other_in_a_circle_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(BadInput, match="circle"):
        load([str(tmp_path / "a.yaml")])


def test_configuration_is_frozen():
    with pytest.raises(AttributeError):
        load([]).learn.lr = 3
