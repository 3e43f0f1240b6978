"""Folders of runs without the run: settings, and a checkpoint of whatever a policy's parameters are."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from tempflow.learn.average import MovingAverage
from tempflow.learn.optimizers import make_optimizer
from tempflow.learn.stepper import Stepper
from tempflow.run import checkpoint
from tempflow.run.snapshot import Progress, take
from tempflow.settings.fields import Config, ModelConfig, SampleConfig
from tempflow.settings.reading import to_yaml

ITERATION = 3


def run_folder(folder: Path, policy, model: ModelConfig, sample: SampleConfig) -> Path:
    """The parameters are the averaged ones; raw ones are twice as large, and those of iteration 2 half as large."""
    config = Config(model=model, sample=sample)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    parameters = policy.trainable()
    own = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for iteration, times in ((ITERATION - 1, 0.5), (ITERATION, 1.0)):
        with torch.no_grad():
            _fill(parameters, own, times)
            average = MovingAverage(parameters, 0.9, 1)
            _fill(parameters, own, 2 * times)
            optimizer = make_optimizer(config.learn, list(parameters.values()))
            stepper = Stepper(parameters, optimizer, average, 1.0, None, 3)
            progress = Progress(iteration=iteration, noise="exact", gold=1 / iteration)
            checkpoint.save(folder / "checkpoints", take(progress, stepper, asdict(config)), 2)
            _fill(parameters, own, 1.0)
    return folder


def _fill(parameters, values, times) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name] * times)
