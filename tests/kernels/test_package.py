"""The package as a package: imports, namespaces, installation beside tempflow. Artefacts: test_shipping.py."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "kernels"
PACKAGE = FOLDER / "tempflow_kernels"
FILES = sorted(PACKAGE.rglob("*.py"))
ALLOWED = {"torch", "triton"} | set(sys.stdlib_module_names)
HUB_OPS = '''import torch
ops = torch.ops.NAME
def add_op_namespace_prefix(op_name: str):
    return f"NAME::{op_name}"
'''
"""What the builder puts in the place of `_ops.py`: these two names, with the name of the build written in."""


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_are_relative_or_of_torch_triton_and_the_standard_library(file):
    for name, level in imports(ast.parse(file.read_text())):
        assert level > 0 or name.split(".")[0] in ALLOWED, name
        assert "tempflow" not in name or level > 0


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_are_documented_and_catch_nothing_blindly(file):
    """Size and nesting of files and functions: tests/test_architecture.py."""
    tree = ast.parse(file.read_text())
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        assert not isinstance(node, ast.ExceptHandler) or node.type is not None, "bare except"


def test_operators_are_registered_under_the_prefix():
    """The builder refuses torch.library calls with a fixed namespace, and names that are not prefixed."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            is_register = isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch.library.register_")
            if is_register:
                assert ast.unparse(node.args[0]).startswith("add_op_namespace_prefix("), file


def test_namespace_is_decided_in_one_place():
    for file in FILES:
        if file.name != "_ops.py":
            text = file.read_text()
            assert "torch.ops" not in text and '"tempflow_kernels::' not in text, file


def load(folder, name):
    """Import a package under another name, as the kernel hub does."""
    file = folder / "__init__.py"
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(folder)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_two_versions_live_in_one_process(tmp_path):
    import torch

    found = []
    for version in ("one", "two"):
        folder = tmp_path / version
        shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("csrc", "*.so", "__pycache__"))
        name = f"_hub_tempflow_kernels_{version}"
        (folder / "_ops.py").write_text(HUB_OPS.replace("NAME", name))
        module = load(folder, name)
        found.append(module.normal_like(torch.zeros(1, 8), torch.tensor([[1, 0]])))
        assert hasattr(getattr(torch.ops, name), "branch_loss")
    assert torch.equal(*found)


def test_examples_of_the_readme_run():
    blocks = re.findall(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 8 and all(len(block.splitlines()) <= 5 for block in blocks)
    run = run_python("\n".join(blocks))
    assert run.returncode == 0, run.stderr


def test_no_package_called_kernels():
    """transformers and diffusers would take a top-level package of that name for the one they look for."""
    assert not (FOLDER / "__init__.py").exists()
    assert not (ROOT / "benchmarks" / "__init__.py").exists()


def run_python(program, **environment):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)


def test_import_needs_no_triton_and_a_gpu_call_without_it_is_an_error():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import tempflow_kernels, torch\n"
        "from tempflow_kernels import library\n"
        "print(tempflow_kernels.normal_like(torch.zeros(1, 4), torch.tensor([[1, 0]])).shape)\n"
        "try:\n    library._on_first_call('normal', 'CUDA')()\n"
        "except ImportError as error:\n    print('refused:', error)\n"
    )
    run = run_python(program)
    assert "torch.Size([1, 1, 4])" in run.stdout and "refused:" in run.stdout, run.stderr


def test_a_failing_triton_is_an_error_and_not_replaced():
    """Triton was asked for, and there is no device it could compile for: no other backend may answer."""
    pytest.importorskip("triton")
    program = (
        "import torch, tempflow_kernels as tk\n"
        "print('answered', tk.normal_like(torch.zeros(1, 4), torch.tensor([[1, 0]])).shape)\n"
    )
    run = run_python(program, TEMPFLOW_KERNELS_BACKEND="triton", TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="")
    assert run.returncode != 0 and "answered" not in run.stdout and "Error" in run.stderr


@pytest.mark.parametrize("tools", ["no compiler", "no cmake"])
def test_wheel_without_tools(tools, tmp_path):
    """Installation never fails for want of a compiler; without CMake the compiler alone builds the same library."""
    commands = [] if tools == "no compiler" else ["c++", "g++", "as", "ld", "gcc", "cc"]
    for command in filter(shutil.which, commands):
        (tmp_path / command).symlink_to(shutil.which(command))
    source = tmp_path / "kernels"
    shutil.copytree(FOLDER, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "*.so", "__pycache__"))
    environment = {name: value for name, value in os.environ.items() if name != "CXX"} | {"PATH": str(tmp_path)}
    program = "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"
    run = subprocess.run(
        [sys.executable, "-c", program, tmp_path], cwd=source, env=environment, capture_output=True, text=True
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    wheel = next(tmp_path.glob("tempflow_kernels-*.whl"))
    names = subprocess.run([sys.executable, "-m", "zipfile", "-l", wheel], capture_output=True, text=True).stdout
    assert ("_native.so" in names) == (tools == "no cmake" and shutil.which("g++") is not None)
    assert "plain torch will serve" in run.stdout or "C++ twin will serve" in run.stdout
    assert "tempflow_kernels/ops.py" in names and "tempflow_kernels/csrc/tempflow_kernels.h" in names
    assert wheel.name.endswith("-py3-none-any.whl") == ("_native.so" not in names), "the tag says what is inside"


def test_tempflow_requires_the_kernels_and_does_not_carry_them(tmp_path):
    """One owner of the import name: see the docstring of setup.py."""
    program = "import setuptools.build_meta as b, sys; print(b.prepare_metadata_for_build_wheel(sys.argv[1]))"
    source = tmp_path / "tempflow"
    ignored = shutil.ignore_patterns("build", "*.egg-info", ".git", "runs", "tests", "benchmarks")
    shutil.copytree(ROOT, source, ignore=ignored, symlinks=True)
    for release in ("0", "1"):
        run = subprocess.run(
            [sys.executable, "-c", program, tmp_path], cwd=source, env=os.environ | {"TEMPFLOW_RELEASE": release},
            capture_output=True, text=True,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        metadata = next(tmp_path.glob("tempflow-*.dist-info"))
        required = [line for line in (metadata / "METADATA").read_text().splitlines() if "tempflow-kernels" in line]
        assert len(required) == 1
        assert required[0].endswith("==0.1.0" if release == "1" else (source / "kernels").as_uri())
        assert "tempflow_kernels" not in (metadata / "top_level.txt").read_text()
        shutil.rmtree(metadata)
