"""Whole runs whose numbers go wrong: a line that says where, and no score for what is no image."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tempflow.common.files import PACKAGE
from tempflow.records.rows import read_metrics
from tempflow.train import main

SMALL = ["digits", "explore.prompts=2", "explore.noises=1", "explore.siblings=3", "explore.forks=[0,2]",
         "sample.steps=4", "learn.lr_schedule=constant", "learn.rows=2", "eval.prompts=2", "eval.steps=2",
         "eval.pictures=1", "learn.iterations=2", "run.trackers=[]", "run.device=cpu"]  # fmt: skip


@pytest.fixture
def model(tmp_path):
    """`model(part, tensor)`: the shipped pipeline with weights that are finite and whose products are not."""

    def make(part, tensor):
        folder = shutil.copytree(PACKAGE / "digits" / "pipeline", tmp_path / "model")
        file = folder / part / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        tensors[tensor].fill_(3e38)
        save_file(tensors, file, metadata={"format": "pt"})
        return f"model.path={folder}"

    return make


@pytest.mark.parametrize(
    ("part", "tensor", "evaluated", "words"),
    [
        ("transformer", "proj_out.weight", True, ("model.dtype=nonfinite", "of the evaluation", "the transformer")),
        ("vae", "decoder.conv_out.weight", False, ("model.vae_dtype=nonfinite", "of this iteration", "the decoder")),
    ],
)
def test_a_model_that_computes_no_numbers_is_not_trained(model, tmp_path, capfd, part, tensor, evaluated, words):
    settings = [] if evaluated else ["prompts.test=null"]
    folder = tmp_path / "run"
    assert main([*SMALL, model(part, tensor), f"run.dir={folder}", *settings]) != 0
    told = capfd.readouterr().err
    (line,) = (line for line in told.splitlines() if "nonfinite" in line)
    assert all(word in line for word in words) and "Traceback" not in told
    assert all(row["step"] == 0 and "gold" not in row for row in read_metrics(folder / "metrics.jsonl"))


def test_gradients_that_are_not_finite_stop_the_run_and_the_parameters_stay(tmp_path, capfd, monkeypatch):
    """The gradient of one tensor is made NaN at every step."""
    from tempflow.learn.stepper import Stepper

    plain = Stepper.step
    seen = []

    def spoilt(self):
        name, parameter = min(self.parameters.items())
        parameter.grad.fill_(float("nan"))
        plain(self)
        seen.append((name, [p.detach().clone() for p in self.parameters.values()]))

    monkeypatch.setattr(Stepper, "step", spoilt)
    settings = [f"run.dir={tmp_path / 'run'}", "prompts.test=null", "learn.iterations=9", "learn.skip_limit=2"]
    assert main([*SMALL, *settings]) != 0
    (line,) = (line for line in capfd.readouterr().err.splitlines() if "skip_limit" in line)
    assert "learn.skip_limit=2" in line and seen[0][0] in line and len(seen) == 2
    assert all(torch.equal(left, right) for left, right in zip(seen[0][1], seen[1][1], strict=True))
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["step"]]
    assert [row["skipped_steps"] for row in rows] == [1]


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (["learn.lr=1e30"], "learn.lr=1e+30"),
        (["learn.lr=1.01"], "learn.lr=1.01"),
        (["learn.lr=0.1", "learn.weight_decay=10"], "learn.weight_decay=10.0"),
        (["reward.name={digits: 0.0}"], "reward.name={"),
        (["objective.weighting=[0, 0, 0]"], "objective.weighting=[0.0, 0.0, 0.0]"),
    ],
)
def test_settings_that_teach_nothing_or_nonsense(tmp_path, capfd, settings, field):
    assert main([*SMALL, f"run.dir={tmp_path / 'run'}", *settings]) == 2
    (line,) = (line for line in capfd.readouterr().err.splitlines() if field.partition("=")[0] in line)
    assert line.startswith("tempflow: ") and field in line.replace("'", "")
    assert not (tmp_path / "run").exists()
