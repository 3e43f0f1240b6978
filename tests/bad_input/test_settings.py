"""Settings on the command line, in files and in the environment."""

import os

import pytest

from tempflow.commands.train import main
from tempflow.settings.reading import load, to_yaml

NINES = "9" * 5000
OVERRIDES = {
    "words for a number": ("learn.lr=fast", "learn.lr"),
    "a number in quotes": ("learn.lr='1e-4'", "learn.lr"),
    "a truth value for a number": ("objective.kl=true", "objective.kl"),
    "a truth value for a whole number": ("run.seed=true", "run.seed"),
    "a truth value for a weight": ("reward.name={digits: true}", "reward.name"),
    "a number for a truth value": ("run.resume=1", "run.resume"),
    "a word for a truth value": ("run.resume=yes", "run.resume"),
    "a fraction for a whole number": ("explore.siblings=2.0", "explore.siblings"),
    "underscores": ("run.seed=1_000", "run.seed"),
    "base sixty": ("run.seed=1:30", "run.seed"),
    "a date": ("run.seed=2024-01-01", "run.seed"),
    "5000 digits": (f"run.seed={NINES}", "run.seed"),
    "5000 digits in base sixteen": (f"run.seed=0x{'f' * 5000}", "run.seed"),
    "300 digits": (f"learn.iterations={NINES[:300]}", "learn.iterations"),
    "a number beyond floats": (f"learn.lr={NINES[:399]}", "learn.lr"),
    "infinity": ("learn.lr=1e999", "learn.lr"),
    "nan": ("learn.lr=.nan", "learn.lr"),
    "a wait of 10^292 years": ("reward.patience=1e300", "reward.patience"),
    "steps beyond a schedule": ("sample.steps=1000000000", "sample.steps"),
    "a comment behind a number": ("learn.lr=1e-4 #fast", "learn.lr"),
    "a comment for a number": ("sample.height=#512", "sample.height"),
    "two documents": ("learn.lr=1\n--- 2", "learn.lr"),
    "deep lists": (f"explore.forks={'[' * 3000}", "explore.forks"),
    "deep mappings": (f"reward.options={'{a: ' * 300}", "reward.options"),
    "a list that holds itself": ("reward.options=&a {b: *a}", "reward.options"),
    "a tag": ("reward.options={a: {b: !!python/name:os.system }}", "reward.options"),
    "a key twice": ("reward.name={digits: 1, digits: 2}", "reward.name"),
    "a list too short": ("learn.betas=[0.8]", "learn.betas"),
    "null for a name": ("run.dir=null", "run.dir"),
    "nothing for a name": ("run.dir=", "run.dir"),
    "a NUL": ("run.dir=a\0b", "run.dir"),
    "half a character": ("run.dir=\udcff", "run.dir"),
    "nobody's home": ("run.dir=~nosuchuser/x", "run.dir"),
    "nobody's prompts": ("prompts.train=~nosuchuser/x", "prompts.train"),
    "a name of 5000 characters": (f"run.dir={'a' * 5000}", "run.dir"),
    "a path of 5000 folders": (f"model.path={'a/' * 5000}x", "model.path"),
    "fork steps of 5000 digits": (f"explore.forks=first:{NINES}", "explore.forks"),
    "no form of forks": ("explore.forks=007", "explore.forks"),
    "an old name": ("learn.kl=true", "learn.kl"),
    "an unknown field": ("learn.speed=1", "learn.speed"),
    "a device that is none": ("run.device=tpu", "run.device"),
    "an address without a scheme": ("reward.servers=[host:9000]", "reward.servers"),
    "a window beyond the steps": ("explore.window=2000000000", "explore.window"),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_overrides(refused, tmp_path, name):
    override, field = OVERRIDES[name]
    own = [] if override.startswith("run.dir=") else [f"run.dir={tmp_path / 'run'}"]
    refused(main, ["digits", *own, override], field, after_plan=field.startswith("explore."))
    assert not (tmp_path / "run").exists()


BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
FILES = {
    "a section twice": ("learn: {lr: 1}\nlearn: {rows: 2}\n", "preset"),
    "a field twice": ("learn: {lr: 1, lr: 2}\n", "preset"),
    "lists without end": ("[" * 3000, "preset"),
    "mappings without end": ("{a: " * 3000, "preset"),
    "entries without end": ("- " * 3000, "preset"),
    "aliases of aliases": (BOMB, "preset"),
    "a mapping that holds itself": ("x: &x\n  y: *x\n", "preset"),
    "a list for a key": ("? [a]\n: b\n", "preset"),
    "a tag": ("learn: !!python/object/apply:os.system [true]\n", "preset"),
    "two documents": ("a: {}\n---\nb: {}\n", "preset"),
    "a NUL": ("\0", "preset"),
    "a NUL in quotes": ('run: {dir: "a\\0"}\n', "preset"),
    "half a character": ('run: {dir: "\\ud800"}\n', "preset"),
    "a tabulator": ("learn:\n\tlr: 1\n", "preset"),
    "too large": ("# " + "x" * 300_000, "preset"),
    "a merge": ("learn: {<<: {lr: 1}}\n", "learn.<<"),
    "a truth value for a number": ("learn: {lr: yes}\n", "learn.lr"),
    "nobody's home": ("extends: ~nosuchuser/x.yaml\n", "extends"),
    "a base of 5000 characters": (f"extends: {'a' * 5000}\n", "extends"),
    "no UTF-8": (b"\xff\xfe\x00", "preset"),
}


@pytest.mark.parametrize("name", FILES)
def test_files(refused, tmp_path, name):
    content, field = FILES[name]
    file = tmp_path / "own.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(main, [file], field)


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/stdin", "/", "x" * 5000, "~nosuchuser/x.yaml", "a\0.yaml", "pipe"])
def test_paths_of_files(refused, tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    refused(main, [path], "preset")


@pytest.mark.parametrize(("variables", "field"), [
    ({"RANK": "abc", "WORLD_SIZE": "1"}, "RANK"),
    ({"RANK": "-1", "WORLD_SIZE": "1"}, "RANK"),
    ({"RANK": "9" * 5000, "WORLD_SIZE": "1"}, "RANK"),
    ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK"),
    ({"WORLD_SIZE": "2"}, "RANK"),
    ({"RANK": "0"}, "WORLD_SIZE"),
    ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE"),
    ({"RANK": "0", "WORLD_SIZE": "many"}, "WORLD_SIZE"),
    ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "x"}, "LOCAL_RANK"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"}, "MASTER_PORT"),
], ids=lambda value: value if isinstance(value, str) else " ".join(value))  # fmt: skip
def test_environments(refused, monkeypatch, tmp_path, variables, field):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refused(main, ["digits", f"run.dir={tmp_path / 'run'}"], field)


HUGE = 2**31 - 1
SIZES = {
    "explore.siblings": HUGE,
    "explore.noises": HUGE,
    "explore.prompts": 2**31 - 8,
    "model.lora_rank": HUGE,
    "model.text_tokens": HUGE,
    "sample.height": 2**30,
    "eval.noises": HUGE,
    "explore.take": HUGE,
    "explore.jump": HUGE,
    "learn.rows": HUGE,
    "learn.updates": HUGE,
}


@pytest.mark.parametrize("field", SIZES)
def test_sizes_that_no_memory_holds(refused, tmp_path, field):
    """By arithmetic: nothing is allocated."""
    rows = [] if field.startswith("learn") else ["learn.rows=1"]
    arguments = ["digits", f"run.dir={tmp_path / 'run'}", *rows, f"{field}={SIZES[field]}"]
    refused(main, arguments, field, after_plan=True)
    assert not (tmp_path / "run").exists()


def test_words_stay_words():
    """Where a field holds words, what looks like a number, a date or a truth value is a word."""
    for text in (
        "007",
        "1_000",
        "1.10",
        "12:30",
        "2024-13-01",
        "true",
        "1e5",
        "exp #2",
        "a: b",
        "[x]",
        "!x",
        "&a",
        "*a",
    ):
        assert load([f"run.dir={text}"]).run.dir == text
    assert load(["run.dir='a # b'"]).run.dir == "a # b"
    assert load(["reward.gold=[007, 1.10]"]).reward.gold == ["007", "1.10"]
    assert load(["prompts.test=null"]).prompts.test is None and load(["prompts.test=~"]).prompts.test is None


def test_numbers_are_those_of_yaml_1_2(tmp_path):
    assert load(["run.seed=010"]).run.seed == 10 and load(["run.seed=0x10"]).run.seed == 16
    assert load(["learn.lr=1e-4"]).learn.lr == load(["learn.lr=.1e-3"]).learn.lr == 1e-4
    (tmp_path / "own.yaml").write_text("run: {dir: 007, seed: 010}\nlearn: {lr: 1e-4}\n", encoding="utf-8-sig")
    own = load([str(tmp_path / "own.yaml")])
    assert (own.run.dir, own.run.seed, own.learn.lr) == ("007", 10, 1e-4)


@pytest.mark.parametrize(
    "text", ["007", "1e5", "0o17", "1.", "true", "null", "~", "12:30", "- a", "a: b", "#", "é\u2028"]
)
def test_words_survive_the_file_that_a_run_writes(tmp_path, text):
    config = load([f'reward.options={{a: {{b: "{text}"}}}}'])
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load([str(tmp_path / "config.yaml")]) == config
