"""What is uploaded: sdist, wheels and the kernel-hub project. Builds happen in temporary folders and need no index."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import types
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import jinja2
import pytest
import tempflow_kernels
import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "kernels"
PACKAGE = FOLDER / "tempflow_kernels"
SHIPPED = sorted([*PACKAGE.rglob("*.py"), *(FOLDER / "tests").glob("*.py"), *(FOLDER / "benchmarks").glob("*.py")])
BUILD = "import setuptools.build_meta as b, sys; getattr(b, sys.argv[1])(sys.argv[2])"
NOT_SOURCES = shutil.ignore_patterns("build", "*.egg-info", "*.so", "__pycache__", ".pytest_cache")
LATER_THAN_3_9 = {"strict", "slots", "kw_only", "pairwise", "bit_count", "StrEnum", "TypeAlias", "ParamSpec", "tomllib"}


def run(*command, cwd, **environment):
    """Run in a clean environment: without PYTHONPATH, so that only what is installed can be imported."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TEMPFLOW_KERNELS_PURE")}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=kept | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(FOLDER, folder / "kernels", ignore=NOT_SOURCES)
    run(sys.executable, "-c", BUILD, "build_sdist", folder, cwd=folder / "kernels")
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheels(sdist, tmp_path_factory):
    """The wheels that are built from the sdist: name of the expected CPU backend to file."""
    found = {}
    for pure, backend in (("1", "reference"), ("0", "native")):
        folder = tmp_path_factory.mktemp(backend)
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        source = next(path for path in folder.iterdir() if path.is_dir())
        run(sys.executable, "-c", BUILD, "build_wheel", folder, cwd=source, TEMPFLOW_KERNELS_PURE=pure)
        found[backend] = next(folder.glob("*.whl"))
    return found


def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_sdist_holds_everything_to_build_test_and_publish(sdist):
    with tarfile.open(sdist) as archive:
        names = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    tracked = [path.relative_to(FOLDER) for path in PACKAGE.rglob("*") if path.suffix in (".py", ".h", ".cpp")]
    beside = "setup.py pyproject.toml native_build.py hub_folder.py CMakeLists.txt LICENSE README.md CARD.md build.toml"
    tests = [path.relative_to(FOLDER) for path in SHIPPED if PACKAGE not in path.parents]
    assert {*tracked, *tests, *map(Path, beside.split()), Path("flake.nix")} <= names
    assert not [name for name in names if name.suffix in (".so", ".pyc")]


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_wheel_of_the_sdist_in_a_clean_environment(wheels, backend, tmp_path):
    """Install without an index, run the kernel's own tests, ask who served, uninstall. torch is borrowed."""
    wheel = wheels[backend]
    if backend == "native" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler: the wheel is the pure one, tested above")
    assert wheel.name.endswith("-py3-none-any.whl") == (backend == "reference")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    shutil.copytree(FOLDER / "tests", tmp_path / "tests")
    program = "import tempflow_kernels as t; print(t.__file__); print(t.backend_info()['cpu'])"
    place, serving = run(python, "-c", program, cwd=tmp_path).split()
    assert Path(place).is_relative_to(tmp_path) and serving == backend
    assert " passed" in run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", cwd=tmp_path)
    run(python, "-m", "pip", "uninstall", "-y", "tempflow-kernels", cwd=tmp_path)
    assert not list(site.glob("tempflow_kernels*"))


def test_metadata_and_tags(sdist, wheels):
    """By hand what `twine check --strict` asks for, which runs too where twine is installed."""
    for wheel in wheels.values():
        fields = metadata(wheel)
        assert fields["Version"] == tempflow_kernels.__version__ and f"-{fields['Version']}-py3-none-" in wheel.name
        assert fields["License-Expression"] == "MIT" and fields["License-File"] == "LICENSE"
        assert fields["Description-Content-Type"] == "text/markdown" and len(fields.get_payload()) > 1000
        assert "torch>=2.11" in fields.get_all("Requires-Dist") and fields["Requires-Python"] == ">=3.11"
        with zipfile.ZipFile(wheel) as archive:
            tag = archive.read(next(name for name in archive.namelist() if name.endswith("/WHEEL"))).decode()
            is_pure = not any(name.endswith(".so") for name in archive.namelist())
        assert is_pure == ("Root-Is-Purelib: true" in tag) == ("Tag: py3-none-any" in tag)
    if importlib.util.find_spec("twine"):
        run(sys.executable, "-m", "twine", "check", "--strict", sdist, *wheels.values(), cwd=ROOT)


def test_one_version_one_licence_and_no_torch_to_build():
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"] and project["build-system"]["requires"] == ["setuptools>=77"]
    assert f'VERSION = "{tempflow_kernels.__version__}"' in (ROOT / "setup.py").read_text()
    assert (FOLDER / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_a_wrong_choice_of_wheel_is_named():
    command = [sys.executable, "-c", "import native_build; native_build.native_modules()"]
    done = subprocess.run(command, cwd=FOLDER, env=os.environ | {"TEMPFLOW_KERNELS_PURE": "yes"}, capture_output=True)
    assert b"TEMPFLOW_KERNELS_PURE: found 'yes'" in done.stderr


def later_syntax(tree):
    """Line and text of what Python 3.9 parses but does not run. Annotations count unless they are postponed."""
    postponed = any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body)
    notes = [getattr(node, field, None) for node in ast.walk(tree) for field in ("annotation", "returns")]
    skipped = {id(child) for note in notes if note and postponed for child in ast.walk(note)}
    for node in ast.walk(tree):
        names = {getattr(node, "arg", None), getattr(node, "attr", None)} if not isinstance(node, ast.arg) else set()
        names |= {alias.name for alias in node.names} if isinstance(node, (ast.Import, ast.ImportFrom)) else set()
        sides = [node.left, node.right] if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr) else []
        is_union = any(ast.unparse(side) in {"int", "float", "str", "tuple", "list", "dict", "None"} for side in sides)
        if id(node) not in skipped and (is_union or names & LATER_THAN_3_9):
            yield f"{node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: str(file.relative_to(FOLDER)))
def test_hub_files_are_written_for_python_3_9(file):
    assert list(later_syntax(ast.parse(file.read_text(), feature_version=(3, 9)))) == []


@pytest.mark.parametrize(
    "text",
    ["isinstance(x, int | float)", "zip(a, b, strict=True)", "def f(x: int | None): ...", "match x:\n    case 1: ..."],
)
def test_the_check_of_syntax_finds(text):
    try:
        assert list(later_syntax(ast.parse(text, feature_version=(3, 9))))
    except SyntaxError as error:
        assert "3.10" in str(error)


def test_build_toml_follows_the_kernel_hub():
    """Edition 5 of the format: unknown fields are refused there. The hub's own parser is asked where it is there."""
    build = tomllib.loads((FOLDER / "build.toml").read_text())
    assert set(build) == {"general", "torch-noarch"}, "pure Python: no [torch], no [kernel]"
    general = build["general"]
    assert set(general) == {"name", "version", "edition", "license", "backends", "hub"}
    assert general["name"].replace("-", "_") == PACKAGE.name and re.fullmatch(
        "[a-z][-a-z0-9]*[a-z0-9]", general["name"]
    )
    assert type(general["version"]) is int and general["edition"] == 5 and general["license"] == "MIT"
    assert set(general["backends"]) == {"cpu", "cuda", "rocm"}
    assert re.fullmatch(r"[\w.-]+/" + general["name"], general["hub"]["repo-id"]) and set(general["hub"]) == {"repo-id"}
    if importlib.util.find_spec("kernels") and importlib.util.find_spec("kernels._rust"):
        importlib.import_module("kernels._rust").Build.open(FOLDER)


def test_hub_folder(tmp_path):
    """Plain files in torch-ext/<name> and nothing that the builder writes; a second call keeps the lock."""
    folder = tmp_path / "hub"
    for _ in range(2):
        run(sys.executable, FOLDER / "hub_folder.py", folder, cwd=tmp_path)
        (folder / "flake.lock").write_text("{}")
    sources = folder / "torch-ext" / PACKAGE.name
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    copied = {path.relative_to(sources) for path in sources.rglob("*") if path.is_file()}
    assert copied == {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")} - {Path("_ops.py")}
    present = {path.name for path in folder.iterdir()}
    assert present == {
        "build.toml",
        "flake.nix",
        "flake.lock",
        "CARD.md",
        "LICENSE",
        "torch-ext",
        "tests",
        "benchmarks",
    }
    refused = subprocess.run([sys.executable, FOLDER / "hub_folder.py", tmp_path], capture_output=True, text=True)
    assert refused.returncode != 0 and refused.stderr.startswith("FOLDER: found")
    flake = (folder / "flake.nix").read_text()
    assert "kernel-builder.lib.genKernelFlakeOutputs" in flake and "github:huggingface/kernels" in flake


def card():
    """The card as the builder fills it in."""
    general = tomllib.loads((FOLDER / "build.toml").read_text())["general"]
    template = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined)
    return template.from_string((FOLDER / "CARD.md").read_text()).render(
        repo_id=general["hub"]["repo-id"], license=general["license"].lower(), functions=tempflow_kernels.__all__,
        has_benchmark=True, layers=None, upstream=None,
    )  # fmt: skip


def test_card(monkeypatch):
    """Front matter, every public name, and an example that runs when the hub hands out this package."""
    _, front, body = card().split("---\n", 2)
    fields = yaml.safe_load(front)
    assert fields["library_name"] == "kernels" and fields["license"] == "mit" and "kernels" in fields["tags"]
    for heading in ("How to use", "Available functions", "Benchmarks", "Limits"):
        assert f"## {heading}\n" in body, heading
    assert all(f"`{name}`" in body for name in tempflow_kernels.__all__)
    hub = types.ModuleType("kernels")
    hub.get_kernel = lambda repo_id, version, trust_remote_code: tempflow_kernels
    monkeypatch.setitem(sys.modules, "kernels", hub)
    found = {}
    exec(re.search(r"```python\n(.*?)```", body, re.DOTALL)[1], found)
    assert found["next_latents"].shape == (4, 6, 16, 64, 64)


def test_hub_benchmark(monkeypatch):
    """Each workload returns what its check returns; the base class is that of the `kernels` package, or like it."""
    base = types.ModuleType("kernels.benchmark")
    base.Benchmark = object
    monkeypatch.setitem(sys.modules, "kernels", types.ModuleType("kernels"))
    monkeypatch.setitem(sys.modules, "kernels.benchmark", base)
    spec = importlib.util.spec_from_file_location("hub_benchmark", FOLDER / "benchmarks" / "benchmark.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.SHAPE = (4, 9, 7)
    workloads = [name for name in dir(module.BranchBenchmark) if name.startswith("benchmark_")]
    assert len(workloads) == 3
    for name in workloads:
        benchmark = module.BranchBenchmark()
        benchmark.device, benchmark.kernel = "cpu", tempflow_kernels
        benchmark.setup()
        getattr(benchmark, name)()
        expected = getattr(benchmark, name.replace("benchmark_", "verify_"))()
        torch.testing.assert_close(benchmark.out, expected, rtol=1e-4, atol=1e-4)
