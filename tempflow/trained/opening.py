"""Opening a run: its settings and the parameters of one of its checkpoints, while it may be going on.

    run = open_run(Path("runs/digits"), "best")           # parameters, in main memory
    loaded = load_trained(run, torch.device("cpu"))       # loaded.policy has them
    with loaded.before_training():
        ...                                               # loaded.policy is the model before training
    loaded.place(open_run(run.folder, 40))                # another checkpoint of the same run

Nothing is locked or written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tempflow.common.errors import BadInput
from tempflow.common.files import user_path
from tempflow.common.tensors import gather
from tempflow.models.load import load_policy
from tempflow.models.network.adapters import read_saved
from tempflow.models.network.network import Spread
from tempflow.models.pipeline import PipelinePolicy
from tempflow.models.weights.files import read_tensors
from tempflow.models.weights.origin import Origin
from tempflow.parallel.shards import put
from tempflow.run import checkpoint as saved
from tempflow.run.folder import SETTINGS, saved_iteration
from tempflow.run.snapshot import Unfit, check_numbers, compare
from tempflow.settings.fields import Config, ModelConfig
from tempflow.settings.reading import load

WEIGHTS = {"averaged": "average", "raw": "parameters"}
"""How the weights of a checkpoint are called -> the part of it that holds them."""
LAST, BEST, FINAL = "last", "best", "final"
ADAPTERS, TRANSFORMER = "pytorch_lora_weights.safetensors", "transformer"
"""What a run leaves in its folder: its adapters, or the whole transformer, averaged."""
TRIES = 5
"""A run that is going on may drop a checkpoint while it is being read."""


@dataclass(frozen=True)
class TrainedRun:
    """A run as one of its checkpoints left it."""

    folder: Path
    config: Config
    checkpoint: str
    """the name of the checkpoint, or of the file or folder of final weights"""
    iteration: int
    weights: str
    """averaged or raw"""
    parameters: dict[str, Tensor]
    """name -> tensor in main memory: all that was trained"""


@dataclass(frozen=True)
class Loaded:
    """A policy that can take any parameters of one run."""

    policy: PipelinePolicy
    start: dict[str, Tensor]
    """name -> tensor in main memory: the parameters before training"""

    @torch.no_grad()
    def place(self, run: TrainedRun | None) -> None:
        """Gives the policy a run's parameters; None those before training.

        Raises:
            BadInput: they are another model's.
        """
        own = self.policy.trainable()
        found = self.start if run is None else fitting(run, own, self.policy.network.module.state_dict())
        for name, parameter in own.items():
            put(parameter, found[name])
        self.policy.refresh_merged()

    @contextmanager
    def before_training(self) -> Iterator[None]:
        """Within this context the policy is the model before training; its parameters come back afterwards."""
        now = gather(self.policy.trainable())
        self.place(None)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.policy.trainable().items():
                    put(parameter, now[name])
            self.policy.refresh_merged()


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run."""
    return (folder / SETTINGS).is_file()


def read_settings(folder: Path, overrides: Sequence[str] = ()) -> Config:
    """The settings of a run, `section.field=value` laid on top.

    Raises:
        BadInput: the folder is no run's, or its settings cannot be read.
    """
    path = user_path("run", folder)
    if not is_run(path):
        hint = "there is no such folder" if not path.exists() else f"holds no {SETTINGS}"
        raise BadInput("run", folder, f"{hint}; give the folder of a run, such as runs/digits")
    return load([str((path / SETTINGS).absolute()), *overrides])


def open_run(
    folder: Path | str, checkpoint: str | int = LAST, weights: str = "averaged", overrides: Sequence[str] = ()
) -> TrainedRun:
    """A run with the parameters of one of its checkpoints, whose checksums have been compared.

    Args:
        checkpoint: `last`, `best` (by gold), the number of an iteration, or `final`: the weights that lie in the
            folder for other programs (averaged).
        weights: averaged, as evaluations are, or raw.
        overrides: settings to be laid on the run's own.
    Raises:
        BadInput: no run there, none of its weights, no such checkpoint, or one that is damaged.
    """
    folder = user_path("run", folder)
    config = read_settings(folder, overrides)
    if weights not in WEIGHTS:
        raise BadInput("--weights", weights, f"choose one of {', '.join(WEIGHTS)}")
    if checkpoint == FINAL:
        return _open_final(folder, config, weights)
    for attempt in range(TRIES):
        path = find_checkpoint(folder, checkpoint)
        try:
            snapshot = saved.read(path, (WEIGHTS[weights],))
            check_numbers(snapshot)
        except Unfit as problem:
            if not path.exists() and attempt < TRIES - 1:
                continue
            others = _named([other for other in saved.checkpoints(path.parent) if other != path])
            hint = f"{path} cannot be used ({problem}){f'; there are also {others}' if others else ''}"
            raise BadInput("--checkpoint", checkpoint, hint) from problem
        parameters = snapshot.tensors[WEIGHTS[weights]]
        return TrainedRun(folder, config, path.name, snapshot.progress.iteration, weights, parameters)
    raise AssertionError("the last attempt returns or raises")


def find_checkpoint(folder: Path, checkpoint: str | int) -> Path:
    """The folder of a checkpoint: of `last`, `best` or an iteration.

    Raises:
        BadInput: naming those that there are.
    """
    kept = folder / "checkpoints"
    found = saved.checkpoints(kept)
    if not found:
        raise BadInput("run", folder, f"holds no weights: no checkpoint in {kept.name}/{_final_instead(folder)}")
    choose = SPECIAL.get(str(checkpoint), lambda kept: _numbered(kept, str(checkpoint)))
    path = choose(kept)
    if path is None:
        why = "no evaluation with a gold score was saved" if checkpoint == BEST else "no such checkpoint"
        raise BadInput("--checkpoint", checkpoint, f"{why}; there are {LAST} and {_named(found)}")
    return path


def load_trained(
    run: TrainedRun, device: torch.device, keep_reference: bool = False, spread: Spread | None = None
) -> Loaded:
    """The policy of a run with its parameters.

    Args:
        keep_reference: for full training, keep a copy of the weights for `policy.reference()`; adapters need none.
        spread: shares the transformer out over processes.
    Raises:
        BadInput: the model does not load, or the parameters are another model's.
    """
    loaded = load_untrained(run.config, device, keep_reference, spread)
    loaded.place(run)
    return loaded


def load_untrained(
    config: Config, device: torch.device, keep_reference: bool = False, spread: Spread | None = None,
    slowest: Callable[[Tensor], Tensor] | None = None,
) -> Loaded:  # fmt: skip
    """The policy of settings before any training, with `model.lora` if there is one.

    Args:
        keep_reference, spread: as `load_trained`.
        slowest: the largest of each number over all processes, by which these choose the same attention.
    """
    model = replace(config.model, gradient_checkpointing=False)
    policy = load_policy(model, config.sample, device, keep_reference, config.learn.rows, slowest, spread)
    return Loaded(policy, gather(policy.trainable()))


def fitting(run: TrainedRun, own: Mapping[str, Tensor], known: Collection[str]) -> dict[str, Tensor]:
    """A run's parameters, which are the policy's by name, shape and type.

    Args:
        known: names of all tensors of the network; a whole transformer's files also hold those that are not trained.
    """
    found = {name: tensor for name, tensor in run.parameters.items() if name in own or name not in known}
    try:
        compare(found, own)
    except Unfit as problem:
        hint = f"{run.folder / run.checkpoint} does not fit the model of the run's settings ({problem})"
        raise BadInput("--checkpoint", run.checkpoint, hint) from problem
    return found


def _best(kept: Path) -> Path | None:
    found = saved.best(kept)
    return kept / found[0] if found else None


def _numbered(kept: Path, number: str) -> Path | None:
    return next((path for path in saved.checkpoints(kept) if number.isdecimal() and
                 saved.iteration_of(path) == int(number)), None)  # fmt: skip


SPECIAL: dict[str, Callable[[Path], Path | None]] = {LAST: lambda kept: saved.checkpoints(kept)[-1], BEST: _best}


def _named(found: Sequence[Path]) -> str:
    return ", ".join(str(saved.iteration_of(path)) for path in found)


def _final_instead(folder: Path) -> str:
    files = [name for name in (ADAPTERS, TRANSFORMER) if (folder / name).exists()]
    return f"; --checkpoint {FINAL} takes {files[0]}" if files else " yet"


def check_final(folder: Path, config: Config, weights: str) -> Path:
    """Where the weights are that the run left for other programs.

    Raises:
        BadInput: there are none, or raw ones are asked for.
    """
    if weights != "averaged":
        raise BadInput("--weights", weights, f"the weights of --checkpoint {FINAL} are averaged; take a checkpoint's")
    name = FINALS[config.model.train][1]
    if not (folder / name).exists():
        raise BadInput("run", folder, f"holds no weights: there is no {name} yet")
    return folder / name


def _open_final(folder: Path, config: Config, weights: str) -> TrainedRun:
    path = check_final(folder, config, weights)
    parameters = FINALS[config.model.train][0](path, config.model)
    return TrainedRun(folder, config, path.name, saved_iteration(folder), weights, parameters)


def _read_transformer(folder: Path, model: ModelConfig) -> dict[str, Tensor]:
    return read_tensors(folder, Origin("--checkpoint", str(folder), "the transformer"))


FINALS: dict[str, tuple[Callable[[Path, ModelConfig], dict[str, Tensor]], str]] = {
    "lora": (read_saved, ADAPTERS), "full": (_read_transformer, TRANSFORMER),
}  # fmt: skip
"""model.train -> how its final weights are read, and what they are called."""
