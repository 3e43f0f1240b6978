"""The archive of sources holds the whole repository; docs/code.md names every module of it."""

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import browser

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("tempflow", "kernels", "tests", "docs", "examples", "benchmarks", ".ci")
MADE = shutil.ignore_patterns("build", "*.egg-info", "*.so", "*.log", "__pycache__", ".*_cache", "results")
FILES = "setup.py pyproject.toml MANIFEST.in constraints.txt CMakeLists.txt Dockerfile LICENSE README.md mkdocs.yml"
BUILD = "import setuptools.build_meta as build, sys; build.build_sdist(sys.argv[1])"


def test_the_archive_of_sources_holds_everything(tmp_path):
    """Results of studies, too, but not the runs that they are made of."""
    source = tmp_path / "source"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=MADE)
    for name in FILES.split():
        shutil.copy(ROOT / name, source)
    shutil.rmtree(source / "examples" / "runs", ignore_errors=True)
    expected = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    study = Path("benchmarks", "results", "study", "fig3")
    (source / study / "one").mkdir(parents=True)
    for name in ("results.csv", "one/metrics.jsonl"):
        (source / study / name).touch()
    built = subprocess.run([sys.executable, "-c", BUILD, tmp_path], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    assert sorted(expected - names) == [] and {Path("docs/site.py"), Path("mkdocs.yml")} <= expected
    assert study / "results.csv" in names and study / "one" / "metrics.jsonl" not in names


def test_every_module_stands_in_the_list_of_files():
    text = (ROOT / "docs" / "code.md").read_text()
    modules = [path for path in (ROOT / "tempflow").rglob("*.py") if not path.name.startswith("__")]
    assert [str(path) for path in modules if not re.search(rf"\b{path.stem}\b", text)] == []


def test_ci_looks_for_the_browsers_that_the_tests_use():
    looked = re.search(r"command -v (.*) >", (ROOT / ".ci" / "run").read_text())
    assert tuple(looked[1].split()) == browser.NAMES
