"""The first half hour on a GPU: walked on a CPU; goes on in a later call; a bad part costs itself alone; verdicts."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import first_half_hour
import pytest
import torch
from beside import Beside
from half_hour import page, runner, verdicts
from half_hour.parts import NAMES, PARTS, Part
from half_hour.verdicts import FAIL, NOT_RUN, PASS, Verdict
from importable import ROOT

SCRIPT = """
import json, os, pathlib, signal, subprocess, sys, time
name, folder = sys.argv[1], pathlib.Path(sys.argv[sys.argv.index("--folder") + 1])
def write(passed):
    with (folder / f"{name}.jsonl").open("a") as out:
        out.write(json.dumps({"check": name, "passed": passed, "problem": "", "figure": None, "threads": 1}) + "\\n")
write(name != "wrong")
(folder / "calls").open("a").write(name + " ")
(folder / "process").write_text(str(os.getpid()))
if name == "later slow":
    for _ in range(3):
        write(True)
        time.sleep(0.7)
    if len((folder / f"{name}.jsonl").read_text().splitlines()) < 5:
        time.sleep(60)
if name == "crash":
    print("about to die", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
if name == "hang":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (folder / "child").write_text(str(child.pid))
    time.sleep(60)
sys.exit({"wrong": 1, "skip": 77, "later": 75}.get(name, 0))
"""


def part(folder, name, limit=20.0):
    script = folder / "part.py"
    script.write_text(SCRIPT)
    return Part(name, f"what {name} does", limit, verdicts.checks, (str(script),), resumes=name.startswith("later"))


def session(folder, seconds=60.0):
    return runner.Session(folder, "cpu", True, time.monotonic() + seconds + runner.CLOSING)


def called(folder):
    return (folder / "calls").read_text().split()


def walk():
    script = ROOT / "benchmarks" / "first_half_hour.py"
    return Beside([sys.executable, script, "--device", "cpu", "--tiny", "--folder", "{folder}/walk"])


def test_the_walk_on_a_cpu(begun):
    """Every part runs; the page says that it is a CPU's, and gives no verdict on speed or memory."""
    pytest.importorskip("triton")
    (status, printed), folder = begun.wait(), begun.folder / "walk"
    times = [row["attention"] for row in runner.rows_of(folder / "attention.jsonl")]
    assert times[0] == "default" and "math" in times
    assert status == 0, printed + "".join(log.read_text() for log in folder.glob("*.log"))
    ended = {row["part"]: row for row in runner.rows_of(folder / "parts.jsonl")}
    assert list(ended) == NAMES
    assert {name for name, row in ended.items() if row["ending"] == "skipped"} == {"graph", "sanitizer"}
    text = (folder / "page.md").read_text()
    assert "no figure here says anything about a GPU" in text and (folder / "page.png").stat().st_size > 20_000
    for name in set(NAMES) - {"graph", "sanitizer"}:
        rows = runner.rows_of(folder / f"{name}.jsonl")
        assert rows and all({"device", "torch", "commit", "date"} <= set(row) for row in rows), name
    lines = [line for line in text.splitlines() if "% of copy" in line or "GiB (" in line or "x official" in line]
    assert len(lines) >= 5 and all(line.endswith("| no verdict |") for line in lines)


test_the_walk_on_a_cpu.begin = walk


def test_a_bad_part_costs_itself_alone(tmp_path, monkeypatch):
    """A crash, a hang with a child of its own and a failure are told; the rest runs; rows of before stay."""
    monkeypatch.setattr(runner, "PASSES", 2)
    names = ("crash", "hang", "wrong", "skip", "later", "good")
    parts = tuple(part(tmp_path, name, 3.0 if name == "hang" else 20.0) for name in names)
    began = time.monotonic()
    runner.run_parts(session(tmp_path), parts)
    assert time.monotonic() - began < 30
    endings = {name: row["ending"] for name, row in runner.endings(session(tmp_path)).items()}
    assert endings == {"crash": "crashed", "hang": "hung", "wrong": "failed", "skip": "skipped",
                       "later": "unfinished", "good": "done"}  # fmt: skip
    assert not ended_child(tmp_path), "what the part had started is ended with it"
    found = page.write_page(session(tmp_path), parts)
    assert [section.outcome for section in found] == [FAIL, FAIL, FAIL, PASS, NOT_RUN, PASS]
    assert called(tmp_path).count("hang") == 2, "it may have filled the cache only"
    assert page.exit_status(found, True) == 1 and page.exit_status(found[-1:], True) == 0
    assert "about to die" in (tmp_path / "page.md").read_text()


def ended_child(folder):
    """Whether the child of the part that hung still runs."""
    time.sleep(0.5)
    status = runner.Path("/proc") / (folder / "child").read_text() / "stat"
    return status.exists() and status.read_text().split()[2] != "Z"


def test_a_later_call_goes_on(tmp_path, monkeypatch):
    """Parts with a final ending are left alone, unfinished ones keep their rows; `again` and another commit do not."""
    monkeypatch.setattr(runner, "PASSES", 1)
    parts = [part(tmp_path, name) for name in ("good", "later", "wrong")]
    runner.run_parts(session(tmp_path), parts[:2])
    runner.run_parts(session(tmp_path), parts)
    assert called(tmp_path) == ["good", "later", "wrong", "later"], "what was not run yet comes before the rest"
    assert len(runner.rows_of(tmp_path / "later.jsonl")) == 2
    runner.run_parts(session(tmp_path), parts[:1], again=["good"])
    assert called(tmp_path)[4:] == ["good"] and len(runner.rows_of(tmp_path / "good.jsonl")) == 1
    other = runner.environment("cpu") | {"commit": "another"}
    monkeypatch.setattr(runner, "environment", lambda device: other)
    runner.run_parts(session(tmp_path), parts[:1])
    assert called(tmp_path)[5:] == ["good"]


def test_the_whole_has_a_limit(tmp_path):
    """What the time is not enough for is cut there and run by the next call; what hangs by itself is not."""
    slow, good = part(tmp_path, "hang"), part(tmp_path, "good")
    began = time.monotonic()
    runner.run_parts(session(tmp_path, 9), [slow, good])
    assert time.monotonic() - began < 15
    endings = runner.endings(session(tmp_path))
    assert [endings[name]["ending"] for name in ("hang", "good")] == ["out of time", "out of time"]
    assert endings["good"]["last"] == "not started" and called(tmp_path) == ["hang"]
    found = page.sections(session(tmp_path), (slow, good))
    assert page.exit_status(found, True) == 1 and found[1].outcome == NOT_RUN
    runner.run_parts(session(tmp_path), [good])
    assert called(tmp_path) == ["hang", "good"]


KILLED = """
import sys
sys.path[:0] = [{benchmarks!r}, {tests!r}, {support!r}]
import first_half_hour, pathlib
from test_first_half_hour import part
folder = pathlib.Path(sys.argv[-1])
first_half_hour.PARTS = tuple(part(folder, name) for name in ("good", "later slow", "wrong"))
first_half_hour.NAMES = [part.name for part in first_half_hour.PARTS]
sys.exit(first_half_hour.main(["--device", "cpu", "--tiny", "--folder", str(folder), *sys.argv[1:-1]]))
"""


def killed(folder, number, *arguments):
    """The command that a signal ends while its second part is under way: its exit status."""
    tests, support = ROOT / "tests" / "benchmarks", ROOT / "tests" / "support"
    code = KILLED.format(benchmarks=str(ROOT / "benchmarks"), tests=str(tests), support=str(support))
    process = subprocess.Popen([sys.executable, "-c", code, *arguments, str(folder)], stdout=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not (folder / "later slow.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(number)
    return process.wait(timeout=60)


def runs(folder):
    """Whether the part that was under way still does."""
    time.sleep(0.5)
    status = runner.Path("/proc") / (folder / "process").read_text() / "stat"
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
def test_a_command_that_is_ended_writes_its_page_and_loses_no_rows(tmp_path):
    """SIGTERM: the part's process is gone, the page says so; the next call goes on from its rows."""
    assert killed(tmp_path, signal.SIGTERM) == 128 + signal.SIGTERM
    assert not runs(tmp_path)
    text = (tmp_path / "page.md").read_text()
    assert "stopped by SIGTERM" in text and "| wrong: what wrong does | not run |" in text
    before = len(runner.rows_of(tmp_path / "later slow.jsonl"))
    runner.run_parts(session(tmp_path), [part(tmp_path, "later slow")])
    assert runner.endings(session(tmp_path))["later slow"]["ending"] == "done"
    assert len(runner.rows_of(tmp_path / "later slow.jsonl")) == before + 4, "those of before stay"


@pytest.mark.skipif(sys.platform != "linux", reason="only there a child is told of its parent's end")
def test_a_command_that_is_killed_leaves_no_process_and_its_rows(tmp_path):
    """SIGKILL, such as for memory: nothing closes, but the part is on record as begun, and the page is of the part
    before."""
    assert killed(tmp_path, signal.SIGKILL) == -signal.SIGKILL
    assert not runs(tmp_path)
    assert runner.endings(session(tmp_path))["later slow"]["ending"] == "unfinished"
    assert "| good: what good does | done |" in (tmp_path / "page.md").read_text()
    runner.run_parts(session(tmp_path), [part(tmp_path, "later slow")])
    assert len(runner.rows_of(tmp_path / "later slow.jsonl")) >= 1 + 4


def test_a_part_that_goes_on_is_not_hung_at_its_limit(tmp_path):
    """Its own limit ends a process, not the part, as long as it has new rows; while there is time it is run again."""
    slow = part(tmp_path, "later slow", 3.0)
    runner.run_parts(session(tmp_path), [slow])
    assert called(tmp_path) == ["later", "slow"] * 2
    assert runner.endings(session(tmp_path))["later slow"]["ending"] == "done"


def test_the_page_shows_all_parts(tmp_path, monkeypatch):
    """Chosen parts decide the status alone; a page of them alone would hide what is left."""
    parts = tuple(part(tmp_path, name) for name in ("good", "wrong"))
    monkeypatch.setattr(first_half_hour, "PARTS", parts)
    monkeypatch.setattr(first_half_hour, "NAMES", ["good", "wrong"])
    walk = ["--device", "cpu", "--tiny", "--folder", str(tmp_path), "--parts"]
    assert first_half_hour.main([*walk, "good"]) == 0
    assert "| wrong: what wrong does | not run |" in (tmp_path / "page.md").read_text()
    assert first_half_hour.main([*walk, "wrong"]) == 1


def test_rows_that_cannot_be_judged_cost_their_part_alone(tmp_path):
    parts = (part(tmp_path, "good"), replace(part(tmp_path, "skip"), judge=lambda rows: rows[0]["no such field"]))
    runner.run_parts(session(tmp_path), parts)
    found = page.write_page(session(tmp_path), parts)
    assert [section.outcome for section in found] == [PASS, FAIL] and "no such field" in found[1].verdicts[0].measured


def test_a_line_cut_in_half_is_left_out(tmp_path):
    (tmp_path / "rows").write_text('{"a": 1}\n{"a": ')
    assert runner.rows_of(tmp_path / "rows") == [{"a": 1}]


def test_wrong_use_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert first_half_hour.main([]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err
    assert first_half_hour.main(["--device", "cpu"]) == 2
    with pytest.raises(SystemExit) as stopped:
        first_half_hour.main(["--again", "everything"])
    assert stopped.value.code == 2 and "'everything' is no part" in capsys.readouterr().err


def test_rows_that_pass_save_no_part_that_crashed():
    good = [Verdict("it", "1", outcome=PASS)]
    crashed = page.Section(PARTS[0], "crashed", 1.0, "", good)
    unfinished = page.Section(PARTS[0], "unfinished", 1.0, "", good)
    assert (crashed.outcome, unfinished.outcome) == (FAIL, NOT_RUN)
    assert page.Section(PARTS[0], "done", 1.0, "", good).outcome == PASS
    assert json.dumps(runner.FINAL).count("un") == 1, "only `hung` is final of what did not end by itself"
