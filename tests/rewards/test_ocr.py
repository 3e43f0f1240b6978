"""OCR for real, on rendered text, and the JPEG scorers against Pillow."""

import io
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from reward_cases import pictures

from tempflow.common.errors import BadInput
from tempflow.prompts import Prompt
from tempflow.rewards.scorer import load_scorer
from tempflow.rewards.scorers.ocr import wanted_text

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
FACES = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono", "DejaVuSans-Oblique")
COLOURS = (("black", "white"), ("white", "navy"), ("#c00000", "#ffffe0"), ("yellow", "#303030"), ("#004400", "#a0e0a0"))
TEXTS = """OPEN|Coffee Shop|Happy Birthday|STOP|Hello World|No Parking|Exit 42|Fresh Bread|Sale Today|Library
Welcome Home|Gate B7|New York|Good Morning|Ice Cream|Do Not Enter|Train Station|2026|Pizza|Quiet Please|Museum of Art
Bookstore|Danger|Push|Pull to Open|Thank You|Jazz Night|Rocket Science|Flower Market|Route 66|Love|Keep Calm|Dream Big
Taxi|Hotel California|Speed Limit 30|Green Tea|Winter Sale|Be Kind|Lost and Found|Mind the Gap|Music|Garden|Level Up
Science Fair|Summer Camp|Final Score 3|Blue Whale""".replace("\n", "|").split("|")


def rendered(text, place, height=128, width=384):
    """uint8 (3, height, width): text in a face, size, colour and position that follow from `place`; some noise."""
    ink, ground = COLOURS[place % len(COLOURS)]
    size = (15, 24, 40)[place % 3]
    font = ImageFont.truetype(str(FONTS / f"{FACES[place % len(FACES)]}.ttf"), size)
    image = Image.new("RGB", (width, height), ground)
    left = 8 + place * 7 % max(1, width - 16 - int(font.getlength(text)))
    ImageDraw.Draw(image).text((left, 10 + place * 11 % (height - 30 - size)), text, font=font, fill=ink)
    levels = np.array(image) + np.random.default_rng(place).normal(0, 8, (height, width, 3))
    return torch.from_numpy(levels.clip(0, 255).astype(np.uint8)).permute(2, 0, 1)


@pytest.fixture(scope="module")
def ocr():
    return load_scorer("reward.name", "ocr", 16, {"threads": 1})


@pytest.fixture(scope="module")
def images():
    return torch.stack([rendered(text, place) for place, text in enumerate(TEXTS)])


def test_rendered_text_is_read(ocr, images, capsys):
    scores = ocr(images, [Prompt(f'A sign that says "{text}"') for text in TEXTS])
    mean, exact = scores.mean().item(), (scores == 1).float().mean().item()
    with capsys.disabled():
        print(f"\nOCR on {len(TEXTS)} rendered texts: mean reward {mean:.4f}, read exactly {exact:.4f}")
    assert len(TEXTS) >= 40 and mean >= 0.97 and exact >= 0.9


def test_other_text_scores_low(ocr, images):
    """The same pictures, each with a text asked for that stands elsewhere in the list; and no text at all."""
    some = slice(0, 16)
    wrong = ocr(images[some], [Prompt("a sign", {"text": text}) for text in TEXTS[20:36]])
    assert wrong.mean() < 0.3 and wrong.max() < 0.6
    blank = torch.full((1, 3, 128, 384), 90, dtype=torch.uint8)
    assert ocr(blank, [Prompt('says "OPEN"')]).tolist() == [0.0]


def test_closeness_is_flow_grpos(ocr):
    close = ocr.function.closeness
    assert close("HELLO  wor ld", "Hello World") == 1
    assert close("the sign says OPEN today", "open") == 1  # anywhere in what was read
    assert close("hallo", "hello") == pytest.approx(1 - 1 / 5)
    assert close("hell", "hello") == pytest.approx(1 - 1 / 5)
    assert close("completely different and long", "hello") == 0 == close("", "hello")
    assert close("AB", "a\tb") == pytest.approx(1 - 1 / 3)  # of blanks only spaces are left out
    assert close("two lines", "Two\nLines") == 1


def test_wanted_text_is_metadata_or_quoted():
    assert wanted_text(Prompt('a sign "Open" and "Closed"')) == "Open"
    assert wanted_text(Prompt("a sign “Geöffnet”")) == "Geöffnet"
    assert wanted_text(Prompt('a sign "Open"', {"text": "Shut"})) == "Shut"
    assert wanted_text(Prompt('“Closed” on one sign, "Open" on another')) == "Open"


def test_a_single_quote_mark_reads_on_to_the_end():
    """As Flow-GRPO's, which splits the prompt at quote marks; a run with such a prompt must not be refused."""
    assert wanted_text(Prompt('a 12" pizza')) == " pizza"
    assert wanted_text(Prompt('a sign "Open')) == "Open"


def test_prompt_without_text_is_named(ocr, images):
    with pytest.raises(BadInput, match="prompt 'a cat' asks for no text: give metadata"):
        ocr(images[:1], [Prompt("a cat")])
    for nothing in ('a sign ""', 'a 12"', "“”"):
        with pytest.raises(BadInput, match="asks for no text"):
            ocr(images[:1], [Prompt(nothing)])


def test_colours_reach_the_reader_in_its_order(ocr):
    """Faint text that is seen with red and blue exchanged only: it is read as RapidOCR itself reads a Pillow image."""
    font = ImageFont.truetype(str(FONTS / "DejaVuSans-Bold.ttf"), 40)
    exchanged = 0
    for blue in (116, 110, 106, 94):
        image = Image.new("RGB", (384, 128), (100, 60, 140))
        ImageDraw.Draw(image).text((40, 30), "LIBRARY", font=font, fill=(111, 60, blue))
        pixels, theirs = torch.from_numpy(np.array(image)).permute(2, 0, 1), ocr.function.reader(image).txts
        assert ocr.function.read(pixels) == "".join(theirs or ())
        exchanged += ocr.function.read(pixels.flip(0)) != "".join(theirs or ())
    assert exchanged


def test_missing_package_is_said(monkeypatch):
    import importlib

    real = importlib.import_module

    def absent(name, package=None):
        if name == "rapidocr":
            raise ImportError("No module named 'rapidocr'")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(BadInput, match=r"reward=ocr: needs the package rapidocr .* pip install 'tempflow\[rewards\]'"):
        load_scorer("reward.name", "ocr", 4)


def test_jpeg_sizes_are_pillows():
    images = torch.cat([pictures(2, 40, 56), torch.full((1, 3, 40, 56), 7, dtype=torch.uint8)])
    sizes = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy(), "RGB").save(file, "JPEG", quality=95)
        sizes.append(len(file.getvalue()) / 1000)
    prompts = [Prompt("")] * 3
    small = load_scorer("reward.name", "jpeg_compressibility", 2)(images, prompts)
    large = load_scorer("reward.name", "jpeg_incompressibility", 2)(images, prompts)
    torch.testing.assert_close(small, -torch.tensor(sizes) / 500)
    assert torch.equal(small, -large) and small.argmax() == 2
