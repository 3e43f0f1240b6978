"""report.html as it is written: what it holds, of which runs, and what a prompt cannot do to it."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic_run import make_run

from tempflow.common.errors import BadInput
from tempflow.records.page import write_page
from tempflow.records.page.gather import MOST_ROWS
from tempflow.records.page.worries import WARNINGS, worries
from tempflow.records.page.write import figure
from tempflow.records.rows import read_metrics
from tempflow.run.watch import DRIFT, SIGNS


class Parts(HTMLParser):
    """The elements of a page by name, with their attributes and text."""

    def __init__(self, path: Path):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[list[str]] = []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes), []))
        self.open = [*self.open, self.found[-1][2]]

    def handle_endtag(self, tag):
        self.open = self.open[:-1]

    def handle_data(self, data):
        for text in self.open[-3:]:
            text.append(data)

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attributes, "".join(text)) for name, attributes, text in self.found if name == tag]

    def json(self, name: str):
        (text,) = [text for attributes, text in self.all("script") if attributes.get("id") == name]
        return json.loads(text)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("pages") / "<i>run & more", iterations=10, prompts=3, side=40)


@pytest.fixture(scope="module")
def page(run) -> Parts:
    return Parts(write_page(run))


def bare(folder: Path, *rows: dict) -> Path:
    """A run of nothing but its metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    start = {"step": 0, "seconds": 0.0, "rollouts": 0, "loss_weights": [1.0], "picture_prompts": []}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (start, *rows)))
    return folder


def test_the_page_holds_the_metrics_as_they_are(run, page):
    data = page.json("data")
    assert data["rows"] == read_metrics(run / "metrics.jsonl") and len(data["rows"]) == 11
    assert data["names"] == ["reward_test", "gold"] and len(data["scores"]["gold"]) == 128
    assert data["scores"] == json.loads((run / "scores" / "step_000010.json").read_text())
    assert data["pictures"] == {"size": [40, 40], "steps": [0, 5, 10]} and len(data["prompts"]) == 3
    images = page.json("pictures-5")
    assert len(images) == 3 and all(image.startswith("data:image/webp;base64,UklG") for image in images)


def test_a_prompt_or_a_name_is_text_and_nothing_else(page):
    """Prompts hold `<script>`, the folder's name `<i>`."""
    own = [text for attributes, text in page.all("script") if "type" not in attributes]
    assert len(own) == 1 and "uPlot" in own[0] and "alert(1)" not in own[0]
    assert all(attributes["type"] == "application/json" for attributes, _ in page.all("script") if "type" in attributes)
    assert not page.all("i") and [text for _, text in page.all("h1")] == ["<i>run & more"]
    assert "<script>alert" not in page.text and page.json("data")["prompts"][0].endswith(
        "<script>alert(1)</script> & a 'hat'"
    )


def test_the_page_needs_no_network(page):
    addresses = [
        value for _, attributes, _ in page.found for name, value in attributes.items() if name in ("src", "href")
    ]
    assert all(address.startswith(("#", "data:")) for address in addresses)
    (policy,) = [attributes["content"] for attributes, _ in page.all("meta") if "http-equiv" in attributes]
    assert policy.startswith("default-src 'none'; img-src data:;") and "script-src 'sha256-" in policy
    assert "@import" not in page.text and "Copyright (c) 2022 Leon Sorokin" in page.text


def test_settings_that_differ_stand_first(tmp_path):
    folder = bare(tmp_path / "run")
    (folder / "config.yaml").write_text('learn: {lr: 0.01, rows: 4}\nmodel: {path: "<b>x</b>"}\n')
    page = Parts(write_page(folder))
    cells = [text for _, text in page.all("td")]
    assert cells[:6] == ["learn.lr", "0.01", "0.0003", "model.path", "<b>x</b>", "tempflow:digits/pipeline"]
    assert cells[6:8] == ["learn.rows", "4"]
    (folder / "config.yaml").write_text("learn: [\n")
    assert "config.yaml" in write_page(folder).read_text(), "a page without settings says why"


def test_evaluations_are_told_by_kind_of_prompt(tmp_path):
    """A kind of which a scorer had no opinion at one evaluation is missing there."""
    rows = [{"step": step, "seconds": 1.0, "reward_test": 0.5, "gold": 0.25, "scores_missing": 0, "kinds": kinds}
            for step, kinds in enumerate([{"gold/<b>": 0.125}, {"gold/<b>": 0.375, "gold/two": 0.5}])]  # fmt: skip
    page = Parts(write_page(bare(tmp_path / "run", *rows)))
    heads = [text for _, text in page.all("th")]
    place = heads.index("reward_test")
    assert heads[place : place + 4] == ["reward_test", "gold", "gold/<b>", "gold/two"] and not page.all("b")
    cells = [text for _, text in page.all("td")]
    assert cells[:6] == ["0", "1", "0.5", "0.25", "0.125", ""]
    assert cells[6:12] == ["1", "1", "0.5", "0.25", "0.375", "0.5"]
    with pytest.raises(BadInput, match="kinds"):
        write_page(bare(tmp_path / "wrong", rows[0] | {"kinds": ["gold"]}))


@pytest.mark.parametrize("kind", ["only a start", "one evaluation", "iterations alone", "not finite"])
def test_runs_that_have_little_to_show(tmp_path, kind):
    evaluation = {"step": 0, "seconds": 1.0, "reward_test": 0.5, "scores_missing": 0}
    iteration = {"step": 1, "seconds": 2.0, "reward_mean": 0.5, "reward_std_per_step": [None]}
    rows = {"only a start": [], "one evaluation": [evaluation], "iterations alone": [iteration],
            "not finite": [iteration | {"reward_mean": float("nan"), "ratio_max": float("inf")}]}[kind]  # fmt: skip
    data = Parts(write_page(bare(tmp_path / "run", *rows))).json("data")
    assert data["pictures"] == {"size": None, "steps": []} and len(data["rows"]) == len({0, *(r["step"] for r in rows)})
    if kind == "not finite":
        assert data["rows"][1]["reward_mean"] is None and data["rows"][1]["ratio_max"] is None


def test_long_runs_are_drawn_from_some_of_their_rows(tmp_path):
    rows = [{"step": step, "seconds": float(step), "reward_mean": 0.5} for step in range(1, 2 * MOST_ROWS)]
    rows[100] |= {"scores_missing": 0, "gold": 0.5}
    page = Parts(write_page(bare(tmp_path / "run", *rows)))
    steps = [row["step"] for row in page.json("data")["rows"]]
    assert len(steps) <= MOST_ROWS + 2 and {0, 101, 2 * MOST_ROWS - 1} <= set(steps)
    assert f"{2 * MOST_ROWS - len(steps)} iterations are left out" in page.text


def test_every_warning_has_words():
    assert set(WARNINGS) == {*SIGNS, DRIFT}
    rows = [{"step": 1, "warnings": ["reward_fall"], "skipped_steps": 2}, {"step": 2, "warnings": ["unheard_of"]},
            {"step": 3, "gold_fall": {"gold": 0.25}, "skipped_steps": 1, "rewards_missing": 0}]  # fmt: skip
    found = [(worry.step, worry.words) for worry in worries(rows)]
    assert [step for step, _ in found] == [1, 2, 3, None] and found[0][1] == WARNINGS["reward_fall"]
    assert found[1][1] == "unheard_of" and "gold is 0.25 below" in found[2][1] and found[3][1].startswith("3 optimizer")


@pytest.mark.parametrize(("name", "content", "field"), [
    ("scores/step_000000.json", b"[1]", "scores"),
    ("scores/step_000000.json", b'{"gold": 1}', "scores"),
    ("gallery/step_000000/0.webp", b"\x89PNG", "gallery"),
    ("metrics.jsonl", b"", "run.dir"),
])  # fmt: skip
def test_foreign_files_are_named(tmp_path, name, content, field):
    start = {"step": 0, "seconds": 0.0, "picture_prompts": ["one"], "scores_missing": 0, "gold": 0.5}
    folder = bare(tmp_path / "run", start)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    with pytest.raises(BadInput) as refused:
        write_page(folder)
    assert refused.value.field == field and not (folder / "report.html").exists()


def test_figures_are_short():
    assert [figure(value) for value in (0.12345, 1234.5, 1_000_000, 0, None)] == [
        "0.1235",
        "1,234",
        "1,000,000",
        "0",
        "",
    ]
