"""Make the scenes from nothing: `python -m tempflow.scenes.making.make [all|prompts|readers|pipeline]`.

It takes about an hour and needs scikit-learn. The same seed gives the same files on the same processor with the same
number of threads (OMP_NUM_THREADS; the shipped files were made with 1); elsewhere weights come out a little different.
`report` makes nothing and prints the figures of what is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tempflow.digits.canvas import DigitSplit, load_splits
from tempflow.digits.classifiers import save_weights
from tempflow.digits.making.generator import Budget
from tempflow.digits.making.make import parse_arguments, replacing, save_pipeline
from tempflow.scenes.canvas import Painter
from tempflow.scenes.judges import READERS, train_reader
from tempflow.scenes.prompts import split_tasks, train_prompts, write_prompts

PACKAGE_FOLDER = Path(__file__).parents[1]
READER_STEPS = {"reward": 1500, "gold": 5000}
BUDGET = Budget(autoencoder_steps=1500, true_steps=6000, noisy_steps=250)


def make_prompts(out: Path) -> None:
    """Write prompts/train.jsonl and prompts/test.jsonl."""
    for name, tasks in (("train", train_prompts()), ("test", split_tasks()[1])):
        with replacing(out / "prompts" / f"{name}.jsonl") as path:
            write_prompts(path, tasks)


def make_readers(out: Path, splits: dict[str, DigitSplit], seed: int) -> None:
    """Train and write reward.safetensors and gold.safetensors."""
    for name in READERS:
        reader = train_reader(name, splits[name], READER_STEPS[name], seed)
        with replacing(out / f"{name}.safetensors") as path:
            save_weights(reader, path)


def make_pipeline(out: Path, split: DigitSplit, seed: int) -> None:
    """Train and write the folder pipeline/."""
    from tempflow.scenes.making.generator import train_pipeline

    pipeline = train_pipeline(Painter(split.images, split.labels), split_tasks()[0], BUDGET, seed)
    save_pipeline(pipeline, out)


def report(out: Path, splits: dict[str, DigitSplit]) -> Iterator[str]:
    """The figures of everything that lies in the folder."""
    from diffusers import StableDiffusion3Pipeline

    from tempflow.scenes.making import figures

    if not all((out / f"{name}.safetensors").exists() for name in READERS):
        return
    yield from figures.report_readers(out, splits)
    yield from figures.report_real(out, splits["pipeline"])
    if (out / "pipeline").is_dir():
        pipeline = StableDiffusion3Pipeline.from_pretrained(out / "pipeline")
        yield figures.report_restored(out, pipeline, splits["pipeline"])
        yield from figures.report_base(out, pipeline)


def main() -> None:
    """Makes the parts that the command line names, and prints their figures."""
    arguments = parse_arguments(__doc__ or "", ("prompts", "readers", "pipeline"), PACKAGE_FOLDER)
    splits = load_splits()
    if arguments.what in ("all", "prompts"):
        make_prompts(arguments.out)
    if arguments.what in ("all", "readers"):
        make_readers(arguments.out, splits, arguments.seed)
    if arguments.what in ("all", "pipeline"):
        make_pipeline(arguments.out, splits["pipeline"], arguments.seed)
    if arguments.what != "prompts":
        for line in report(arguments.out, splits):
            print(line)


if __name__ == "__main__":
    main()
