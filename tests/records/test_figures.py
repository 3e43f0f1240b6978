"""The report shows what it says: which numbers over what, which pictures before and after."""

import json

import numpy as np
import pytest
import torch

from tempflow.records import figures


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """The figure of a run of six iterations; two prompts, pictures of plain grey, one of a later iteration."""
    rows = [{"step": 0, "seconds": 0.0, "loss_weights": [1.5, 0.0, 0.5], "picture_prompts": ["one", "two"]},
            {"step": 0, "seconds": 0.0, "reward_test": 0.1, "gold": 0.9, "scores_missing": 0}]  # fmt: skip
    for step in range(1, 7):
        rows.append({"step": step, "seconds": 100.0 * step, "reward_mean": step / 10,
                     "reward_std_per_step": [float(step), None, 10.0 * step]})  # fmt: skip
    rows.append({"step": 6, "seconds": 650.0, "reward_test": 0.7, "gold": 0.3, "gold_fall": {"gold": 0.6},
                 "scores_missing": 0})  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step, grey in ((0, 40), (3, 80), (6, 120), (9, 160)):
        pictures = torch.full((2, 3, 4, 5), grey, dtype=torch.uint8)
        pictures[1] += 1
        figures.save_pictures(tmp_path, step, pictures)
    kept = []
    monkeypatch.setattr(figures.pyplot, "close", kept.append)
    assert figures.draw_report(tmp_path) == tmp_path / "report.png" and (tmp_path / "report.png").stat().st_size
    return kept[0]


def curves(axes) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): list(map(tuple, line.get_xydata().tolist())) for line in axes.lines}


def test_curves_over_iterations_and_over_time(drawn):
    by_step, by_time = (curves(axes) for axes in drawn.axes[:2])
    assert by_step["reward (training branches)"] == [(step, step / 10) for step in range(1, 6)] + [(6, 0.6)]
    assert by_step["gold (held-out)"] == [(0, 0.9), (6, 0.3)] and by_step["reward (held-out)"] == [(0, 0.1), (6, 0.7)]
    assert by_time["gold (held-out)"] == [(0, 0.9), (650, 0.3)]
    assert by_time["reward (training branches)"][0] == (100, 0.1)
    assert [axes.get_xlabel() for axes in drawn.axes[:3]] == ["iteration", "seconds", "fork step"]
    dotted = [line.get_xdata()[0] for axes in drawn.axes[:2] for line in axes.lines if line.get_linestyle() == ":"]
    assert dotted == [6, 650]


def test_spread_early_and_late_beside_the_weights(drawn):
    spread = drawn.axes[2]
    heights = [bar.get_height() for bar in spread.patches]
    assert heights == [1.5, 0, 15, 5.5, 0, 55], "means of iterations 1 2, then of 5 6; nothing where no fork was"
    assert list(spread.get_legend_handles_labels()[1]) == ["reward std, first third", "reward std, last third"]
    (twin,) = [axes for axes in drawn.axes if axes is not spread and axes.bbox.bounds == spread.bbox.bounds]
    assert list(curves(twin).values()) == [[(0, 1.5), (2, 0.5)]], "no weight at a step that is never trained"


def test_pictures_before_and_after_under_their_prompts(drawn):
    shown = [(axes.get_ylabel(), axes.get_title(), int(np.asarray(axes.images[0].get_array())[0, 0, 0]))
             for axes in drawn.axes if axes.images]  # fmt: skip
    assert shown == [("before\n(iteration 0)", "one", 40), ("", "two", 41), ("after\n(iteration 6)", "", 120),
                     ("", "", 121)]  # fmt: skip


def test_one_sibling_a_fork_has_nothing_to_compare(tmp_path, monkeypatch):
    rows = [{"step": 0, "seconds": 0.0, "loss_weights": [1.0, 1.0], "picture_prompts": []},
            {"step": 1, "seconds": 1.0, "reward_mean": 0.5, "reward_std_per_step": [None, None]}]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = []
    monkeypatch.setattr(figures.pyplot, "close", kept.append)
    figures.draw_report(tmp_path)
    spread = kept[0].axes[2]
    assert not spread.patches and "one sibling" in spread.texts[0].get_text()
