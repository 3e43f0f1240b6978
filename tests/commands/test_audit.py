"""Licences of what is installed, and what an index knows of it."""

import json

import pytest

from tempflow.__main__ import main

FAULTY = {"name": "a", "version": "1", "vulns": [{"id": "X-1", "fix_versions": ["2"]}]}
FINE = {"name": "b", "version": "1", "vulns": []}
PASSED = {"name": "own", "skip_reason": "Dependency not found on PyPI"}
ANSWER, CLEAN = {"dependencies": [FAULTY, FINE, PASSED]}, {"dependencies": [FINE, PASSED]}


@pytest.fixture
def auditor(tmp_path, monkeypatch):
    """Puts a program in pip-audit's place that prints an answer."""

    def put(program: str) -> None:
        (tmp_path / "pip_audit").mkdir()
        (tmp_path / "pip_audit" / "__init__.py").write_text("")
        (tmp_path / "pip_audit" / "__main__.py").write_text(program)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return put


def test_licences_are_listed(capsys):
    assert main(["audit", "--licences"]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert "MIT" in lines["pydantic"] and "BSD" in lines["numpy"] and "Apache" in lines["diffusers"]


@pytest.mark.parametrize(("answer", "code", "words"), [(ANSWER, 1, "a 1: X-1, mended in 2"), (CLEAN, 0, "no known")])
def test_faults_are_listed(auditor, capsys, answer, code, words):
    auditor(f"import sys\nprint({json.dumps(answer)!r})\nsys.exit({code})")
    assert main(["audit"]) == code
    said = capsys.readouterr()
    assert words in said.out and "own" in said.err, "what was passed over is told"


@pytest.mark.parametrize(("program", "words"), [
    ("raise SystemExit('Traceback\\nConnectionError: no route')", "no route"),
    ("print('[]')", "no index answered"),
    (f"print({json.dumps({'dependencies': [PASSED, PASSED]})!r})", "for any of 2 packages"),
    ("import time\ntime.sleep(60)", "within 2 s"),
])  # fmt: skip
def test_no_answer_is_one_line(auditor, capsys, program, words):
    auditor(program)
    assert main(["audit", "--seconds", "2"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("tempflow: pip-audit=") and words in said[0]


def test_without_pip_audit_it_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["audit"]) == 2
    assert "pip install pip-audit" in capsys.readouterr().err
