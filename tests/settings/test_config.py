"""The command line contract: presets, YAML, `section.field=value`, and what is refused."""

import subprocess
import sys
from dataclasses import replace

import pytest

from tempflow.settings.help import help_text
from tempflow.settings.reading import changeable_fields, field_names, load, presets, to_yaml

MAY_CHANGE_ON_RESUME = {
    "run.resume", "run.dir", "run.if_taken", "run.save_every", "run.keep_checkpoints", "run.trackers", "run.project",
    "eval.gallery", "eval.gallery_mb", "run.plan_only", "run.device", "run.grace",
    "learn.iterations", "learn.max_seconds", "learn.compile", "eval.every", "tails.rows", "tails.level", "tails.check",
    "tails.autotune", "tails.compile_vae",
    "reward.rows", "reward.overlap", "reward.hacking_drop", "reward.hacking_stop", "reward.servers", "reward.batch",
    "reward.requests", "reward.timeout", "reward.patience", "reward.token_file",
    "run.noise", "learn.noise", "learn.skip_limit", "parallel.shard", "parallel.per_node",
    "parallel.offload", "parallel.merged", "parallel.gpu_gib", "parallel.ranks",
}  # fmt: skip

RENAMED = {
    "branch.steps": "explore.forks", "branch.prompts": "explore.prompts", "branch.seeds": "explore.noises",
    "branch.siblings": "explore.siblings", "branch.rows": "tails.rows", "branch.decode_rows": "reward.rows",
    "branch.overlap": "reward.overlap", "learn.clip_range": "objective.clip",
    "learn.weighting": "objective.weighting", "learn.group": "credit.group", "learn.advantage_std": "credit.std",
    "learn.advantage_clip": "credit.clip", "learn.kl": "objective.kl", "learn.kl_divisor": "objective.kl_divisor",
}  # fmt: skip


def test_without_a_name_the_stack_is_the_default_run_and_methods_alone_lie_on_digits():
    assert load([]) == load(["digits_even"]) != load(["digits"])
    assert load(["flow_grpo"]) == load(["digits", "flow_grpo"]) and load(["learn.lr=1e-4"]).explore.prompts == 32


def test_overrides_are_typed():
    config = load(["digits", "learn.lr=1e-4", "explore.forks=[0,2,4]", "learn.betas=[0.8,0.99]", "run.resume=true",
                   "sample.height=null", "run.dir=7", "learn.iterations=5", "objective.weighting=[1,.5]"])  # fmt: skip
    assert config.learn.lr == 1e-4 and config.explore.forks == [0, 2, 4] and config.learn.betas == (0.8, 0.99)
    assert config.run.resume is True and config.sample.height is None and config.run.dir == "7"
    assert config.objective.weighting == [1.0, 0.5]
    assert load(["learn.lr=2e-4", "explore.forks=random:3"]).explore.forks == "random:3"
    assert load(["explore.window=rest", "explore.jump=[1,2]"]).explore.jump == [1, 2]


def test_configuration_reloads_from_what_a_run_writes(tmp_path):
    config = load(["digits", "objective.kl=0.01", "explore.forks=[1, 2]", "run.trackers=[]", "tails.stride=[1, 2]"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load([str(tmp_path / "config.yaml")]) == config


def test_what_a_resumed_run_writes_starts_a_new_run(tmp_path):
    config = load(["digits", "run.resume=true"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    again = load([str(tmp_path / "config.yaml")])
    assert again.run.resume is False
    assert replace(again, run=replace(again.run, resume=True)) == config


def test_a_file_may_extend_others(tmp_path):
    (tmp_path / "base.yaml").write_text("learn: {lr: 0.5, rows: 3, updates: 7}\n")
    (tmp_path / "second.yaml").write_text("learn: {lr: 0.25, rows: 5}\nrun:\n")  # an empty section states nothing
    (tmp_path / "one.yaml").write_text("extends: base.yaml\nlearn: {lr: 0.75}\n")  # beside the file that names it
    (tmp_path / "two.yaml").write_text("extends: [base.yaml, second.yaml]\nlearn: {rows: 9}\n")
    one, two = (load([str(tmp_path / f"{name}.yaml")]).learn for name in ("one", "two"))
    assert (one.lr, one.rows, one.updates) == (0.75, 3, 7)
    assert (two.lr, two.rows, two.updates) == (0.25, 9, 7)


def test_a_file_may_extend_a_preset_and_lie_in_a_folder_with_an_equals_sign(tmp_path):
    folder = tmp_path / "learn.lr=1"
    folder.mkdir()
    (folder / "own.yaml").write_text("extends: digits\nlearn: {rows: 6}\n")
    assert load([str(folder / "own.yaml")]) == load(["digits", "learn.rows=6"])


@pytest.mark.parametrize(
    ("arguments", "field", "offered"),
    [
        (["lern.lr=1"], "lern.lr", "learn.lr"),
        (["learn.learning_rate=1"], "learn.learning_rate", "learn."),
        (["branch.sibling=4"], "branch.sibling", "explore.siblings"),
        (["branch.decode_row=4"], "branch.decode_row", "reward.rows"),
        (["learn.lr=fast"], "learn.lr", ""),
        (["learn.lr=-1"], "learn.lr", "0"),
        (["learn.lr="], "learn.lr", ""),
        (["learn.lr=nan"], "learn.lr", ""),
        (["learn.lr=[1"], "learn.lr", "YAML"),
        (["explore.siblings=2.5"], "explore.siblings", ""),
        (["explore.window=rst"], "explore.window", "rest"),
        (["explore.jump=[1,0]"], "explore.jump", "1"),
        (["credit.group=sed"], "credit.group", "seed"),
        (["objective.weighting=[1,-1]"], "objective.weighting", "0"),
        (["digits", "lr=3"], "argument", "section.field=value"),
        (["=3"], "argument", "section.field=value"),
        (["digits", "learn.lr"], "preset", "learn.lr="),
        (["digits", "learn.lr=1", "flow_grpo"], "argument", "flow_grpo"),
        (["sd35_genevl"], "preset", "sd35_geneval"),
        (["digits", "flow_gpro"], "preset", "flow_grpo"),
        (["nowhere/digits.yaml"], "preset", "nowhere/digits.yaml"),
    ],
)
def test_wrong_arguments_are_refused_with_the_nearest_name(refusal, arguments, field, offered):
    error = refusal(arguments)
    assert error.field == field and offered in str(error)


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ("learn: {lr: [}", "preset"),
        (b"\xff\xfe\x00", "preset"),
        ("- a\n- b\n", "preset"),
        ("just words\n", "preset"),
        ("learn: 3\n", "learn"),
        ("learn: [lr, 3]\n", "learn"),
        ("learn: {lr: 1}\nextra: {x: 1}\n", "extra.x"),
        ("1: {2: 3}\n", "1.2"),
        ("learn: {lr: {deep: 1}}\n", "learn.lr"),
        ("extends: [x]\n", "extends"),
        ("extends: {digits: 1}\n", "extends"),
        ("extends: [3]\n", "extends"),
        ("extends: missing.yaml\n", "extends"),
        ("on_top: true\nlearn: {lr: 1}\n", "on_top"),
    ],
)
def test_broken_files_are_refused(refusal, tmp_path, content, field):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert refusal([path]).field == field


def test_presets_that_extend_each_other_in_a_circle_are_refused(refusal, tmp_path):
    (tmp_path / "a.yaml").write_text("extends: [digits, b.yaml]\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    assert refusal([tmp_path / "a.yaml"]).field == "extends"


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_old_names_are_answered_with_the_new_ones(refusal, tmp_path, old, new):
    section, field = old.split(".")
    (tmp_path / "old.yaml").write_text(f"{section}: {{{field}: 2}}\n")
    for arguments in (["digits", f"{old}=2"], [tmp_path / "old.yaml"], [tmp_path / "old.yaml", f"{new}=2"]):
        error = refusal(arguments)
        assert error.field == old and str(error).endswith(new) and "nearest" not in str(error), "known, not guessed"
    assert new in field_names() and old not in field_names()


def test_an_old_configuration_tells_all_new_names_at_once(refusal, tmp_path):
    (tmp_path / "config.yaml").write_text("branch: {siblings: 6, rows: 9}\nlearn: {lr: 0.1, kl: 0.0}\n")
    error = refusal([tmp_path / "config.yaml"])
    assert error.field == "branch.siblings"
    assert all(new in str(error) for new in ("explore.siblings", "tails.rows", "objective.kl"))


def test_help_has_a_sentence_for_every_field_and_preset():
    text = help_text()
    for name in field_names():
        sentence = text.split(f"  {name}=")[1].split("\n")[1]
        assert sentence.strip() not in ("", "None"), name
    for name in presets():
        sentence = text.split(f"\n  {name}\n")[1].split("\n")[0].strip()
        assert sentence.endswith(".") and "#" not in sentence, name
    assert "learn.lr=0.0003" in text and "sample.height=null" in text


def test_help_and_wrong_settings_are_answered_at_once():
    """Neither waits for torch: seconds, on a cluster's file system. The time is the processor's, whatever else runs."""
    program = (
        "import resource, sys, tempflow.settings.checks\n"
        "from tempflow.common.errors import BadInput\n"
        "from tempflow.settings.help import help_text\n"
        "from tempflow.settings.reading import load\n"
        "assert help_text()\n"
        "try:\n    load(['digits', 'lern.lr=1'])\nexcept BadInput as error:\n    assert error.field == 'lern.lr'\n"
        "heavy = {'torch', 'numpy', 'diffusers', 'transformers', 'peft', 'PIL', 'matplotlib'}\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_utime, *heavy & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    seconds, *heavy = done.stdout.split()
    assert not heavy and float(seconds) < 1


def test_fields_that_may_change_on_resume():
    """Nothing that a finished iteration depends on is among them."""
    assert changeable_fields() == MAY_CHANGE_ON_RESUME < set(field_names())


def test_configuration_is_frozen():
    with pytest.raises(AttributeError):
        load([]).learn.lr = 3
