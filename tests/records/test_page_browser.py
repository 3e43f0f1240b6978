"""report.html in a real browser: what it draws, what one does with it, and that it asks nobody for anything."""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import browser, chromium, opened
from PIL import Image
from synthetic_run import make_run

from tempflow.records.gallery import Room, keep_small
from tempflow.records.page import write_page
from tempflow.records.rows import read_metrics

pytestmark = pytest.mark.skipif(chromium() is None, reason="no chromium here; apt-get install chromium, or see .ci/run")
SECONDS = 2.0
"""in which a run of 200 iterations with pictures of 32 prompts has to be open"""


@pytest.fixture(scope="module")
def started():
    with browser() as running:
        yield running


@pytest.fixture(scope="module")
def long(tmp_path_factory) -> Path:
    return write_page(make_run(tmp_path_factory.mktemp("pages") / "long", iterations=200, prompts=32))


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Path:
    """Two prompts; the pictures before are black, those after white, those between grey."""
    folder = make_run(tmp_path_factory.mktemp("pages") / "short", iterations=10, prompts=2, side=40)
    for step, level in ((0, 0), (5, 120), (10, 255)):
        keep_small(folder, step, torch.full((2, 3, 40, 40), level, dtype=torch.uint8), Room(9, 1e9))
    return write_page(folder)


def is_quiet(tab) -> bool:
    return tab.complaints == [] and tab.requests == []


def left_share(tab) -> float:
    """How much of the first pair of pictures is the black one."""
    pair = tab.page.locator(".pair").first
    pair.scroll_into_view_if_needed()
    row = np.asarray(Image.open(BytesIO(pair.screenshot())).convert("L"))[30]
    return float((row < 60).mean())


def labels(tab) -> list[str]:
    return tab.page.locator("[role=img]").evaluate_all("all => all.map(each => each.ariaLabel)")


def test_a_long_run_opens_in_time(started, long):
    with opened(started, long) as tab:
        assert is_quiet(tab) and 0 < tab.processor_seconds < SECONDS
        assert tab.page.locator("#charts .chart canvas").count() == 9
        assert tab.page.locator("#pairs img").count() == 64
        tab.page.locator(".film").last.scroll_into_view_if_needed()
        tab.page.locator(".film").last.locator(":scope > *").nth(40).wait_for(state="attached")
        assert tab.page.locator(".film").last.locator(":scope > *").count() == 41
        assert tab.page.locator("img").evaluate_all("all => all.every(each => each.alt)")
        assert tab.page.evaluate(
            "Array.from(document.images).every(each => !each.complete || each.naturalWidth == 256)"
        )
        assert is_quiet(tab)


def test_curves_over_another_axis(started, short):
    rows = json.loads((short.parent / "metrics.jsonl").read_text().splitlines()[-1])
    with opened(started, short) as tab:
        places = "[...document.querySelector('#charts [role=img]').chart.data[0]]"
        assert tab.page.evaluate(places) == list(range(11))
        assert all(words.partition(". ")[2].startswith("Over iterations: ") for words in labels(tab)[:9])
        for word, last in (("network rows", 90_000), ("seconds", rows["seconds"])):
            tab.page.get_by_label(word, exact=True).check()
            assert tab.page.evaluate(places)[-1] == last
            assert labels(tab)[0].startswith(f"Reward and gold. Over {word}: ")
        gold = tab.page.evaluate("[...document.querySelector('#charts [role=img]').chart.data[3]]")
        assert [value for value in gold if value is not None] == pytest.approx([0.5, 0.65625, 0.55])
        assert is_quiet(tab)


def test_the_slider_uncovers_one_picture_or_the_other(started, short):
    with opened(started, short) as tab:
        wipe = tab.page.locator("#wipe")
        assert left_share(tab) == pytest.approx(0.5, abs=0.05)
        wipe.focus()
        tab.page.keyboard.press("End")
        assert left_share(tab) > 0.95
        tab.page.keyboard.press("Home")
        assert left_share(tab) < 0.05
        for _ in range(20):
            tab.page.keyboard.press("ArrowRight")
        assert left_share(tab) == pytest.approx(0.2, abs=0.05)
        assert wipe.get_attribute("aria-valuetext") == "20 % before, 80 % iteration 10"
        box = tab.page.locator(".pair").last.bounding_box()
        tab.page.mouse.move(box["x"] + 5, box["y"] + 20)
        tab.page.mouse.down()
        tab.page.mouse.move(box["x"] + 0.7 * box["width"], box["y"] + 20)
        tab.page.mouse.up()
        assert left_share(tab) == pytest.approx(0.7, abs=0.05)
        tab.page.locator("#right").select_option("5")
        assert tab.page.locator(".pair").first.locator("img").last.get_attribute("alt").endswith("iteration 5")
        assert is_quiet(tab)


def test_gold_and_forks_say_what_they_show(started, short):
    with opened(started, short) as tab:
        words = {label.partition(". ")[0]: label for label in labels(tab)}
        assert words["Evaluations, in their order"].endswith("From 0.6, 0.5 to 0.95, 0.55.")
        assert words["Prompts, at the last evaluation"].endswith("128 prompts.")
        spread = tab.page.evaluate("document.querySelector('#spread [role=img]').chart.data")
        assert spread[0] == list(range(9)) and spread[3] == pytest.approx([2 - k / 5 for k in range(9)])
        measured = [row["reward_std_per_step"] for row in read_metrics(short.parent / "metrics.jsonl")[1:]]
        assert spread[1] == pytest.approx(np.mean(measured[:3], axis=0))
        assert spread[2] == pytest.approx(np.mean(measured[-3:], axis=0))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_on_a_phone_by_day_and_by_night(started, short, scheme):
    with opened(started, short, color_scheme=scheme, viewport={"width": 375, "height": 700}) as tab:
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= 375
        assert contrast(tab, "h1") > 7 and contrast(tab, ".note") > 4.5 and contrast(tab, ".worries h2") > 4.5
        sizes = tab.page.locator("figcaption, .note, dt").evaluate_all(
            "all => all.map(e => parseFloat(getComputedStyle(e).fontSize))"
        )
        assert min(sizes) >= 12 and is_quiet(tab)


def contrast(tab, selector: str) -> float:
    """Of an element's text to what it stands on, by WCAG's formula."""
    ink, ground = tab.page.locator(selector).first.evaluate("""each => {
        let behind = each;
        while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
        return [getComputedStyle(each).color, getComputedStyle(behind).backgroundColor];
    }""")
    light, dark = sorted((luminance(ink), luminance(ground)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    levels = np.array([float(part) / 255 for part in colour.partition("(")[2].strip(")").split(",")[:3]])
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


NONE: list[dict] = []
EVALUATION = {"step": 0, "seconds": 1.0, "reward_test": 0.5, "scores_missing": 0}
ITERATION = {"step": 1, "seconds": 2.0, "reward_mean": 0.5, "reward_std_per_step": [None], "grad_norm": 0.0}


@pytest.mark.parametrize("rows", [NONE, [EVALUATION], [ITERATION], [EVALUATION | {"gold": 0.5}, ITERATION]])
def test_runs_that_have_little_to_show(started, tmp_path, rows):
    start = {"step": 0, "seconds": 0.0, "loss_weights": [1.0], "picture_prompts": ["one"]}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [start, *rows]))
    with opened(started, write_page(tmp_path)) as tab:
        assert is_quiet(tab) and tab.page.locator("h2").count() == 7
        assert tab.page.locator("#scatters").inner_text() != "" and tab.page.locator("#spread").inner_text() != ""
        tab.page.get_by_label("seconds", exact=True).check()
        assert is_quiet(tab)


def test_each_held_out_score_is_drawn_by_kind_of_prompt(started, tmp_path):
    """A kind that a scorer told nothing of at one evaluation has a gap there."""
    kinds = [{"gold/one <b>": 0.125, "reward_test/two": 0.25}, {"gold/one <b>": 0.5, "gold/two": 0.75}]
    rows = [EVALUATION | {"step": 4 * place, "gold": 0.25, "kinds": found} for place, found in enumerate(kinds)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with opened(started, write_page(tmp_path)) as tab:
        words = dict(label.split(". Over iterations: ") for label in labels(tab) if "Over iterations" in label)
        assert words["gold by kind of prompt (held-out)"] == "one <b> from 0.125 to 0.5; two from 0.75 to 0.75."
        assert words["reward_test by kind of prompt (held-out)"] == "two from 0.25 to 0.25."
        drawn = tab.page.evaluate("[...document.querySelectorAll('#charts [role=img]')].map(each => each.chart.data)")
        assert [[0, 4], [0.125, 0.5], [None, 0.75]] in drawn and is_quiet(tab)


def test_twenty_kinds_differ_in_colour_or_line(started, tmp_path):
    kinds = {f"gold/kind {number:02}": 0.1 for number in range(20)}
    rows = [EVALUATION | {"step": step, "gold": 0.25, "kinds": kinds} for step in (0, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with opened(started, write_page(tmp_path)) as tab:
        looks = tab.page.evaluate("""[...document.querySelectorAll('#charts [role=img]')].map(each =>
            each.chart.series.slice(1).map(line => JSON.stringify([line._stroke ?? line.stroke(), line.dash])))""")
        by_kind = next(found for found in looks if len(found) == 20)
        assert len(set(by_kind)) == 20 and is_quiet(tab)


def test_several_golds_one_after_the_other(started, tmp_path):
    folder = make_run(tmp_path / "run", iterations=5, prompts=1, side=16)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{"gold_ocr" if name == "gold" else name: value for name, value in line.items()} for line in lines]
    rows = [row | {"gold_<b>": 0.25 * row["step"]} if "gold_ocr" in row else row for row in rows]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with opened(started, write_page(folder)) as tab:
        choice = tab.page.locator("#gold-name")
        assert choice.locator("option").all_inner_texts() == ["gold_<b>", "gold_ocr"]
        assert "to 0.95, 1.25." in labels(tab)[-2]
        choice.select_option("gold_ocr")
        assert "to 0.95, 0.55." in labels(tab)[-2] and is_quiet(tab)
