"""Runs of a few seconds through the command line's own entry point."""

from pathlib import Path

from tempflow.train import main

SMALL = ["digits", "explore.prompts=2", "explore.noises=2", "explore.siblings=3", "explore.forks=[0,3]",
         "sample.steps=5", "learn.lr=3e-4", "learn.lr_schedule=constant", "learn.rows=2", "eval.prompts=6",
         "eval.steps=4", "eval.pictures=3", "eval.every=2", "learn.ema_every=1", "learn.iterations=4",
         "run.save_every=2"]  # fmt: skip


def train(folder: Path, *arguments: str) -> int:
    """A small run; names of further presets come before settings."""
    names = [argument for argument in arguments if "=" not in argument]
    overrides = [argument for argument in arguments if "=" in argument]
    return main([SMALL[0], *names, *SMALL[1:], f"run.dir={folder}", *overrides])
