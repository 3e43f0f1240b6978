"""Runs whose results are known are not made again: within a study, among studies, from what was kept alone."""

import json

import pytest
from small_studies import forget_runs, study

from tempflow.common.errors import BadInput
from tempflow.studies.compare.known import read_results
from tempflow.studies.compare.results import Point, write_csv


def test_what_was_kept_of_a_study_takes_more_seeds(tmp_path, made):
    """Its table is drawn anew from results.csv, and only the new seed is run."""
    assert study(tmp_path) == 0
    assert len(made()) == 4
    kept = (tmp_path / "studies" / "one" / "results.csv").read_text()
    forget_runs(tmp_path, "one")
    assert study(tmp_path) == 0 and made() == set()
    assert (tmp_path / "studies" / "one" / "results.csv").read_text() == kept
    assert study(tmp_path, "--dry-run", seeds=[1, 2, 5]) == 0 and len(made()) == 1, "how long three iterations take"
    assert study(tmp_path, seeds=[1, 2, 5]) == 0
    assert made() == {"one all seed_5", "one first seed_5"}


def test_studies_share_runs_of_the_same_settings(tmp_path, made, capsys):
    """However they are written; other settings, or another end, are another run."""
    assert study(tmp_path) == 0
    made(), capsys.readouterr()
    runs = {"same": ["explore.forks=all", "tempflow"], "other": ["tempflow", "learn.lr=1e-3"]}
    assert study(tmp_path, name="two", runs=runs, baseline="same") == 0
    assert made() == {"two other seed_1", "two other seed_2"}
    said = capsys.readouterr().out
    assert "2 runs are those of the same settings in one" in said and "0.250 ± 0.000" in said
    assert study(tmp_path, name="longer", budget={"iterations": 4}) == 0
    assert len(made()) == 4


def test_a_run_whose_results_lack_the_metric_is_made_again(tmp_path, made):
    """Such as those from before scores were told by kind of prompt."""
    assert study(tmp_path) == 0 and len(made()) == 4
    forget_runs(tmp_path, "one")
    assert study(tmp_path, name="two", metric="gold/counting") == 0 and len(made()) == 4
    assert study(tmp_path, name="three", metric="gold") == 0 and made() == set()


def test_a_run_that_did_not_come_to_its_end_is_made_again(tmp_path, made):
    assert study(tmp_path) == 0
    made()
    path = tmp_path / "studies" / "one" / "results.csv"
    points = read_results(path)
    early = [Point("all", 1, 2, 10, 1.5, points[0].scores) if (p.run, p.seed) == ("all", 1) else p for p in points]
    write_csv(early, path)
    forget_runs(tmp_path, "one")
    assert study(tmp_path) == 0 and made() == {"one all seed_1"}


def test_results_are_read_as_they_were_written(tmp_path):
    points = [Point("a", 1, 0, 0, 0.0, {"gold": 0.25}), Point("a", 1, 3, 100, 2.5, {"reward": 0.1, "gold": 0.5})]
    write_csv(points, tmp_path / "results.csv")
    assert read_results(tmp_path / "results.csv") == points


@pytest.mark.parametrize(
    "text", ["run,seed\na,1\n", "not a table", "run,seed,iteration,network_rows,seconds\na,x,1,1,1\n"]
)
def test_foreign_results_are_one_line(tmp_path, made, capsys, text):
    assert study(tmp_path) == 0
    forget_runs(tmp_path, "one")
    path = tmp_path / "studies" / "one" / "results.csv"
    path.write_text(text)
    if text == "not a table":  # a head without rows: nothing is known
        assert read_results(path) == []
        return
    with pytest.raises(BadInput):
        read_results(path)
    capsys.readouterr()
    assert study(tmp_path) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("tempflow: study=")


def test_a_finished_run_of_ones_own_counts_more(tmp_path, made):
    """What stands in the run's folder is taken, not what a table says."""
    assert study(tmp_path) == 0
    metrics = tmp_path / "studies" / "one" / "all" / "seed_1" / "metrics.jsonl"
    metrics.write_text(json.dumps(json.loads(metrics.read_text().splitlines()[-1]) | {"gold": 0.75}))
    assert study(tmp_path) == 0
    found = [p.scores["gold"] for p in read_results(tmp_path / "studies" / "one" / "results.csv")]
    assert sorted(found) == [0.25, 0.25, 0.25, 0.75]
