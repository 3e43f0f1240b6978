"""The shape of the code: arrows between modules, names that shadow nothing, size."""

import ast
import importlib.metadata
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tempflow"
KERNELS = ROOT / "kernels" / "tempflow_kernels"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")])

LAYERS = [
    {"errors", "batching", "paths", "settings", "compiled", "transfer"},
    {"config", "draws"},
    {"schedule", "policy", "plan", "prompts", "usage", "optim"},
    {"tail_solver"},
    {"advantage", "tail_engine", "stepping", "geneval_prompts", "distributed", "digits"},
    {"branching", "rewards", "models", "checkpoint", "metrics", "tail_levels", "chunk_planner"},
    {"scoring", "evaluation", "hacking", "report", "run_folder", "memory_plan", "digits maker", "tail_setup"},
    {"explain"},
    {"run"},
    {"assembly"},
    {"tails_check"},
    {"train"},
]
"""Bottom to top; a module may import from lower layers, or from its own file or folder."""

RANKS = {"train", "tails_check", "assembly", "run", "run_folder", "distributed", "evaluation"}
DIFFUSERS = {"models", "digits maker"}


def imports(path: Path) -> set[str]:
    """Dotted names of all imports of a file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def unit(path: Path) -> str:
    """The module or sub-package of tempflow that a file belongs to."""
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "digits maker" if name == "digits" and path.stem in ("make", "figures", "generator", "networks") else name


def own_imports(path: Path) -> set[str]:
    """Units of tempflow that a file imports from."""
    units = set()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "tempflow" and len(parts) > 1:
            inside = PACKAGE.joinpath(*parts[1:3]).with_suffix(".py")
            units.add(unit(inside if inside.is_file() else PACKAGE / parts[1]))
    return units


def tempflow_files() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def test_every_module_has_a_layer():
    assert {unit(path) for path in tempflow_files()} == set().union(*LAYERS)


def test_arrows_point_down():
    level = {name: depth for depth, names in enumerate(LAYERS) for name in names}
    for path in tempflow_files():
        own = unit(path)
        for name in own_imports(path):
            assert name == own or level[name] < level[own], f"{path.name} imports {name}"


def test_only_models_know_diffusers_and_few_know_ranks():
    for path in tempflow_files():
        roots = {name.split(".")[0] for name in imports(path)}
        if roots & {"diffusers", "peft", "transformers"}:
            assert unit(path) in DIFFUSERS or (unit(path) == "rewards" and not roots & {"diffusers", "peft"}), path.name
        if any(name.startswith(("tempflow.parallel.ranks", "torch.distributed")) for name in imports(path)):
            assert unit(path) in RANKS, path.name


def test_schedule_knows_no_network_and_branching_no_rewards():
    for module, forbidden in (("schedule", "policy"), ("branching", "rewards"), ("advantage", "policy")):
        assert not any(f"tempflow.{forbidden}" in name for name in imports(PACKAGE / f"{module}.py"))


def test_script_folder_shadows_nothing():
    """`torchrun tempflow/train.py` puts tempflow/ first on the path."""
    installed = set(importlib.metadata.packages_distributions()) - {"tempflow", "tempflow_kernels"}
    others = {"evaluate", "datasets", "tests", "utils"}
    names = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix in (".py", "")}
    assert not names & (set(sys.stdlib_module_names) | installed | others)


def functions(path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def nesting(node: ast.AST) -> int:
    """Depth of control flow below a node."""
    blocks = (ast.For, ast.While, ast.If, ast.With, ast.Try)
    depths = [0]
    for child in ast.iter_child_nodes(node):
        inner = nesting(child)
        elif_chain = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
        depths.append(inner + (isinstance(child, blocks) and not elif_chain))
    return max(depths)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_small(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300
    for function in functions(path):
        assert function.end_lineno - function.lineno < 60, function.name
        assert nesting(function) <= 3, function.name


def test_median_function_is_short():
    lengths = sorted(f.end_lineno - f.lineno + 1 for path in SOURCES for f in functions(path))
    assert lengths[len(lengths) // 2] <= 12
