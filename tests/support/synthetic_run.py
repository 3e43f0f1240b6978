"""A run's folder without a run: figures and pictures such as a long one with large pictures leaves."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path

import torch
from torch import Tensor

from tempflow.records.gallery import Room, keep_small
from tempflow.settings.fields import Config
from tempflow.settings.reading import to_yaml

DIFFERENT = 3
"""evaluations whose pictures are made"""


def pictures(count: int, side: int, step: int) -> Tensor:
    """(count, 3, side, side) uint8 pictures of coloured waves with some noise."""
    generator = torch.Generator().manual_seed(step)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    waves = [torch.sin((x * (1 + number % 5) + y * (1 + number % 3)) / side * 6 + channel + step / 40)
             for number in range(count) for channel in range(3)]  # fmt: skip
    image = torch.stack(waves).view(count, 3, side, side) * 90 + 128
    return (image + 3 * torch.randn(image.shape, generator=generator)).clamp(0, 255).to(torch.uint8)


def make_run(folder: Path, iterations: int, prompts: int, side: int = 256, every: int = 5) -> Path:
    """Its rows, scores, settings and small pictures; those of later evaluations are copies of the first ones'."""
    rng = random.Random(0)
    texts = [f"prompt {number}: a cat, a <script>alert(1)</script> & a 'hat'" for number in range(prompts)]
    folder.mkdir(parents=True, exist_ok=True)
    start = {"sigmas": [1 - k / 10 for k in range(11)], "loss_weights": [2 - k / 5 for k in range(9)], "tail_rows": 8}
    rows: list[dict] = [{"step": 0, "seconds": 0.0, "rollouts": 0, "picture_prompts": texts, **start}]
    for step in range(iterations + 1):
        rows += [_iteration(step, rng)] if step else []
        if step % every == 0 or step == iterations:
            rows.append(_evaluation(folder, step, iterations, rng))
    evaluated = [row["step"] for row in rows if "scores_missing" in row]
    for number, step in enumerate(evaluated):
        if number < DIFFERENT:
            keep_small(folder, step, pictures(prompts, side, step), Room(len(evaluated), 1e9))
        else:
            original = folder / "gallery" / f"step_{evaluated[number % DIFFERENT]:06d}"
            shutil.copytree(original, folder / "gallery" / f"step_{step:06d}")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(to_yaml(Config()))
    return folder


def _iteration(step: int, rng: random.Random) -> dict:
    noise, rise = abs(rng.gauss(0, 0.02)), 1 - math.exp(-step / 60)
    phases = {"trunk": 3.0, "tails": 30.0, "decode": 6.0, "reward": 4.0, "wait": 1.0, "learn": 20.0}
    counts = {"rollouts": 1296 * step, "network_rows": 9000 * step, "rewards_missing": 0, "groups_masked": 7}
    ratios = {"ratio_mean": 1.0, "ratio_max": 1.0004, "clip_fraction": noise, "approx_kl": noise * 1e-6,
              "log_ratio_mean": noise * 1e-3, "log_ratio_max": noise * 5e-3, "first_log_ratio_max": 0.0}  # fmt: skip
    spread = [0.1 * math.exp(-k / 3) * (1.2 - rise) + noise / 5 for k in range(9)]
    rewards = {"reward_mean": 0.6 + 0.3 * rise + noise, "reward_means": {"pickscore": 0.6 + 0.3 * rise, "ocr": 0.5}}
    return {"step": step, "seconds": 64.0 * step, "training_seconds": 60.0 * step, "rollouts_per_hour": 7e4,
            "reward_std_per_step": spread, "idle_share": 0.3 * rise, "tail_waste": 0.0, "kl": rise * 0.02,
            "grad_norm": 0.4 + noise * 5, "warnings": ["reward_spread"] if step == 150 else [],
            "phase_seconds": {name: mean + rng.random() for name, mean in phases.items()},
            **counts, **ratios, **rewards}  # fmt: skip


def _evaluation(folder: Path, step: int, iterations: int, rng: random.Random) -> dict:
    share = step / iterations
    reward, gold = 0.6 + 0.35 * share, 0.5 + 0.4 * share - 0.35 * share**3
    rewards = [min(1.0, max(0.0, rng.gauss(reward, 0.1))) for _ in range(128)]
    (folder / "scores").mkdir(exist_ok=True)
    scores = {"reward_test": rewards, "gold": [min(1.0, max(0.0, rng.gauss(gold, 0.15))) for _ in range(128)]}
    (folder / "scores" / f"step_{step:06d}.json").write_text(json.dumps(scores))
    fallen = {"gold_fall": {"gold": 0.07}} if share >= 0.95 else {}
    return {"step": step, "seconds": 64.0 * step + 9, "reward_test": reward, "gold": gold, "scores_missing": 0,
            "nonfinite_latents": 0, "nonfinite_images": 0, "phase_seconds": {"evaluate": 9.0}, **fallen}  # fmt: skip
