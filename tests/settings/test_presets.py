"""Presets: valid, consistent for the machines they name, and the published numbers where they claim to be published."""

import re

import pytest
import yaml

from tempflow.common.files import resolve
from tempflow.explore.plan import read_forks
from tempflow.rewards.scorer import SCORERS
from tempflow.settings.checks import check_consistency
from tempflow.settings.reading import load, presets
from tempflow.settings.stacks import FOLDER, KINDS, names_of
from tempflow.studies.compare.jobs import Costs
from tempflow.studies.compare.study import configuration, read_study

PAPER = ["sd35_geneval", "sd35_pickscore", "flux_hpsv3", "qwen_pickscore"]
METHODS = [name for name in names_of("methods") if name != "guard"]
SINGLE = [name for name in names_of("runs") if name not in PAPER and not name.startswith("digits")]
BASES = ["digits", "sd35_medium pickscore", "flux1_dev hpsv3", *names_of("runs")]

METHOD_FIELDS = {
    "sample.transition", "sample.noise_level", "explore.noises", "explore.siblings", "explore.forks", "explore.take",
    "explore.draw", "explore.every", "explore.window", "explore.jump", "tails.solver", "tails.stride", "credit.group",
    "credit.std", "objective.weighting", "objective.ratio", "objective.clip", "learn.updates_by",
}  # fmt: skip


def stated(name: str) -> dict:
    """The fields that a preset's own file states."""
    content = yaml.safe_load(presets()[name].read_text())
    sections = {key: part for key, part in content.items() if isinstance(part, dict)}
    return {f"{section}.{field}": value for section, part in sections.items() for field, value in part.items()}


def test_every_file_is_a_preset_with_a_name_of_its_own():
    files = list(FOLDER.rglob("*.yaml"))
    assert sorted(presets().values()) == sorted(files), "no name twice, no folder besides those of the kinds"
    assert {path.parent.name for path in files} == set(KINDS)


@pytest.mark.parametrize("name", presets())
def test_every_preset_loads_and_is_explained(name):
    assert load([name]) is not None
    assert presets()[name].read_text().startswith("# ")


@pytest.mark.parametrize("name", ["digits", *names_of("tasks"), *names_of("runs")])
def test_presets_can_be_run_on_the_machines_they_name(name):
    config = load([name])
    for processes in (1, 2, 4, 8) if name in PAPER else (1, 2) if name == "digits" else (1,):
        check_consistency(config, processes)
    read_forks(config.explore, config.sample.steps)


@pytest.mark.parametrize("name", [*names_of("tasks"), *names_of("runs")])
def test_scorers_exist_and_gold_is_a_second_opinion(name):
    reward = load([name]).reward
    assert {reward.name, reward.gold} <= SCORERS.keys() and reward.gold != reward.name


def test_what_ships_with_the_package_is_there():
    config = load(["digits"])
    assert all(resolve(path).exists() for path in (config.model.path, config.prompts.train, config.prompts.test))


@pytest.mark.parametrize("name", PAPER)
def test_presets_of_the_paper(name):
    """The released code of TempFlow-GRPO: steps, groups, optimizer."""
    config = load([name])
    explore, credit, objective, learn = config.explore, config.credit, config.objective, config.learn
    assert (config.sample.steps, explore.prompts, explore.noises, explore.siblings) == (10, 48, 4, 6)
    assert (explore.forks, explore.window, credit.group, credit.std) == ("all", 1, "seed", "group")
    assert (learn.updates, learn.lr, learn.betas, learn.weight_decay, learn.eps) == (2, 3e-4, (0.9, 0.999), 1e-4, 1e-8)
    assert (learn.max_grad_norm, objective.clip, credit.clip, objective.weighting) == (1.0, 1e-4, 5.0, "noise")
    assert (config.model.lora_rank, config.model.lora_alpha, learn.ema_decay, learn.ema_every) == (32, 64.0, 0.9, 8)
    sample, particular = config.sample, {
        "sd35_geneval": (512, 4.5, 0.7, 0.004, "fp16", 40, "geneval", "drop"),
        "sd35_pickscore": (512, 4.5, 0.7, 0.001, "fp16", 40, "pickscore", "drop"),
        "flux_hpsv3": (1024, 3.5, 0.9, 0.004, "bf16", 50, "hpsv3", "keep"),
        "qwen_pickscore": (512, 4.0, 1.2, 0.0, "bf16", 50, "pickscore", "keep"),
    }  # fmt: skip
    found = (sample.height, sample.guidance, sample.noise_level, objective.kl, config.model.dtype, config.eval.steps,
             config.reward.name, credit.idle)  # fmt: skip
    assert found == particular[name] and sample.width == sample.height and config.run.seed == 42
    assert config.model.vae_dtype == "bf16", "fp16 overflows, fp32 takes twice the time"


def rows_of_iteration(name: str) -> int:
    return Costs().of_iteration(load([name]))(0)


def test_the_default_run_takes_half_the_rows_of_digits():
    """And has prompts, forks, tails and weights of its own; model, sampling, credit, reward and evaluation stay."""
    plain, own = load(["digits"]), load([])
    assert (own.explore.prompts, own.explore.noises, own.explore.forks) == (32, 1, "first:3")
    assert (plain.tails.stride, own.tails.stride) == (1, 2)
    whole, rows = (rows_of_iteration(name) for name in ("digits", "digits_even"))
    assert (whole, rows) == (2400, 1536)
    half = whole * plain.learn.iterations / 2
    assert half - rows < rows * own.learn.iterations <= half
    weights = own.objective.weighting
    assert len(weights) == own.sample.steps - 1 and sum(weights) == pytest.approx(len(weights), rel=0.01)
    assert sorted(weights, reverse=True) == weights and plain.objective.weighting == "noise"
    same = ("model", "sample", "credit", "reward", "eval")
    assert all(getattr(plain, section) == getattr(own, section) for section in same)


def test_a_run_on_digits_is_the_setting_of_its_study():
    """But for what no result is a function of, and for what differs from study to study."""
    for name, study, run in (("digits_even", "fig3", "default"), ("digits_first_forks", "forks", "first_3")):
        own, studied = load([name]), configuration(read_study(study), run)
        for section in ("sample", "explore", "credit", "objective", "model", "reward"):
            assert getattr(own, section) == getattr(studied, section), (name, section)
        assert own.tails.stride == studied.tails.stride
        assert (own.learn.lr, own.learn.rows) == (studied.learn.lr, studied.learn.rows)
        rows, limit = rows_of_iteration(name), read_study(study).budget.rows
        assert abs(own.learn.iterations * rows - limit) < rows, "to the end of that study"


def test_runs_for_one_gpu_name_its_memory_and_cover_every_model():
    assert len({load([name]).model.path for name in SINGLE}) == len(names_of("models")) - 2 == 7, "all but tiny_*"
    for name in SINGLE:
        memory = int(re.search(r"(\d+)gb$", name)[1])
        assert f"{memory} GB" in presets()[name].read_text()


def test_without_guidance_rows_are_halved_and_nothing_else_differs():
    """Twice the rows of ours in a call, so as many network rows as with guidance."""
    plain, free = load(["sd35_medium_24gb"]), load(["sd35_medium_no_guidance_24gb"])
    assert (plain.sample.guidance, free.sample.guidance) == (4.5, 1.0)
    assert (free.learn.rows, free.tails.rows) == (2 * plain.learn.rows, 2 * plain.tails.rows)
    same = ("model", "explore", "credit", "objective", "prompts", "reward", "eval")
    assert all(getattr(plain, section) == getattr(free, section) for section in same)


def test_runs_and_tasks_write_to_different_folders():
    names = [*names_of("tasks"), *(name for name in names_of("runs") if not name.startswith(("flux1_dev", "digits")))]
    folders = [load([name]).run.dir for name in names]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_states_every_field_in_which_methods_differ(name):
    """Else what another preset says would be left standing, and the method would be half of two."""
    left_to_others = {"sample.noise_level", "explore.noises", "explore.siblings"} if name == "tempflow" else set()
    assert set(stated(name)) == METHOD_FIELDS - left_to_others


def test_tempflow_is_the_method_of_the_defaults():
    assert load(["digits", "tempflow"]) == load(["digits"])
    assert load(["sd35_geneval", "tempflow"]) == load(["sd35_geneval"])


def test_guard_states_the_objective_only():
    assert set(stated("guard")) == {"objective.weighting", "objective.ratio", "objective.clip"}


@pytest.mark.parametrize("name", names_of("methods"))
def test_a_method_names_its_paper_and_how_it_differs_from_the_released_code(name):
    comment = presets()[name].read_text().split("\nsample:")[0].split("\non_top:")[0]
    assert re.search(r"arXiv \d{4}\.\d{5}", comment) and "# Differs from the released code: " in comment


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_methods_fit_every_base(base, method):
    config = load([*base.split(), method])
    check_consistency(config, 1)
    check_consistency(load([*base.split(), method, "guard"]), 1)
    read_forks(config.explore, config.sample.steps)


@pytest.mark.parametrize("method", METHODS)
def test_methods_fit_every_number_of_steps(method):
    for steps in (6, 8, 10, 16, 25, 28):
        rule = read_forks(load([method, f"sample.steps={steps}"]).explore, steps)
        assert max(rule.trained()) <= steps - 2 and 0 in rule.forks.pool


@pytest.mark.parametrize(
    ("method", "noise", "branches", "compared", "clip", "ratio"),
    [
        ("flow_grpo", ("flow_sde", 0.7), (24, 1), ("prompt", "global"), 1e-4, "gaussian"),
        ("flow_grpo_prompt", ("flow_sde", 0.7), (24, 1), ("prompt", "group"), 1e-4, "gaussian"),
        ("flow_grpo_fast", ("cps", 0.8), (24, 1), ("prompt", "global"), 1e-5, "undivided"),
        ("mixgrpo", ("flow_sde", 0.7), (1, 12), ("seed", "unbiased"), 1e-4, "gaussian"),
        ("mixgrpo_flash", ("flow_sde", 0.7), (1, 12), ("seed", "unbiased"), 1e-4, "gaussian"),
        ("dance_grpo", ("dance_sde", 0.3), (1, 12), ("seed", "unbiased"), 1e-4, "gaussian"),
        ("g2rpo", ("flow_sde", 0.7), (1, 12), ("seed", "unbiased"), 1e-4, "gaussian"),
        ("flash_grpo", ("flash_sde", 1.0), (8, 1), ("prompt", "group"), 1e-3, "gaussian"),
        ("flow_cps", ("cps", 0.8), (24, 1), ("prompt", "global"), 1e-5, "undivided"),
        ("egrpo", ("flow_sde", 0.7), (1, 12), ("seed", "unbiased"), 1e-4, "gaussian"),
        ("tempflow", ("flow_sde", 0.7), (4, 6), ("seed", "group"), 1e-4, "gaussian"),
    ],
)
def test_numbers_of_the_released_methods(method, noise, branches, compared, clip, ratio):
    """As their own code has them, read from it."""
    config = load(["sd35_medium", "geneval", method])
    explore, objective = config.explore, config.objective
    assert (config.sample.transition, config.sample.noise_level) == noise
    assert (explore.noises, explore.siblings) == branches
    assert (config.credit.group, config.credit.std) == compared
    assert (objective.clip, objective.ratio) == (clip, ratio)
    weighting = {"tempflow": "noise", "flash_grpo": "inverse_sensitivity"}.get(method, "uniform")
    assert objective.weighting == weighting
    assert config.learn.updates_by == ("forks" if method in ("g2rpo", "egrpo") else "trunks")
    assert config.tails.stride == {"g2rpo": [1, 2], "egrpo": [1, 2], "mixgrpo_flash": 3}.get(method, 1)
    assert config.tails.solver == ("dpmpp_2m" if method == "mixgrpo_flash" else "euler")


@pytest.mark.parametrize(
    ("method", "pool", "take", "last"),
    [
        ("tempflow", [0, 1, 2, 3, 4, 5, 6, 7, 8], 9, 8),
        ("flow_grpo", [0], 1, 8),
        ("flow_grpo_prompt", [0], 1, 8),
        ("flow_grpo_fast", [0, 1, 2, 3, 4], 1, 5),
        ("mixgrpo", [0, 1, 2, 3, 4, 5], 1, 8),
        ("mixgrpo_flash", [0], 1, 3),
        ("dance_grpo", [0], 1, 8),
        ("g2rpo", [0, 1, 2, 3, 4], 5, 4),
        ("flash_grpo", [0, 1, 2, 3, 4], 1, 4),
        ("flow_cps", [0], 1, 8),
        ("egrpo", [0, 1, 2], 3, 2),
    ],
)
def test_where_methods_fork_on_ten_steps(method, pool, take, last):
    explore = load([method]).explore
    rule = read_forks(explore, 10)
    assert (list(rule.forks.pool), rule.forks.take, rule.trained()[-1]) == (pool, take, last)
    assert explore.draw == {"mixgrpo": "slide", "flash_grpo": "prompt"}.get(method, "iteration")
    assert explore.every == (25 if method == "mixgrpo" else 1)
    assert explore.jump == ([1, 1, 2] if method == "egrpo" else 1)
