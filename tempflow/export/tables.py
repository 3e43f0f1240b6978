"""Tables and code of a model card."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tempflow.common.errors import BadInput
from tempflow.common.files import SHIPPED
from tempflow.export.base import Base
from tempflow.export.subject import Subject
from tempflow.forecast.words import COMPARED, Forecast
from tempflow.method import read_method
from tempflow.run.hacking import Scores, paired_change, read_scores
from tempflow.settings.fields import Config
from tempflow.trained.opening import TrainedRun

SETTINGS: dict[str, Callable[[Config], Any]] = {
    "base": lambda c: f"`{c.model.path}` in {c.model.dtype}",
    "trained": lambda c: TRAINED[c.model.train].format(rank=c.model.lora_rank, alpha=c.model.lora_alpha),
    "forks": lambda c: f"{c.explore.forks}, of {c.explore.noises} noises a prompt, with {c.explore.siblings} siblings",
    "compared": lambda c: f"branches of {COMPARED[c.credit.group]}",
    "sampler": lambda c: f"{c.sample.steps} steps of {c.sample.transition}, noise {c.sample.noise_level}",
    "guidance": lambda c: f"{c.sample.guidance:g}",
    "loss": lambda c: f"weights of steps: {c.objective.weighting}; clip {c.objective.clip:g}, KL {c.objective.kl:g}",
    "optimizer": lambda c: f"{c.learn.optimizer}, learning rate {c.learn.lr:g} ({c.learn.lr_schedule})",
    "moving average": lambda c: f"decay {c.learn.ema_decay:g}, every {c.learn.ema_every} optimizer steps",
    "evaluation": lambda c: f"{c.eval.prompts} held-out prompts, {c.eval.steps} steps, seed {c.eval.seed}",
    "seed": lambda c: c.run.seed,
}
"""What the card names of the settings; all of them are in config.yaml."""
TRAINED = {"lora": "LoRA of rank {rank}, alpha {alpha:g}", "full": "all parameters of the transformer"}

GUIDANCE = {"QwenImagePipeline": 'true_cfg_scale={:g}, negative_prompt=" "'}
"""How a pipeline is told of guidance, where it is not by guidance_scale."""


def one_line(text: str) -> str:
    """Text for a cell of a table."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")


UNITS = ((3600, "hours"), (60, "minutes"), (0, "seconds"))
"""From so many seconds on -> the unit of a time."""


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    unit, name = next(pair for pair in UNITS if seconds >= pair[0])
    return f"{seconds / max(unit, 1):,.1f} {name}"


def settings(config: Config) -> str:
    """The settings that matter most."""
    lines = [f"| {name} | {one_line(str(told(config)))} |" for name, told in SETTINGS.items()]
    return "\n".join(["| setting | |", "|---|---|", *lines])


def plan(subject: Subject) -> str:
    """The plan that the run printed at its start, but for the line on its machine, as a list."""
    config, skeleton = subject.run.config, subject.skeleton
    method, schedule = read_method(config, skeleton.sigmas(config.sample.steps))
    lines = Forecast(config, skeleton, method, schedule, 1).describe("cpu").splitlines()[1:]
    return "\n".join(f"- {line.replace('*', '&ast;')}" for line in lines)


def row_after(rows: Sequence[Mapping[str, Any]], iteration: int) -> Mapping[str, Any] | None:
    """The last evaluation not past an iteration, but for the one before training."""
    return next((row for row in reversed(rows) if 0 < row["step"] <= iteration and _scored(row)), None)


def _scored(row: Mapping[str, Any]) -> list[str]:
    """The held-out scores of a row: gold first."""
    golds = sorted(name for name in row if name.startswith("gold") and name != "gold_fall")
    return [name for name in (*golds, "reward_test") if row.get(name) is not None]


def scores(rows: Sequence[Mapping[str, Any]], run: TrainedRun) -> str:
    """Held-out scores before and after, and their difference with its standard error."""
    after, before = row_after(rows, run.iteration), rows[0] if rows else {}
    if after is None:
        return ""
    ends = _ends(run, after["step"])
    lines = [f"| {_score_words(name, run.config)} | {_figure(before.get(name))} | {_figure(after[name])} | "
             f"{_difference(name, *ends)} |" for name in _scored(after)]  # fmt: skip
    averaged = "" if run.weights == "averaged" else ", with averaged weights (those in this folder are not)"
    return "\n".join([
        "## Scores\n",
        f"Means over {run.config.eval.prompts:,} held-out prompts{averaged}; the difference, of the same prompts and "
        "noises, with its standard error.\n",
        f"| score | before | after {after['step']:,} iterations | difference |", "|---|---|---|---|", *lines,
    ])  # fmt: skip


def _ends(run: TrainedRun, step: int) -> tuple[Scores, Scores]:
    """Scores by prompt of the first evaluation and of that at a step."""
    try:
        found = read_scores(run.folder, step + 1) or [{}]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BadInput("scores", run.folder / "scores", f"holds a file that is none of a run's ({error})") from error
    return found[0], found[-1]


def _difference(name: str, before: Scores, after: Scores) -> str:
    if name not in before or name not in after or len(before[name]) != len(after[name]):
        return "-"
    change, error = paired_change(before[name], after[name])
    return f"{change:+.3g} ± {error:.2g}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _score_words(name: str, config: Config) -> str:
    golds = [config.reward.gold] if isinstance(config.reward.gold, str) else config.reward.gold or []
    if name == "reward_test":
        return "reward, which was optimised"
    which = ", ".join(golds) if name == "gold" else name.removeprefix("gold_")
    return f"gold (`{which}`), which was only watched"


def load_code(subject: Subject, base: Base, repository: str | None, prompts: Sequence[str]) -> str:
    """How to load the weights, as a block of Python that runs in this folder."""
    here = f"HERE = {repository!r}" if repository else 'HERE = "."  # this folder'
    lines = [*_imports(subject, base), "", _base_line(base), here, *_pipeline_lines(subject), *_call(subject, prompts)]
    ending = "\n\nA strength of 1 is the trained change, 0.5 is half of it." if subject.lora else ""
    code = "\n".join(lines)
    return f"## How to load it\n\n```python\n{code}\n```{ending}{_shipped_words(base)}"


def _shipped_words(base: Base) -> str:
    words = f"\n\n`{base.shown}` is a small pipeline that comes with tempflow; its pictures are of digits."
    return words if base.shown.startswith(SHIPPED) else ""


def _imports(subject: Subject, base: Base) -> list[str]:
    names = ["DiffusionPipeline"] if subject.lora else ["DiffusionPipeline", type(subject.network.module).__name__]
    shipped = ["from tempflow.common.files import resolve"] if base.shown.startswith(SHIPPED) else []
    return ["import torch", f"from diffusers import {', '.join(names)}", *shipped]


def _base_line(base: Base) -> str:
    place = f"str(resolve({base.shown!r}))" if base.shown.startswith(SHIPPED) else repr(base.shown)
    return f"BASE = {place}"


def _pipeline_lines(subject: Subject) -> list[str]:
    dtype = str(subject.whole_dtype)
    ready = 'pipeline.to("cuda" if torch.cuda.is_available() else "cpu")'
    if subject.lora:
        return [f"pipeline = DiffusionPipeline.from_pretrained(BASE, torch_dtype={dtype})",
                'pipeline.load_lora_weights(HERE, adapter_name="trained")',
                'pipeline.set_adapters("trained", 1.0)', ready]  # fmt: skip
    kind = type(subject.network.module).__name__
    return [f'transformer = {kind}.from_pretrained(HERE, subfolder="transformer", torch_dtype={dtype})',
            f"pipeline = DiffusionPipeline.from_pretrained(BASE, transformer=transformer, torch_dtype={dtype})",
            ready]  # fmt: skip


def _call(subject: Subject, prompts: Sequence[str]) -> list[str]:
    """The pipeline called as the run's evaluations are."""
    config, (_, height, width) = subject.run.config, subject.skeleton.image_shape
    kind = subject.network.pipeline_class.__name__
    guidance = GUIDANCE.get(kind, "guidance_scale={:g}").format(config.sample.guidance)
    prompt = " ".join(prompts[0].split()) if prompts else "a red apple on a table"
    return [
        "image = pipeline(",
        f"    {prompt!r},",
        f"    num_inference_steps={config.eval.steps}, {guidance},",
        f"    height={height}, width={width}, max_sequence_length={config.model.text_tokens},",
        "    generator=torch.Generator().manual_seed(0),",
        ").images[0]",
        'image.save("picture.png")',
    ]
