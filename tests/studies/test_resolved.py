"""Results mean the settings that they were made with, not what presets and files have come to say since."""

from pathlib import Path

import pytest
import yaml
from small_studies import forget_runs, study

from tempflow.studies.compare.resolved import check_resolved, read_resolved, resolved, write_resolved
from tempflow.studies.compare.study import configuration, read_study

COMMITTED = sorted(Path(__file__).parents[2].glob("benchmarks/results/study/*/results.csv"))


@pytest.fixture
def mine(tmp_path):
    """A file of settings in the stack of one of two runs, which can be changed."""
    path = tmp_path / "mine.yaml"

    def write(**learn) -> dict[str, list[str]]:
        path.write_text(yaml.safe_dump({"learn": learn}))
        return {"all": ["tempflow", str(path)], "first": ["tempflow", "explore.forks=first:1"]}

    return write


def test_a_file_that_has_changed_is_not_what_results_elsewhere_were_made_with(tmp_path, made, mine, capsys):
    assert study(tmp_path, runs=mine(lr=1e-3)) == 0 and len(made()) == 4
    assert study(tmp_path, name="two", runs=mine(lr=1e-3)) == 0 and made() == set()
    assert study(tmp_path, name="three", runs=mine(lr=2e-3)) == 0
    assert made() == {"three all seed_1", "three all seed_2"}
    assert "2 runs are those of the same settings in" in capsys.readouterr().out


def test_a_study_is_not_gone_on_with_in_other_settings(tmp_path, made, mine, capsys):
    assert study(tmp_path, runs=mine(lr=1e-3)) == 0 and len(made()) == 4
    forget_runs(tmp_path, "one")
    kept = (tmp_path / "studies" / "one" / "results.csv").read_text()
    capsys.readouterr()
    for more in ([], ["--dry-run"]):
        assert study(tmp_path, *more, runs=mine(lr=2e-3)) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("tempflow: runs.all=learn.lr=0.002") and "0.001" in line
    assert made() == set() and (tmp_path / "studies" / "one" / "results.csv").read_text() == kept


def test_settings_that_may_change_in_a_run_may_change_in_a_study(tmp_path, made, mine):
    assert study(tmp_path, runs=mine(skip_limit=3)) == 0 and len(made()) == 4
    forget_runs(tmp_path, "one")
    assert study(tmp_path, runs=mine(skip_limit=4)) == 0
    assert made() == {"one all seed_1", "one all seed_2"}


def change(tmp_path, edit) -> None:
    path = tmp_path / "studies" / "one" / "settings.yaml"
    content = yaml.safe_load(path.read_text())
    edit(content)
    path.write_text(yaml.safe_dump(content))


def test_a_setting_that_came_later_leaves_results_what_they_are(tmp_path, made):
    """At the time of the results there was only what is done where nothing is said."""
    assert study(tmp_path) == 0 and len(made()) == 4
    change(tmp_path, lambda content: content["shared"]["credit"].pop("idle"))
    assert study(tmp_path, name="two") == 0 and made() == set()
    forget_runs(tmp_path, "one")
    assert study(tmp_path) == 0 and made() == set()


def test_a_setting_that_is_gone_makes_runs_anew(tmp_path, made, capsys):
    assert study(tmp_path) == 0 and len(made()) == 4
    change(tmp_path, lambda content: content["runs"]["first"].update(credit={"wings": 2}))
    assert study(tmp_path, name="two") == 0
    assert made() == {"two first seed_1", "two first seed_2"}
    assert study(tmp_path) == 2 and "runs.first" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("text", ["", "[1]", "shared: {}", "shared: {}\nruns: [a]", "shared: 1\nruns: {a: {}}", "a: ["])
def test_foreign_settings_are_one_line(tmp_path, made, capsys, text):
    assert study(tmp_path) == 0
    (tmp_path / "studies" / "one" / "settings.yaml").write_text(text)
    for name in ("one", "two"):
        capsys.readouterr()
        assert study(tmp_path, name=name) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("tempflow: study=")


@pytest.mark.parametrize("name", ["fig3", "steps"])
def test_what_is_written_is_read_again(tmp_path, name):
    ours = read_study(name)
    write_resolved(ours, tmp_path)
    assert read_resolved(tmp_path / "settings.yaml") == {r: resolved(configuration(ours, r)) for r in ours.runs}


@pytest.mark.parametrize("results", COMMITTED, ids=lambda path: path.parent.name)
def test_committed_results_are_of_the_settings_that_their_study_has(results):
    """A preset that changes has to leave them what they were: their study names what it was then, or they go."""
    check_resolved(read_study(str(results.parent / "study.yaml")), results.parent)
    assert read_resolved(results.parent / "settings.yaml")
