"""A study: its file, its numbers against numbers worked out by hand, and its runs from start to report."""

import csv
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from tempflow.__main__ import main as front_door
from tempflow.common.errors import BadInput
from tempflow.settings.reading import load
from tempflow.studies.compare import jobs as jobs_module
from tempflow.studies.compare import make
from tempflow.studies.compare.figures import draw_curves
from tempflow.studies.compare.jobs import Job, Machine, make_jobs
from tempflow.studies.compare.page import kinds_table
from tempflow.studies.compare.pool import run_jobs
from tempflow.studies.compare.results import Point, by_kind, contrast, curve, read_points, summarise
from tempflow.studies.compare.statistics import Interval, interval, paired
from tempflow.studies.compare.study import SHIPPED, Study, open_folder, read_study

FILE = {
    "name": "tiny",
    "base": ["digits", "explore.prompts=2", "explore.noises=1", "explore.siblings=2", "sample.steps=3", "learn.rows=2",
             "eval.prompts=3", "eval.steps=2", "eval.noises=2", "eval.pictures=1", "run.device=cpu"],
    "runs": {"all": ["tempflow"], "first": ["tempflow", "explore.forks=first:1"]},
    "seeds": [1, 2],
    "budget": {"iterations": 1},
    "target": 5.0,
    "baseline": "all",
    "processes": 2,
}  # fmt: skip


def written(tmp_path, **changes) -> str:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(FILE | changes))
    return str(path)


def test_intervals_are_those_of_student():
    """1, 2, 3, 6: mean 3, variance 14 / 3, half width 3.182446305284263 sqrt(14 / 3) / 2."""
    found = interval([1.0, 2.0, 3.0, 6.0])
    half = 3.182446305284263 * math.sqrt(14 / 3) / 2
    assert (found.mean, found.count) == (3.0, 4) and found.half == pytest.approx(half)
    assert math.isnan(interval([1.0]).half) and interval([]) is None


def test_differences_are_taken_seed_by_seed():
    """Seeds that move both runs leave the difference as it is; seed 4 has no partner."""
    found = paired({1: 0.5, 2: 0.9, 3: 0.3, 4: 9.0}, {1: 0.4, 2: 0.7, 3: 0.0})
    assert found.mean == pytest.approx(0.2) and found.half == pytest.approx(4.302652729911275 * 0.1 / math.sqrt(3))


def finished(tmp_path, run: str, seed: int) -> Job:
    job = Job(run, seed, tmp_path / run / f"seed_{seed}", ("digits",), 2, 20)
    job.folder.mkdir(parents=True)
    job.finish()
    return job


def points_of(run: str, seed: int, *golds: float) -> list[Point]:
    return [Point(run, seed, step, 10 * step, 2.0 * step, {"gold": gold}) for step, gold in enumerate(golds)]


def test_what_it_costs_to_reach_a_target(tmp_path):
    """The first evaluation at it counts, of the seeds that reach it; a target that none reaches is said to be so."""
    jobs = [finished(tmp_path, run, seed) for run in ("a", "b") for seed in (1, 2)]
    points = [*points_of("a", 1, 0, 0.5, 0.9), *points_of("a", 2, 0, 0.3, 0.7), *points_of("b", 1, 0, 0.1, 0.2),
              *points_of("b", 2, 0, 0.2, 0.3)]  # fmt: skip
    a, b = summarise(points, jobs, "gold", 0.5, "b")
    assert (a.reached, a.rows.mean, a.seconds.mean, a.final.mean) == (2, 15, 3, pytest.approx(0.8))
    assert a.difference.mean == pytest.approx(0.55) and b.difference is None
    assert b.at_target(b.rows, 0.5) == "never reached (2 seeds)"
    few, _ = summarise(points, jobs, "gold", 0.8, "b")
    assert few.rows.mean == 20 and "reached by 1 of 2 seeds only" in few.at_target(few.rows, 0.8)


def test_a_run_under_way_is_in_curves_but_not_in_finals(tmp_path):
    jobs = [finished(tmp_path, "a", 1), Job("a", 2, tmp_path / "a" / "seed_2", ("digits",), 2, 20)]
    points = [*points_of("a", 1, 0, 1, 2), *points_of("a", 2, 0, 3)]
    found = curve(points, "a", "network_rows", "gold")
    assert (found.x, found.mean) == ([0, 10], [0, 2]) and found.half[1] == pytest.approx(12.70620)
    assert summarise(points, jobs, "gold", None, None)[0].seeds == [1]


def test_the_picture_names_every_run_once(tmp_path):
    points = [point for run in ("all", "first") for point in points_of(run, 1, 0.25, 0.5)]
    drawn = draw_curves(Study(**FILE), points, "svg").decode()
    assert [drawn.count(f"<!-- {run} -->") for run in ("all", "first")] == [1, 1]


@pytest.mark.parametrize(("change", "field"), [
    ({"sedes": [1]}, "sedes"), ({"budget": {"rows": 5, "seconds": 1.0}}, "budget"), ({"baseline": "al"}, "baseline"),
    ({"runs": {"all": ["tempflwo"]}}, "runs.all"), ({"runs": {"all": ["learn.rate=1"]}}, "runs.all"),
    ({"runs": {"all": ["run.seed=3"]}}, "runs.all"), ({"seeds": [1, 1]}, "seeds"), ({"seeds": []}, "seeds"),
    ({"runs": {"all": [], "b": ["eval.seed=7"]}}, "runs.b"), ({"budget": {"seconds": 5}}, "runs.all"),
    ({"base": ["prompts.test=null"]}, "runs.all"), ({"contrasts": [["first", "al"]]}, "contrasts"),
    ({"contrasts": [["first"]]}, "contrasts.0"),
])  # fmt: skip
def test_wrong_studies_are_one_line(tmp_path, capsys, change, field):
    assert front_door(["study", written(tmp_path, **change), "--folder", str(tmp_path)]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"tempflow: {field}=") and line.count("\n") == 1


def test_only_runs_and_seeds_may_be_added(tmp_path):
    study, more = Study(**FILE), {"runs": FILE["runs"] | {"new": []}, "seeds": [2, 1, 3], "processes": 1}
    open_folder(study, tmp_path / "s")
    open_folder(Study(**FILE | more), tmp_path / "s")
    for change, field in (({"target": 1.0}, "target"), ({"seeds": [1]}, "seeds"),
                          ({"runs": more["runs"] | {"all": ["guard"]}}, "runs")):  # fmt: skip
        with pytest.raises(BadInput) as found:
            open_folder(Study(**FILE | more | change), tmp_path / "s")
        assert found.value.field == field


def test_contrasts_are_told_beside_the_baseline_and_may_be_added_later(tmp_path, monkeypatch):
    """Seed 3 has finished in one of the two only."""
    drawn, real = [], make.draw_differences
    monkeypatch.setattr(make, "draw_differences", lambda study, found, form: drawn.extend(found) or real(study, found))
    runs = {"one": [], "two": [], "three": []}
    study = Study(**FILE | {"runs": runs, "seeds": [1, 2, 3], "baseline": "one", "target": None,
                            "contrasts": [("three", "two"), ("two", "three")]})  # fmt: skip
    open_folder(Study(**FILE | {"runs": runs, "seeds": [1, 2, 3], "baseline": "one", "target": None}), tmp_path)
    open_folder(study, tmp_path)
    golds = {("one", 1): 0.5, ("one", 2): 0.5, ("two", 1): 0.25, ("two", 2): 0.5, ("three", 1): 0.5, ("three", 2): 1.0,
             ("three", 3): 9.0}  # fmt: skip
    jobs = [finished(tmp_path, run, seed) for run, seed in golds]
    for job in jobs:
        row = {"step": 2, "gold": golds[job.run, job.seed]}
        (job.folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    words, page = make.write_report(study, tmp_path, jobs, []), (tmp_path / "study.html").read_text()
    line = next(line.split() for line in words.splitlines() if line.startswith("three  two"))
    assert line[2:] == ["+0.375", "±", f"{12.706204736 * 0.125:.3f}"]
    assert "Differences" in page and f"+0.375 ± {12.706204736 * 0.125:.3f}" in page
    expected = [("two", "one", -0.125), ("three", "one", 0.25), ("three", "two", 0.375), ("two", "three", -0.375)]
    assert [(found.run, found.other, found.difference.mean) for found in drawn] == expected
    alone = contrast(read_points(jobs), jobs[:4], "gold", [("two", "one"), ("one", "two")])
    assert [found.difference.mean for found in alone] == [-0.125, 0.125]


def test_finals_by_kind_of_prompt_are_told_of_finished_runs(tmp_path):
    """A run from before there were kinds has none; the other's second seed has not finished."""
    study = Study(**FILE | {"runs": {"one": [], "two": []}, "seeds": [1, 2], "baseline": None, "target": None})
    open_folder(study, tmp_path)
    jobs = [finished(tmp_path, run, seed) for run, seed in (("one", 1), ("one", 2), ("two", 1))]
    for job, kinds in zip(jobs, [{"gold/counts": 0.25, "gold/pairs": 1.0}, {"gold/counts": 0.5, "gold/pairs": 1.0},
                                 None], strict=True):  # fmt: skip
        first = {"step": 0, "gold": 0.0} | ({"kinds": dict.fromkeys(kinds, 0.0)} if kinds else {})
        last = {"step": 2, "gold": 0.5} | ({"kinds": kinds} if kinds else {})
        (job.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (first, last)))
    words, page = make.write_report(study, tmp_path, jobs, []), (tmp_path / "study.html").read_text()
    assert "Final gold by kind of prompt" in page and page.count("0.375 ± 1.588") == 1
    title, head, one, two = words.splitlines()[4:8]
    assert title == "Final gold by kind of prompt:"
    assert head.split() == ["run", "seeds", "counts", "pairs"] and two.split() == ["two"]
    assert one.split() == ["one", "2", "0.375", "±", "1.588", "1.000", "±", "0.000"]
    kept = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [row["gold/counts"] for row in kept] == ["0.0", "0.25", "0.0", "0.5", "", ""]
    (jobs[1].folder / "finished.json").unlink()
    assert by_kind(read_points(jobs), jobs, "gold")["counts"]["one"].mean == 0.25
    last = {"step": 3, "gold": 0.5, "kinds": {"gold/counts": None, "gold/pairs": 0.75, "golden/counts": 1.0}}
    with (jobs[0].folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(last) + "\n")
    found = by_kind(read_points(jobs), jobs, "gold")
    assert not found["counts"] and found["pairs"]["one"].mean == 0.75, "no opinion at the last evaluation"
    several = {"counts": {"one": Interval(0.5, 0.1, 3)}, "pairs": {"one": Interval(0.5, 0.1, 8)}}
    starts = [[row[:2] for row in kinds_table(study, kinds).rows] for kinds in (several, {})]
    assert starts == [[["one", "3 to 8"], ["two", ""]], []]
    by_metric = summarise(read_points(jobs), jobs, "gold/pairs", 0.75, None)
    assert by_metric[0].final.mean == 0.75 and by_metric[0].reached == 1 and by_metric[1].final is None


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.yaml")))
def test_shipped_studies_can_be_read(name):
    study = read_study(name)
    assert study.name == name and study.budget.rows and study.baseline in study.runs
    assert set(study.seeds).isdisjoint({101, 102}) != name.startswith("grid_"), "grids have seeds of their own"


SCRIPT = """
import json, sys
from pathlib import Path
folder, resumed = Path(sys.argv[1]), "run.resume=true" in sys.argv
(folder / "config.yaml").parent.mkdir(parents=True, exist_ok=True)
(folder / "config.yaml").write_text("{}")
with (folder / "calls").open("a") as file:
    file.write("resumed\\n" if resumed else "new\\n")
if "breaks" in str(folder) and not resumed:
    print("tempflow: learn.lr=1: is too high", file=sys.stderr)
    sys.exit(2)
row = {"step": 1, "network_rows": 10, "training_seconds": 1.0, "reward_mean": 0.5, "reward_test": 0.5, "gold": 0.25}
(folder / "metrics.jsonl").write_text(json.dumps(row))
"""


@pytest.fixture
def stand_in(monkeypatch):
    """Runs that are over at once, and of which `breaks` fails until it is resumed."""

    def command(job):
        resume = ["run.resume=true"] if (job.folder / "config.yaml").is_file() else []
        return [sys.executable, "-c", SCRIPT, str(job.folder), *resume]

    monkeypatch.setattr(jobs_module.Job, "command", command)


def test_a_failed_run_is_named_and_the_others_go_on(tmp_path, stand_in):
    study = Study(**FILE | {"runs": {"breaks": [], "works": []}, "baseline": "works", "target": None})
    jobs = [Job(run, seed, tmp_path / run / f"seed_{seed}", ("digits",), 1, 10)
            for seed in (1, 2) for run in study.runs]  # fmt: skip
    failures = run_jobs(jobs, Machine(()), 2, pause=0.05)
    assert [(f.job.run, f.code, f.line) for f in failures] == [
        ("breaks", 2, "tempflow: learn.lr=1: is too high")] * 2  # fmt: skip
    words = make.write_report(study, tmp_path, jobs, failures)
    assert "run breaks, seed 1, failed (exit code 2): tempflow: learn.lr=1: is too high" in words
    assert "is too high" in (tmp_path / "study.html").read_text()
    assert run_jobs(jobs, Machine(()), 2, pause=0.05) == [], "the same again: what was broken off goes on"
    calls = [(job.folder / "calls").read_text().split() for job in jobs]
    assert calls == [["new", "resumed"], ["new"], ["new", "resumed"], ["new"]]


def test_how_far_a_run_has_come(tmp_path):
    """By iterations, or by seconds of training where the budget is in seconds."""
    by_iterations = Job("a", 1, tmp_path, ("digits",), 8, 80)
    by_seconds = Job("a", 1, tmp_path, ("digits",), 10**6, 0, 20.0)
    assert by_iterations.done() == by_seconds.done() == 0
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 2, "training_seconds": 15.0}))
    assert (by_iterations.done(), by_seconds.done()) == (0.25, 0.75)
    by_iterations.finish()
    assert by_iterations.done() == by_seconds.done() == 1


def test_budgets_become_iterations(tmp_path):
    """Rows: the first iteration that reaches them is the last; seconds: a limit of the training command."""
    rows = make_jobs(Study(**FILE | {"budget": {"rows": 21}}), tmp_path)
    assert [(job.run, job.seed) for job in rows] == [("all", 1), ("first", 1), ("all", 2), ("first", 2)]
    assert [(job.iterations, job.rows) for job in rows[:2]] == [(2, 40), (2, 24)]
    constant = {"base": [*FILE["base"], "learn.lr_schedule=constant"], "budget": {"seconds": 7}}
    first = make_jobs(Study(**FILE | constant), tmp_path)[0]
    assert first.seconds == 7 and load(first.arguments).learn.max_seconds == 7


def test_places_have_a_gpu_or_one_thread_each():
    assert Machine(()).environment(3)["OMP_NUM_THREADS"] == "1"
    assert [Machine(("2", "5")).environment(place)["CUDA_VISIBLE_DEVICES"] for place in range(3)] == ["2", "5", "2"]


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open, self.sources = [], []

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_startendtag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_study_from_start_to_report(tmp_path, capfd):
    """Two tiny runs x two seeds; a second time nothing is run again."""
    source = written(tmp_path)
    assert front_door(["study", source, "--folder", str(tmp_path / "studies")]) == 0
    folder, said = tmp_path / "studies" / "tiny", capfd.readouterr().out
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert [(row["run"], row["seed"], row["iteration"]) for row in rows] == [
        (run, seed, step) for seed in "12" for run in ("all", "first") for step in "01"]  # fmt: skip
    assert len({row["gold"] + row["reward_test"] for row in rows if row["iteration"] == "0"}) == 1
    costs = {row["run"]: int(row["network_rows"]) for row in rows if row["iteration"] == "1"}
    assert costs == {"all": 2 * 2 + 2 * 2 * (2 + 1) + 2 * 2, "first": 2 * 1 + 2 * 2 * 2 + 2}
    assert said.count("never reached (2 seeds)") == 4
    page = Tags()
    page.feed((folder / "study.html").read_text().partition("\n")[2])
    assert not [tag for tag in page.open if tag != "meta"] and page.sources
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    assert (folder / "study.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "all" / "seed_1" / "finished.json").read_text())["command"]
    before = (folder / "all" / "seed_1" / "metrics.jsonl").stat().st_mtime_ns
    assert front_door(["study", source, "--folder", str(tmp_path / "studies"), "--dry-run"]) == 0
    assert re.search(r"0 of 4 runs left", capfd.readouterr().out)
    assert front_door(["study", source, "--folder", str(tmp_path / "studies")]) == 0
    assert (folder / "all" / "seed_1" / "metrics.jsonl").stat().st_mtime_ns == before
    assert Path(folder / "study.yaml").is_file()


def test_the_front_door_knows_its_commands(capsys):
    assert front_door(["--help"]) == 0 and "study" in capsys.readouterr().out
    assert front_door(["stduy"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
