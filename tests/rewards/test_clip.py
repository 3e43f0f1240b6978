"""PickScore, CLIPScore, LAION aesthetics and HPSv2 on small random CLIPs, against a CLIP written out by hand."""

import pytest
import torch
from PIL import Image
from reward_cases import (
    CLIP_SIDE,
    boxed,
    clip_folder,
    clip_tokenizer,
    filtered,
    for_clip,
    open_clip_image,
    open_clip_tensors,
    open_clip_text,
    pictures,
    random_tensors,
    triangle,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tempflow.common.errors import BadInput
from tempflow.prompts import Prompt
from tempflow.rewards.parts.pixels import clip_pixels
from tempflow.rewards.scorer import load_scorer

TEXTS = ["a red cube", "two dogs", "a red cube", "many letters in a prompt that does not fit"]
PROMPTS = [Prompt(text) for text in TEXTS]
IMAGES = pictures(4, 40, 52)


def official_pixels(images):
    """By the processor of transformers, with Pillow."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": CLIP_SIDE}, crop_size=CLIP_SIDE)
    files = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    return processor(files, return_tensors="pt")["pixel_values"]


@pytest.fixture(scope="module")
def weights():
    return open_clip_tensors()


@pytest.fixture(scope="module")
def folder(weights, tmp_path_factory):
    return clip_folder(tmp_path_factory.mktemp("clip"), weights)


@pytest.fixture(scope="module")
def cosine(weights):
    return (open_clip_image(official_pixels(IMAGES), weights) * open_clip_text(TEXTS, weights)).sum(-1)


@pytest.mark.parametrize(("name", "divisor"), [("pickscore", 26), ("clipscore", 30)])
def test_clip_scores_follow_the_formula(name, divisor, weights, folder, cosine):
    options = {"path": folder} | ({"processor": folder} if name == "pickscore" else {})
    scores = load_scorer("reward.name", name, 3, options, torch.device("cpu"))(IMAGES, PROMPTS)
    expected = weights["logit_scale"].exp() * cosine / divisor
    assert expected.std() > 1e-2
    torch.testing.assert_close(scores, expected, atol=1e-3, rtol=0)  # rare ties of levels


def test_clipscore_of_flow_grpo(weights, folder):
    """Bilinear, levels not rounded, and of the odd margin (24 x 31: 7) the larger part first, as torchvision crops."""
    images = pictures(4, 40, 52, seed=5)
    shown = for_clip(filtered(images, (CLIP_SIDE, 31), triangle))[..., 4 : 4 + CLIP_SIDE]
    cosine = (open_clip_image(shown, weights) * open_clip_text(TEXTS, weights)).sum(-1)
    scores = {
        resize: load_scorer("reward.name", "clipscore", 4, {"path": folder, "resize": resize})(images, PROMPTS)
        for resize in ("flow_grpo", "official")
    }
    torch.testing.assert_close(scores["flow_grpo"], weights["logit_scale"].exp() * cosine / 30, atol=1e-5, rtol=0)
    assert (scores["flow_grpo"] - scores["official"]).abs().max() > 1e-2
    with pytest.raises(BadInput, match=r"options\.clipscore\.resize=bicubic: choose one of official, flow_grpo"):
        load_scorer("reward.name", "clipscore", 4, {"path": folder, "resize": "bicubic"})


def test_aesthetic_head_on_unit_vectors(weights, folder, tmp_path):
    widths = (20, 1024, 128, 64, 16, 1)
    shapes = {}
    for place, before, after in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        shapes |= {f"layers.{place}.weight": (after, before), f"layers.{place}.bias": (after,)}
    head = random_tensors(shapes, 1)
    torch.save(head, tmp_path / "head.pth")
    expected = open_clip_image(clip_pixels(IMAGES, CLIP_SIDE), weights)
    for place in (0, 2, 4, 6, 7):
        expected = expected @ head[f"layers.{place}.weight"].T + head[f"layers.{place}.bias"]
    scorer = load_scorer("reward.name", "aesthetic", 4, {"path": tmp_path / "head.pth", "clip": folder})
    torch.testing.assert_close(scorer(IMAGES, PROMPTS), expected[:, 0], atol=0, rtol=1e-4)
    del head["layers.4.bias"]
    torch.save(head, tmp_path / "head.pth")
    with pytest.raises(BadInput, match=r"options\.aesthetic\.path=.*misses layers\.4\.bias"):
        load_scorer("reward.name", "aesthetic", 4, {"path": tmp_path / "head.pth", "clip": folder})


def test_hpsv2_reads_an_open_clip_checkpoint(weights, folder, tmp_path):
    """The score is open_clip's, of a picture resized by its longer side with black margins."""
    torch.save({"epoch": 3, "state_dict": weights}, tmp_path / "HPS.pt")
    scorer = load_scorer("reward.name", "hpsv2", 4, {"path": tmp_path / "HPS.pt", "processor": folder})
    entities = [Prompt(f" &amp;#32; {text}\n") for text in TEXTS]
    images = pictures(4, 42, 53)  # of 24 lines 19 are picture, 2 above and 3 below are black
    pixels = boxed(images, CLIP_SIDE)
    assert (pixels[:, 0, :, 0] == pixels[0, 0, 0, 0]).sum(1).tolist() == [5] * 4
    expected = (open_clip_image(pixels, weights) * open_clip_text(TEXTS, weights)).sum(-1)
    assert expected.std() > 1e-3
    torch.testing.assert_close(scorer(images, entities), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: t.pop("visual.transformer.resblocks.1.ln_2.bias"), "misses vision_model.encoder.layers.1.layer_norm2"),
    (lambda t: t.update(extra=torch.zeros(1)), "has unknown extra"),
    (lambda t: t.update({"ln_final.weight": torch.zeros(3)}), r"final_layer_norm.weight is \(3,\), expected \(32,\)"),
    (lambda t: t.pop("visual.conv1.weight"), "it has no visual.conv1.weight"),
])  # fmt: skip
def test_foreign_checkpoints_are_refused(change, words, weights, folder, tmp_path):
    changed = dict(weights)
    change(changed)
    torch.save(changed, tmp_path / "HPS.pt")
    with pytest.raises(BadInput, match=rf"reward\.options\.hpsv2\.path=.*{words}"):
        load_scorer("reward.name", "hpsv2", 4, {"path": tmp_path / "HPS.pt", "processor": folder})


class Mischief:
    """Not data."""


def test_checkpoints_are_data_only(folder, tmp_path):
    torch.save({"state_dict": Mischief()}, tmp_path / "HPS.pt")
    with pytest.raises(BadInput, match="not readable as a checkpoint of tensors"):
        load_scorer("reward.name", "hpsv2", 4, {"path": tmp_path / "HPS.pt", "processor": folder})


def test_precision_is_as_asked(folder, cosine, weights):
    scorer = load_scorer("reward.name", "clipscore", 4, {"path": folder, "dtype": "bf16"})
    assert scorer.function.clip.model.dtype == torch.bfloat16
    scores = scorer(IMAGES, PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, weights["logit_scale"].exp() * cosine / 30, atol=2e-2, rtol=0)


def test_incomplete_weights_are_refused(folder, tmp_path):
    """transformers would only warn, and score at random."""
    from safetensors.torch import load_file, save_file
    from transformers import CLIPModel

    CLIPModel.from_pretrained(folder).save_pretrained(tmp_path)
    clip_tokenizer().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=r"clipscore\.path=.*no weights of a CLIPModel: visual_projection"):
        load_scorer("reward.name", "clipscore", 4, {"path": tmp_path})


@pytest.mark.parametrize(("options", "words"), [
    ({"path": "/no/such/folder"}, r"reward\.options\.pickscore\.path=/no/such/folder: no such file or folder"),
    ({"path": "nobody/no-such-model"}, r"pickscore\.path=nobody/no-such-model: cannot be loaded; give a local folder"),
    ({"dtype": "bf17"}, r"pickscore\.dtype=bf17: choose one of fp32, bf16, fp16"),
])  # fmt: skip
def test_what_is_missing_is_said(options, words, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match=words):
        load_scorer("reward.name", "pickscore", 4, {"path": folder, "processor": folder} | options)


@pytest.mark.parametrize("name", ["pickscore", "hpsv2"])
def test_missing_tokenizer_is_said(name, folder, weights, tmp_path):
    """transformers makes an empty tokenizer of an empty folder."""
    torch.save(weights, tmp_path / "HPS.pt")
    (tmp_path / "empty").mkdir()
    path = folder if name == "pickscore" else tmp_path / "HPS.pt"
    with pytest.raises(BadInput, match=rf"{name}\.processor=.*empty: cannot be loaded.*: 2 tokens found, 54 expected"):
        load_scorer("reward.name", name, 4, {"path": path, "processor": tmp_path / "empty"})


def test_missing_hub_file_is_said(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match=r"hpsv2\.path=xswu/HPSv2/HPS_v2\.1_compressed\.pt: cannot be loaded"):
        load_scorer("reward.name", "hpsv2", 4, {"processor": folder})
    with pytest.raises(BadInput, match=r"hpsv2\.path=HPS\.pt: no such file; give one, or owner/repository/file"):
        load_scorer("reward.name", "hpsv2", 4, {"processor": folder, "path": "HPS.pt"})


def test_images_and_prompts_must_match(folder):
    scorer = load_scorer("reward.name", "clipscore", 4, {"path": folder}).function
    with pytest.raises(ValueError, match="found 4 images for 3 prompts"):
        scorer(IMAGES, PROMPTS[:3])
    with pytest.raises(ValueError, match=r"uint8 \(B, 3, H, W\): found torch.float32"):
        scorer(IMAGES.float(), PROMPTS)
