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
    {"common"},
    {"settings", "policy", "prompts", "parallel"},
    {"models", "rewards", "digits", "records", "explore"},
    {"credit", "scenes"},
    {"learn"},
    {"method"},
    {"forecast"},
    {"run"},
    {"trained"},
    {"export"},
    {"studies"},
    {"train"},
    {"commands"},
    {"__main__"},
]
"""The rooms, bottom to top: folders of tempflow/ and the files beside them. Arrows point down or stay in their room."""

RANKS = {"train", "commands", "run", "trained", "parallel", "forecast", "credit", "learn"}


def imports(path: Path) -> set[str]:
    """Dotted names of all imports of a file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(path: Path) -> str:
    """The folder of tempflow/, or the file beside them, that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def rooms_entered(path: Path) -> set[str]:
    """Rooms of tempflow that a file imports from."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("tempflow.")}


def tempflow_files() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def test_every_room_has_a_layer():
    assert {room(path) for path in tempflow_files()} == set().union(*LAYERS)


def test_arrows_point_down():
    level = {name: depth for depth, names in enumerate(LAYERS) for name in names}
    for path in tempflow_files():
        own = room(path)
        for name in rooms_entered(path):
            assert name == own or level[name] < level[own], f"{path.name} imports {name}"


def test_only_models_know_diffusers_and_few_know_ranks():
    for path in tempflow_files():
        roots, makes_digits = {name.split(".")[0] for name in imports(path)}, path.parent.name == "making"
        if roots & {"diffusers", "peft", "transformers"} and not makes_digits:
            assert room(path) == "models" or (room(path) == "rewards" and not roots & {"diffusers", "peft"}), path.name
        if any(name.startswith(("tempflow.parallel", "torch.distributed")) for name in imports(path)):
            assert room(path) in RANKS, path.name


def test_exploring_knows_no_rewards_and_credit_no_network():
    for module, forbidden in (("explore/schedule", "policy"), ("explore/rollout", "rewards"),
                              ("credit/advantage", "policy"), ("digits/scorers", "rewards")):  # fmt: skip
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
    assert lengths[len(lengths) // 2] <= 10


def test_functions_take_few_parameters():
    """At most 7, but for the operators, whose arguments are the mathematics."""
    for path in tempflow_files():
        for function in functions(path):
            given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            count = len([argument for argument in given if argument.arg not in ("self", "cls")])
            assert count <= 7, f"{path.relative_to(ROOT)}: {function.name}"


def test_no_method_is_known_to_the_code():
    """Methods are presets: the names of methods, and branches on them, stand nowhere in explore, credit and learn."""
    presets = (PACKAGE / "settings" / "presets" / "methods").glob("*.yaml")
    names = {path.stem for path in presets} - {"tempflow", "guard"}
    for path in (file for file in tempflow_files() if room(file) in {"explore", "credit", "learn", "method", "train"}):
        words = {node.value for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                 if isinstance(node, ast.Constant) and isinstance(node.value, str)}  # fmt: skip
        assert not words & names, path.name
