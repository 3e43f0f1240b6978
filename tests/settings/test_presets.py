"""Presets: valid, consistent for the machines they name, and the paper's numbers where they claim to be the paper's."""

import re

import pytest

from tempflow.explore.plan import BranchPlan
from tempflow.rewards.scorer import SCORERS
from tempflow.settings.checks import check_consistency
from tempflow.settings.reading import load, presets

PAPER = ["sd35_geneval", "sd35_pickscore", "flux_hpsv3", "qwen_pickscore"]
TO_COME = {"pickscore", "hpsv2", "hpsv3", "geneval"}
"""scorers that another module brings"""


@pytest.mark.parametrize("name", presets())
def test_every_preset_is_consistent(name):
    config, text = load([name]), presets()[name].read_text()
    for processes in (1, 2, 4, 8) if name in PAPER else (1, 2) if name == "digits" else (1,):
        check_consistency(config, processes)
    BranchPlan.parse(config.explore.forks, config.sample.steps, config.explore.siblings)
    assert {config.reward.name, config.reward.gold} <= SCORERS.keys() | TO_COME
    assert config.reward.gold != config.reward.name or config.reward.options
    assert text.startswith("# ")
    fields = re.findall(r"^  \w+:", text, re.M)
    assert len(fields) <= 26, "states only differences"


@pytest.mark.parametrize("name", PAPER)
def test_presets_of_the_paper(name):
    """method.md of the released code: steps, groups, optimizer."""
    config = load([name])
    branch, learn = config.branch, config.learn
    assert (config.sample.steps, explore.prompts, explore.noises, explore.siblings, explore.forks) == (10, 48, 4, 6, "all")
    assert (learn.updates, learn.lr, learn.betas, learn.weight_decay, learn.eps) == (2, 3e-4, (0.9, 0.999), 1e-4, 1e-8)
    assert (learn.max_grad_norm, objective.clip, credit.clip) == (1.0, 1e-4, 5.0)
    assert (config.model.lora_rank, config.model.lora_alpha, learn.ema_decay, learn.ema_every) == (32, 64.0, 0.9, 8)
    sample, particular = config.sample, {
        "sd35_geneval": (512, 4.5, 0.7, 0.004, "fp16", 40),
        "sd35_pickscore": (512, 4.5, 0.7, 0.001, "fp16", 40),
        "flux_hpsv3": (1024, 3.5, 0.9, 0.004, "bf16", 50),
        "qwen_pickscore": (512, 4.0, 1.2, 0.0, "bf16", 50),
    }  # fmt: skip
    found = (sample.height, sample.guidance, sample.noise_level, objective.kl, config.model.dtype, config.eval.steps)
    assert found == particular[name] and sample.width == sample.height and config.run.seed == 42


def test_presets_for_one_gpu_name_its_memory():
    single = [name for name in presets() if name not in [*PAPER, "digits"]]
    assert len({load([name]).model.path for name in single}) == 7, "one for each model family and size"
    for name in single:
        memory = int(re.search(r"_(\d+)gb$", name)[1])
        assert f"{memory} GB" in presets()[name].read_text()


def test_presets_write_to_different_folders():
    folders = [load([name]).run.dir for name in presets() if not name.startswith("flux1_dev")]
    assert len(set(folders)) == len(folders)
