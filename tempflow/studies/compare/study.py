"""A study file: which runs, on which seeds, for how long, compared by what. Imports nothing heavy.

name: fig3
base: [digits, eval.seed=2026]         names of presets and files, then settings, as on the command line
runs: {tempflow: [tempflow], chain: [flow_grpo, learn.lr=1e-3]}
seeds: [1, 2, 3]
budget: {rows: 200000}                 or iterations, or seconds
target: 0.85
baseline: chain
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tempflow.common.errors import BadInput
from tempflow.common.files import PACKAGE, user_path, write_atomically
from tempflow.common.yaml_values import read_yaml_file, to_yaml
from tempflow.settings.fields import Config
from tempflow.settings.names import nearest
from tempflow.settings.reading import is_override, load

SHIPPED = PACKAGE / "studies" / "shipped"
KEPT = "study.yaml"
"""A study's own file in its folder."""
OWN = ("run.seed", "run.dir", "run.resume", "run.plan_only", "learn.iterations", "learn.max_seconds")
"""Fields that a study sets by itself."""
SHARED = ("model.path", "model.lora", "prompts.train", "prompts.test", "reward.name", "reward.gold", "reward.options",
          "eval.prompts", "eval.steps", "eval.noises", "eval.seed")  # fmt: skip
"""Fields in which all runs of a study agree, or there is nothing to compare."""
DEFAULTS = ("run.trackers=[]",)
GROWING = ("runs", "seeds")
"""What may be added to a study that has begun."""
FREE = ("processes", "about", "contrasts")
"""What changes nothing of its results."""

TEXTS = ("name", "about", "base", "runs", "baseline", "contrasts", "metric")
"""Fields of words alone."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
STRICT = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Budget(BaseModel):
    """How long each run goes on: exactly one of these."""

    model_config = STRICT
    iterations: Annotated[int, Field(ge=1)] | None = None
    rows: Annotated[int, Field(ge=1)] | None = None
    """network rows, evaluations apart; a run ends with the first iteration that reaches them"""
    seconds: Annotated[float, Field(gt=0)] | None = None
    """of training, evaluations apart"""

    def describe(self) -> str:
        name, value = next((name, value) for name, value in self if value is not None)
        return f"{value:,} {'network rows' if name == 'rows' else name}"


class Study(BaseModel):
    """What a study file holds."""

    model_config = STRICT
    name: Name
    about: str = ""
    """A sentence for the report."""
    base: list[str] = []
    """Presets, files and settings of all runs."""
    runs: Annotated[dict[Name, list[str]], Field(min_length=1)]
    """Name -> presets, files and settings on top of the base."""
    seeds: Annotated[list[Seed], Field(min_length=1)]
    """Run seeds; every run is made with each of them."""
    budget: Budget
    target: float | None = None
    """The value of the metric whose cost is told."""
    baseline: str | None = None
    """The run that the others are compared with, seed by seed."""
    contrasts: list[tuple[Name, Name]] = []
    """More differences to be told, each [run, the one it is compared with]."""
    metric: str = "gold"
    """A held-out score of metrics.jsonl: gold, gold_NAME, reward_test, or one of these by kind of prompt, gold/KIND."""
    processes: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Runs at a time; auto takes as many as there are cores, or GPUs."""

    def arguments(self, run: str) -> list[str]:
        """The command line of a run, without its seed and folder: names first, then settings."""
        given = [*DEFAULTS, *self.base, *self.runs[run]]
        return [a for a in given if not is_override(a)] + [a for a in given if is_override(a)]


def read_study(source: str) -> Study:
    """A study of a file, or one that ships with the package, by its name.

    Raises:
        BadInput: no such file, no YAML, an unknown or ill-typed field, or runs that cannot be made or compared.
    """
    study = _validated(_content(_find(source)), source)
    _check(study)
    return study


def _validated(content: Any, source: object) -> Study:
    """A study from the content of a file; types are those of JSON: no text or truth value is a number.

    Raises:
        BadInput: an unknown or ill-typed field.
    """
    try:
        return Study.model_validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][:2]) or "study"
        unknown = f"no such field; nearest: {nearest(name.split('.')[-1], Study.model_fields)}"
        hint = unknown if first["type"] == "extra_forbidden" else first["msg"][0].lower() + first["msg"][1:]
        raise BadInput(name, first["input"], f"in {source}: {hint}") from error


def _find(source: str) -> Path:
    shipped = SHIPPED / f"{source}.yaml"
    path = shipped if shipped.is_file() else user_path("study", source)
    if not path.exists():
        names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
        raise BadInput("study", source, f"no such file, and no study that ships: {names}")
    return path


def _content(path: Path) -> Any:
    return read_yaml_file("study", path, _is_text)


def _is_text(place: tuple[Any, ...]) -> bool:
    """Names and command lines are words, whatever they look like: `runs: {one: [run.seed=1, 007]}`."""
    return bool(place) and place[0] in TEXTS


def _check(study: Study) -> None:
    """What pydantic cannot tell."""
    given = [value for _, value in study.budget if value is not None]
    if len(given) != 1:
        raise BadInput("budget", dict(study.budget), "give exactly one of iterations, rows, seconds")
    if len(set(study.seeds)) < len(study.seeds):
        raise BadInput("seeds", study.seeds, "give each seed once")
    if study.baseline is not None and study.baseline not in study.runs:
        raise BadInput("baseline", study.baseline, f"no such run; nearest: {nearest(study.baseline, study.runs)}")
    for run in (run for pair in study.contrasts for run in pair):
        if run not in study.runs:
            raise BadInput("contrasts", run, f"no such run; nearest: {nearest(run, study.runs)}")
    configs = {run: configuration(study, run) for run in study.runs}
    first, *others = configs.items()
    for name in SHARED:
        section, field = name.split(".")
        expected = getattr(getattr(first[1], section), field)
        for run, config in others:
            found = getattr(getattr(config, section), field)
            if found != expected:
                hint = f"{first[0]} has {expected}: they could not be compared"
                raise BadInput(f"runs.{run}", f"{name}={found}", hint)


def configuration(study: Study, run: str) -> Config:
    """The settings of a run, without its seed and folder.

    Raises:
        BadInput: naming the run.
    """
    arguments = study.arguments(run)
    own = next((a for a in arguments if a.partition("=")[0] in OWN), None)
    if own:
        raise BadInput(f"runs.{run}", own, "the study sets this field itself: by seeds, budget and the study's folder")
    try:
        config = load(arguments)
    except BadInput as error:
        raise BadInput(f"runs.{run}", f"{error.field}={error.value}", error.hint) from error
    if study.budget.seconds and config.learn.lr_schedule != "constant":
        hint = "a budget in seconds does not know where it would end; set learn.lr_schedule=constant"
        raise BadInput(f"runs.{run}", f"learn.lr_schedule={config.learn.lr_schedule}", hint)
    if config.prompts.test is None:
        raise BadInput(f"runs.{run}", "prompts.test=null", "a study compares held-out scores; give prompts")
    return config


def open_folder(study: Study, folder: Path) -> None:
    """Keeps the study beside its runs, unless another one is there, of which this is no continuation.

    Raises:
        BadInput: anything but runs, seeds, processes and words differs, or runs or seeds are gone.
    """
    kept, now = folder / KEPT, study.model_dump()
    if kept.is_file():
        before = _validated(_content(kept), kept).model_dump()
        for name, value in before.items():
            if name not in FREE and not _continues(name, value, now[name]):
                hint = f"the study in {folder} has {value}; only runs and seeds may be added: give it another name"
                raise BadInput(name, now[name], hint)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(kept, to_yaml(now).encode())


def _continues(name: str, before: Any, now: Any) -> bool:
    """Whether a field is what it was, but for what was added."""
    if name not in GROWING:
        return now == before
    if isinstance(before, dict):
        return all(key in now and now[key] == value for key, value in before.items())
    return set(before) <= set(now)
