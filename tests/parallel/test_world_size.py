"""1, 2 and 4 processes, each with the whole network or with a share of it (real FSDP2 over gloo), learn the same."""

import os
import shutil
import sys
from pathlib import Path

import torch
from beside import Beside
from safetensors.torch import load_file
from spread_runs import FULL, RUNS, SHARED, SMALL

from tempflow.train import main

SCRIPT = Path(__file__).parents[1] / "support" / "spread_runs.py"
TOLERANCE = 2e-5
"""of parameters after three steps of at most 1e-3 each: gradients are summed in another order"""
SHAPES = {"latents": (4, 8, 8), "images": (3, 16, 16)}
FORKS, SIBLINGS = 2, 3


def begin():
    path = os.pathsep.join([str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, SCRIPT, "{folder}/runs"]
    return Beside(command, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path})


def of_all(folder, case):
    """(what was drawn, sampled, scored in the first iteration, of all processes together; parameters at the end)."""
    parts = [load_file(file) for file in sorted(folder.glob(f"{case}.*.safetensors"))]
    chunks = len([name for name in parts[0] if name.startswith("latents")]) // 3
    found = {"noise": torch.cat([part["noise.000"] for part in parts])}
    for name, shape in SHAPES.items():
        found[name] = torch.cat([in_place(part, name, chunks, shape) for part in parts], 1)
    found |= {name: parts[0][f"{name}.000"] for name in ("rewards", "advantages")}
    assert all(
        torch.equal(part[f"{name}.{place:03d}"], parts[0][f"{name}.{place:03d}"])
        for part in parts
        for name in ("rewards", "advantages")
        for place in range(3)
    ), "all processes see the same"
    return found, load_file(folder / case / "checkpoints" / "step_000003" / "parameters.safetensors")


def in_place(part, name, chunks, shape):
    """(S, R, K, ...) of the chunks of the first iteration."""
    places, values = (torch.cat([part[f"{each}.{chunk:03d}"] for chunk in range(chunks)]) for each in ("places", name))
    return torch.empty_like(values).index_copy_(0, places, values).view(FORKS, -1, SIBLINGS, *shape)


def test_the_number_of_processes_and_shares_changes_nothing(begun):
    """Noise, images, rewards, advantages to the bit, since call shapes are equal; parameters to rounding."""
    status, words = begun.wait()
    assert status == 0, words[-3000:]
    first = {kind: of_all(begun.folder / "runs" / "1", kind) for kind in ("lora", "full")}
    for size, cases in RUNS.items():
        for case in cases:
            expected, parameters = first[case.partition("_")[0]]
            found, trained = of_all(begun.folder / "runs" / str(size), case)
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(found[name], value), (size, case, name)
            assert trained.keys() == parameters.keys()
            apart = max(float((trained[name] - value).abs().max()) for name, value in parameters.items())
            assert apart < TOLERANCE, (size, case, apart)
    moved = first["full"][1]
    start = load_file(Path(__file__).parents[2] / "tempflow" / "digits" / "pipeline" / "transformer" /
                      "diffusion_pytorch_model.safetensors")  # fmt: skip
    assert max(float((moved[name] - start[name].float()).abs().max()) for name in moved) > 10 * TOLERANCE
    resumed_elsewhere(begun.folder / "runs", first["full"][1])


def resumed_elsewhere(runs, parameters):
    """What shares of two processes, or one process, have saved goes on in one process, whole or in shares."""
    ends = {}
    for name, source, more in (("whole", "1", []), ("from two", "2", []), ("into shares", "1", SHARED)):
        folder = runs / name
        shutil.copytree(runs / source / ("full_shared" if source == "2" else "full"), folder)
        arguments = [*SMALL, *FULL, *more, f"run.dir={folder}", "run.resume=true", "learn.iterations=4"]
        assert main(arguments) == 0
        ends[name] = load_file(folder / "checkpoints" / "step_000004" / "parameters.safetensors")
    for name in ("from two", "into shares"):
        assert max(float((value - ends["whole"][key]).abs().max()) for key, value in ends[name].items()) < TOLERANCE
    assert max(float((value - parameters[key]).abs().max()) for key, value in ends["whole"].items()) > 10 * TOLERANCE


test_the_number_of_processes_and_shares_changes_nothing.begin = begin
