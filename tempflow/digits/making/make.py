"""Make the digits benchmark from nothing: `python -m tempflow.digits.making.make [all|prompts|classifiers|pipeline]`.

It takes about a quarter of an hour on two cores. The same seed gives the same files on the same
processor with the same number of threads (OMP_NUM_THREADS; the shipped files were made with 2);
elsewhere sums are added in another order, and the weights come out a little different.
`report` makes nothing and prints the figures of what is there.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tempflow.digits.canvas import DigitSplit, Renderer, load_splits
from tempflow.digits.captions import split_captions, test_prompts, train_prompts, write_prompts
from tempflow.digits.classifiers import CLASSIFIERS, save_weights, train_classifier

PACKAGE_FOLDER = Path(__file__).parents[1]
CLASSIFIER_STEPS = {"reward": 1200, "gold": 2000}
PIPELINE_LIMIT = 8 * 2**20  # bytes


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a fresh path to write a file or folder to; it takes the target's place when all went well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as workshop:
        fresh = Path(workshop) / target.name
        yield fresh
        if target.is_dir():
            target.rename(Path(workshop) / "old")
        os.replace(fresh, target)


def make_prompts(out: Path) -> None:
    """Write prompts/train.jsonl and prompts/test.jsonl."""
    for name, captions in (("train", train_prompts()), ("test", test_prompts())):
        with replacing(out / "prompts" / f"{name}.jsonl") as path:
            write_prompts(path, captions)


def make_classifiers(out: Path, splits: dict[str, DigitSplit], seed: int) -> None:
    """Train and write reward.safetensors and gold.safetensors."""
    for name in CLASSIFIERS:
        classifier = train_classifier(name, splits[name], CLASSIFIER_STEPS[name], seed)
        with replacing(out / f"{name}.safetensors") as path:
            save_weights(classifier, path)


def make_pipeline(out: Path, split: DigitSplit, seed: int) -> None:
    """Train and write the folder pipeline/."""
    from tempflow.digits.making.generator import Budget, train_pipeline

    captions, _ = split_captions()
    pipeline = train_pipeline(Renderer(split.images, split.labels), captions, Budget(), seed)
    save_pipeline(pipeline, out)


def report(out: Path, splits: dict[str, DigitSplit]) -> None:
    """Print the figures of everything that lies in the folder."""
    from tempflow.digits.making import figures

    if not all((out / f"{name}.safetensors").exists() for name in CLASSIFIERS):
        return
    for line in figures.report_classifiers(out, splits):
        print(line)
    print(figures.report_real_canvases(out, splits["pipeline"]))
    if (out / "pipeline").is_dir():
        from diffusers import StableDiffusion3Pipeline

        pipeline = StableDiffusion3Pipeline.from_pretrained(out / "pipeline")
        print(figures.report_restored_canvases(out, pipeline, splits["pipeline"]))
        for line in figures.report_base(out, pipeline):
            print(line)


def parse_arguments(words: str, parts: Sequence[str], folder: Path) -> argparse.Namespace:
    """What to make (`what`: one of the parts, all, or report), where to (`out`), from which `seed`.

    Args:
        words: of the help. folder: where to, unless told otherwise.
    """
    parser = argparse.ArgumentParser(description=words)
    parser.add_argument("what", nargs="?", default="all", choices=("all", *parts, "report"))
    parser.add_argument("--out", type=Path, default=folder, help="folder to write to (default: the package)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def save_pipeline(pipeline: Any, out: Path) -> None:
    """Write the folder pipeline/, which a package can hold.

    Raises:
        RuntimeError: it takes more than PIPELINE_LIMIT bytes.
    """
    with replacing(out / "pipeline") as path:
        pipeline.save_pretrained(path)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        if size > PIPELINE_LIMIT:
            raise RuntimeError(f"the pipeline takes {size} bytes, more than the {PIPELINE_LIMIT} allowed")


def main() -> None:
    arguments = parse_arguments(__doc__ or "", ("prompts", "classifiers", "pipeline"), PACKAGE_FOLDER)
    splits = load_splits()
    if arguments.what in ("all", "prompts"):
        make_prompts(arguments.out)
    if arguments.what in ("all", "classifiers"):
        make_classifiers(arguments.out, splits, arguments.seed)
    if arguments.what in ("all", "pipeline"):
        make_pipeline(arguments.out, splits["pipeline"], arguments.seed)
    if arguments.what != "prompts":
        report(arguments.out, splits)


if __name__ == "__main__":
    main()
