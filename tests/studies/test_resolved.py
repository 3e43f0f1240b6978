"""Results mean the settings that they were made with, not what presets and files have come to say since."""

import shutil
import sys
from pathlib import Path

import pytest
import yaml
from small_studies import forget_runs, study

from tempflow.studies.compare import jobs as jobs_module
from tempflow.studies.compare.known import read_results
from tempflow.studies.compare.resolved import read_resolved, resolved, write_resolved
from tempflow.studies.compare.study import SHIPPED, configuration, open_folder, read_study

COMMITTED = sorted(Path(__file__).parents[2].glob("benchmarks/results/study/*/results.csv"))
FIRST = ["tempflow", "explore.forks=first:1"]


@pytest.fixture
def mine(tmp_path):
    """A file of settings in the stack of one of two runs, which can be changed."""
    path = tmp_path / "mine.yaml"

    def write(**learn) -> dict[str, list[str]]:
        path.write_text(yaml.safe_dump({"learn": learn}))
        return {"all": ["tempflow", str(path)], "first": FIRST}

    return write


def place(tmp_path, name: str = "one") -> Path:
    return tmp_path / "studies" / name


def rows(tmp_path, name: str = "one") -> set[tuple[str, int]]:
    return {(point.run, point.seed) for point in read_results(place(tmp_path, name) / "results.csv")}


def last_line(capsys) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def test_a_file_that_has_changed_is_not_what_results_elsewhere_were_made_with(tmp_path, made, mine, capsys):
    assert study(tmp_path, runs=mine(lr=1e-3)) == 0 and len(made()) == 4
    assert study(tmp_path, name="two", runs=mine(lr=1e-3)) == 0 and made() == set()
    assert study(tmp_path, name="three", runs=mine(lr=2e-3)) == 0
    assert made() == {"three all seed_1", "three all seed_2"}
    assert "2 runs are those of the same settings in" in capsys.readouterr().out


def test_a_study_is_not_gone_on_with_in_other_settings(tmp_path, made, mine, capsys):
    assert study(tmp_path, runs=mine(lr=1e-3)) == 0 and len(made()) == 4
    forget_runs(tmp_path, "one")
    kept = (place(tmp_path) / "results.csv").read_text()
    for more in ([], ["--dry-run"]):
        assert study(tmp_path, *more, runs=mine(lr=2e-3)) == 2
        line = last_line(capsys)
        assert line.startswith("tempflow: runs.all=learn.lr=0.002") and "0.001" in line
    assert made() == set() and (place(tmp_path) / "results.csv").read_text() == kept


def test_settings_that_may_change_in_a_run_may_change_in_a_study(tmp_path, made, mine):
    """What was made stays, and is told as what it was made with."""
    assert study(tmp_path, runs=mine(skip_limit=3)) == 0 and len(made()) == 4
    forget_runs(tmp_path, "one")
    assert study(tmp_path, runs=mine(skip_limit=4), seeds=[1, 2, 5]) == 0
    assert made() == {"one all seed_5", "one first seed_5"}
    assert read_resolved(place(tmp_path))["all"]["learn.skip_limit"] == 3


def test_a_file_that_changes_while_a_study_goes_on_ends_it(tmp_path, made, mine, monkeypatch, capsys):
    """The runs that were begun before are told as they were made; no other study takes them for the new ones."""
    runs, start = mine(lr=1e-3), jobs_module.Job.command

    def command(job):
        mine(lr=2e-3)
        return start(job)

    monkeypatch.setattr(jobs_module.Job, "command", command)
    assert study(tmp_path, "--processes", "1", runs=runs) == 1
    assert made() == {"one all seed_1", "one first seed_1", "one first seed_2"}
    assert "all, seed 2" in capsys.readouterr().err
    assert read_resolved(place(tmp_path))["all"]["learn.lr"] == 1e-3
    monkeypatch.setattr(jobs_module.Job, "command", start)
    assert study(tmp_path, name="two", runs=mine(lr=2e-3)) == 0
    assert made() == {"two all seed_1", "two all seed_2"}


def test_a_file_that_is_gone_at_the_end_costs_no_report(tmp_path, made, mine, monkeypatch):
    runs, start = mine(lr=1e-3), jobs_module.Job.command

    def command(job):
        (tmp_path / "mine.yaml").unlink(missing_ok=True)
        return start(job)

    monkeypatch.setattr(jobs_module.Job, "command", command)
    assert study(tmp_path, "--processes", "1", runs=runs) == 1
    assert all((place(tmp_path) / name).is_file() for name in ("results.csv", "settings.yaml", "study.html"))


def fail(monkeypatch) -> None:
    monkeypatch.setattr(jobs_module.Job, "command", lambda job: [sys.executable, "-c", "raise SystemExit('no')"])


def test_a_study_of_which_nothing_was_made_can_be_mended(tmp_path, made, mine, monkeypatch):
    with monkeypatch.context() as broken:
        fail(broken)
        assert study(tmp_path, runs=mine(lr=1e-3)) == 1
    assert study(tmp_path, runs=mine(lr=2e-3)) == 0 and len(made()) == 4
    assert read_resolved(place(tmp_path))["all"]["learn.lr"] == 2e-3


def test_results_that_were_kept_outlive_runs_that_fail(tmp_path, made, monkeypatch):
    """Also those which have to be made anew, since they lack the study's metric or its end."""
    assert study(tmp_path) == 0 and len(made()) == 4
    path = place(tmp_path) / "results.csv"
    path.write_text(path.read_text().replace("first,2,3,", "first,2,2,"))
    forget_runs(tmp_path, "one")
    fail(monkeypatch)
    assert study(tmp_path, seeds=[1, 2, 5]) == 1
    assert rows(tmp_path) == {("all", 1), ("all", 2), ("first", 1), ("first", 2)}


def test_runs_on_other_devices_or_with_other_noise_are_others(tmp_path, made):
    runs = {"all": ["tempflow", "run.noise=exact"]}
    assert study(tmp_path, runs=runs) == 0 and len(made()) == 2
    runs |= {"fast": ["tempflow", "run.noise=fast"]}
    assert study(tmp_path, name="two", runs=runs) == 0 and made() == {"two fast seed_1", "two fast seed_2"}


def test_a_longer_run_does_not_hide_a_shorter_one(tmp_path, made):
    assert study(tmp_path, name="a") == 0 and len(made()) == 4
    assert study(tmp_path, name="b", budget={"iterations": 4}) == 0 and len(made()) == 4
    assert study(tmp_path, name="c") == 0 and made() == set()


def change(tmp_path, edit) -> None:
    path = place(tmp_path) / "settings.yaml"
    content = yaml.safe_load(path.read_text())
    edit(content)
    path.write_text(yaml.safe_dump(content))


def test_a_setting_that_came_later_leaves_results_what_they_are(tmp_path, made):
    """At the time of the results there was only what is done where nothing is said."""
    assert study(tmp_path) == 0 and len(made()) == 4
    change(tmp_path, lambda content: content["shared"]["credit"].pop("idle"))
    assert study(tmp_path, name="two") == 0 and made() == set()
    forget_runs(tmp_path, "one")
    shutil.rmtree(place(tmp_path, "two"))
    assert study(tmp_path) == 0 and made() == set()


def test_a_setting_that_is_gone_makes_runs_anew(tmp_path, made, capsys):
    assert study(tmp_path) == 0 and len(made()) == 4
    change(tmp_path, lambda content: content["runs"]["first"].update(credit={"wings": 2}))
    assert study(tmp_path, name="two") == 0
    assert made() == {"two first seed_1", "two first seed_2"}
    assert study(tmp_path) == 2
    line = last_line(capsys)
    assert line.startswith("tempflow: runs=first") and "credit.wings=2" in line


@pytest.mark.parametrize("text", ["", "[1]", "shared: {}", "shared: {}\nruns: [a]", "shared: 1\nruns: {a: {}}", "a: ["])
def test_foreign_settings_are_one_line_and_cost_no_other_study(tmp_path, made, capsys, text):
    assert study(tmp_path) == 0 and len(made()) == 4
    (place(tmp_path) / "settings.yaml").write_text(text)
    capsys.readouterr()
    assert study(tmp_path) == 2 and last_line(capsys).startswith("tempflow: study=") and made() == set()
    assert study(tmp_path, name="two") == 0 and len(made()) == 4
    assert f"no results are taken from {place(tmp_path)}" in capsys.readouterr().err


def test_results_of_which_nobody_knows_the_settings_are_not_written_over(tmp_path, made, capsys):
    assert study(tmp_path) == 0 and len(made()) == 4
    forget_runs(tmp_path, "one")
    (place(tmp_path) / "settings.yaml").unlink()
    assert study(tmp_path) == 2 and last_line(capsys).startswith("tempflow: study=") and made() == set()
    assert len(rows(tmp_path)) == 4


@pytest.mark.parametrize("name", ["fig3", "steps"])
def test_what_is_written_is_read_again(tmp_path, name):
    ours = read_study(name)
    values = {run: resolved(configuration(ours, run)) for run in ours.runs}
    write_resolved(values, tmp_path)
    assert read_resolved(tmp_path) == values


def test_values_that_python_takes_for_equal_are_told_apart(tmp_path):
    one = resolved(configuration(ours := read_study("fig3"), next(iter(ours.runs))))
    options = [True, 1, 1.0]
    write_resolved({str(x): one | {"reward.options": {"digits": {"x": x}}} for x in options}, tmp_path)
    found = read_resolved(tmp_path)
    assert [repr(found[str(x)]["reward.options"]["digits"]["x"]) for x in options] == [repr(x) for x in options]


def test_results_are_committed():
    assert len(COMMITTED) > 20


@pytest.mark.parametrize("results", COMMITTED, ids=lambda path: path.parent.name)
def test_committed_results_are_of_the_settings_that_their_study_has(results, tmp_path):
    """A preset that changes has to leave them what they were: their study names what it was then, or they go."""
    theirs, made_with = read_study(str(results.parent / "study.yaml")), read_resolved(results.parent)
    for run in {point.run for point in read_results(results)}:
        assert made_with[run] == resolved(configuration(theirs, run))
    if (SHIPPED / f"{results.parent.name}.yaml").is_file():
        shutil.copy(results.parent / "study.yaml", tmp_path)
        open_folder(read_study(results.parent.name), tmp_path)
