"""Gold falling while the reward rises is seen, and neither noise nor a common fall is mistaken for it."""

import torch

from tempflow.run.hacking import falls, keep_scores, read_scores


def scores(reward, gold, count=100):
    """An evaluation with means `reward` and `gold`: prompts differ a lot, evaluations by a little noise."""
    prompts, noise = torch.linspace(-1, 1, count), 0.05 * torch.randn(2, count)
    return {"reward_test": reward + prompts + noise[0], "gold": gold + prompts + noise[1]}


def test_a_fall_beside_a_rising_reward_is_seen():
    torch.manual_seed(0)
    history = [scores(0.5, 0.5), scores(0.6, 0.6), scores(0.7, 0.55)]
    found = falls(history, scores(0.8, 0.5), ["gold"], 3.0)
    assert abs(found["gold"] - 0.1) < 0.03  # below the best, not below the first or the last before


def test_what_is_no_hacking():
    torch.manual_seed(0)
    history = [scores(0.5, 0.5), scores(0.6, 0.6)]
    assert not falls(history, scores(0.7, 0.7), ["gold"], 3.0)  # both rise
    assert not falls(history, scores(0.5, 0.5), ["gold"], 3.0)  # both fall
    assert not falls(history, scores(0.7, 0.59), ["gold"], 3.0)  # within the noise
    assert not falls([], scores(0.7, 0.1), ["gold"], 3.0)  # nothing to compare with
    assert falls(history, scores(0.7, 0.59), ["gold"], 0.1)  # the threshold counts


def test_noise_alone_rarely_warns():
    """The same model again and again, gold by coin toss: hardly a warning in 200 runs of 10 evaluations."""
    torch.manual_seed(1)
    warned = 0
    for _ in range(200):
        runs = [{"reward_test": torch.rand(100) + step, "gold": (torch.rand(100) < 0.5).float()} for step in range(10)]
        warned += any(falls(runs[:step], runs[step], ["gold"], 3.0) for step in range(1, 10))
    assert warned <= 20


def test_only_prompts_with_both_opinions_count():
    before, now = scores(0.5, 0.5), scores(0.6, 0.4)
    now["gold"][:99] = float("nan")
    assert not falls([before], now, ["gold"], 3.0)  # one pair is no evidence
    now["gold"][10:99] = before["gold"][10:99] - 0.2
    assert falls([before], now, ["gold"], 3.0)


def test_scores_are_kept_for_a_resumed_run(tmp_path):
    rows = {"reward_test": torch.tensor([0.1, float("nan")]), "gold": torch.tensor([1.0, 0.0])}
    for step in (0, 10, 20):
        keep_scores(tmp_path, step, rows)
    (first, second) = read_scores(tmp_path, before=20)
    assert torch.equal(first["gold"], rows["gold"]) and torch.equal(second["reward_test"][:1], rows["reward_test"][:1])
    assert second["reward_test"][1].isnan()
