"""ImageReward on a small random BLIP, against BLIP written out by hand under its own names."""

import math
import string

import pytest
import torch
import torch.nn.functional as F
from reward_cases import attention, pictures, random_tensors
from transformers import BertTokenizer

from tempflow.common.errors import BadInput
from tempflow.prompts import Prompt
from tempflow.rewards.parts.pixels import clip_pixels
from tempflow.rewards.scorer import load_scorer
from tempflow.rewards.scorers.imagereward import TEXT_HEADS, VISION_HEADS

SEEN, READ, SIDE = 32, 24, 32
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "cube", "two", "dogs", "a", *string.ascii_lowercase[1:]]
TEXTS = ["a red cube", "two dogs", "A red dogs", " ".join(["red"] * 60)]
TOKENS = [[9, 5, 6], [7, 8], [9, 5, 8], [5] * 33]
"""by hand; 35 tokens are kept, with [CLS] and [SEP]"""


def linear_shapes(name, out, into):
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm_shapes(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def blip_tensors():
    """Two picture layers, two text layers, and the head of ImageReward."""
    see, read = "blip.visual_encoder", "blip.text_encoder"
    shapes = {f"{see}.cls_token": (1, 1, SEEN), f"{see}.pos_embed": (1, 5, SEEN)}
    shapes |= {f"{see}.patch_embed.proj.weight": (SEEN, 3, 16, 16), f"{see}.patch_embed.proj.bias": (SEEN,)}
    for layer in (f"{see}.blocks.0", f"{see}.blocks.1"):
        shapes |= norm_shapes(f"{layer}.norm1", SEEN) | norm_shapes(f"{layer}.norm2", SEEN)
        shapes |= linear_shapes(f"{layer}.attn.qkv", 3 * SEEN, SEEN) | linear_shapes(f"{layer}.attn.proj", SEEN, SEEN)
        shapes |= linear_shapes(f"{layer}.mlp.fc1", 40, SEEN) | linear_shapes(f"{layer}.mlp.fc2", SEEN, 40)
    shapes |= norm_shapes(f"{see}.norm", SEEN) | norm_shapes(f"{read}.embeddings.LayerNorm", READ)
    shapes |= {f"{read}.embeddings.word_embeddings.weight": (len(WORDS) + 2, READ)}
    shapes |= {f"{read}.embeddings.position_embeddings.weight": (40, READ)}
    for layer in (f"{read}.encoder.layer.0", f"{read}.encoder.layer.1"):
        for part, width in (("attention", READ), ("crossattention", SEEN)):
            shapes |= linear_shapes(f"{layer}.{part}.self.query", READ, READ)
            shapes |= linear_shapes(f"{layer}.{part}.self.key", READ, width)
            shapes |= linear_shapes(f"{layer}.{part}.self.value", READ, width)
            shapes |= linear_shapes(f"{layer}.{part}.output.dense", READ, READ)
            shapes |= norm_shapes(f"{layer}.{part}.output.LayerNorm", READ)
        shapes |= linear_shapes(f"{layer}.intermediate.dense", 36, READ)
        shapes |= linear_shapes(f"{layer}.output.dense", READ, 36) | norm_shapes(f"{layer}.output.LayerNorm", READ)
    widths = (READ, 1024, 128, 64, 16, 1)
    for place, before, after in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        shapes |= linear_shapes(f"mlp.layers.{place}", after, before)
    return random_tensors(shapes, 3)


def linear(x, w, name):
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def norm(x, w, name, eps):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def look(pixels, w):
    """BLIP's vision transformer."""
    name = "blip.visual_encoder"
    patches = F.conv2d(pixels, w[f"{name}.patch_embed.proj.weight"], w[f"{name}.patch_embed.proj.bias"], stride=16)
    x = torch.cat([w[f"{name}.cls_token"].expand(len(pixels), -1, -1), patches.flatten(2).mT], 1)
    x = x + w[f"{name}.pos_embed"]
    for layer in range(2):
        block = f"{name}.blocks.{layer}"
        joint = linear(norm(x, w, f"{block}.norm1", 1e-6), w, f"{block}.attn.qkv")
        x = x + linear(attention(*joint.chunk(3, -1), VISION_HEADS), w, f"{block}.attn.proj")
        inner = gelu(linear(norm(x, w, f"{block}.norm2", 1e-6), w, f"{block}.mlp.fc1"))
        x = x + linear(inner, w, f"{block}.mlp.fc2")
    return norm(x, w, f"{name}.norm", 1e-6)


def attend(x, other, w, name, allowed=None):
    q, k, v = (linear(y, w, f"{name}.self.{part}") for y, part in ((x, "query"), (other, "key"), (other, "value")))
    y = linear(attention(q, k, v, TEXT_HEADS, allowed), w, f"{name}.output.dense")
    return norm(x + y, w, f"{name}.output.LayerNorm", 1e-12)


def reward(pixels, w):
    """ImageReward of pictures with TEXTS, padded to 35 tokens as its authors do."""
    rows = [[2, *tokens, 3] for tokens in TOKENS]
    allowed = torch.tensor([[place < len(row) for place in range(35)] for row in rows])[:, None, :]
    tokens = torch.tensor([row + [0] * (35 - len(row)) for row in rows])
    name = "blip.text_encoder"
    x = w[f"{name}.embeddings.word_embeddings.weight"][tokens]
    x = x + w[f"{name}.embeddings.position_embeddings.weight"][:35]
    x, seen = norm(x, w, f"{name}.embeddings.LayerNorm", 1e-12), look(pixels, w)
    for layer in range(2):
        block = f"{name}.encoder.layer.{layer}"
        x = attend(x, x, w, f"{block}.attention", allowed)
        x = attend(x, seen, w, f"{block}.crossattention")
        y = linear(gelu(linear(x, w, f"{block}.intermediate.dense")), w, f"{block}.output.dense")
        x = norm(x + y, w, f"{block}.output.LayerNorm", 1e-12)
    y = x[:, 0]
    for place in (0, 2, 4, 6, 7):
        y = linear(y, w, f"mlp.layers.{place}")
    return (y[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    BertTokenizer(vocab={word: place for place, word in enumerate(WORDS)}, do_lower_case=True).save_pretrained(folder)
    return folder


def test_imagereward_reads_the_official_checkpoint(tokenizer, tmp_path):
    tensors = blip_tensors()
    extra = {"blip.text_proj.weight": torch.zeros(2, READ), "blip.vision_proj.bias": torch.zeros(2)}
    extra["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    torch.save(tensors | extra, tmp_path / "ImageReward.pt")
    options = {"path": tmp_path / "ImageReward.pt", "tokenizer": tokenizer}
    images = pictures(4, 50, 61)
    expected = reward(clip_pixels(images, SIDE, half_up=True), tensors)
    assert expected.std() > 0.01
    scores = load_scorer("reward.name", "imagereward", 3, options)(images, [Prompt(text) for text in TEXTS])
    torch.testing.assert_close(scores, expected, atol=0, rtol=1e-4)
    scorer = load_scorer("reward.name", "imagereward", 4, options | {"dtype": "bf16"})
    assert scorer.function.reader.head.layers["0"].weight.equal(tensors["mlp.layers.0.weight"])  # not rounded
    rounded = scorer(images, [Prompt(text) for text in TEXTS])
    assert (rounded - expected).abs().max() < 0.2 * expected.abs().max()


def test_incomplete_checkpoints_and_empty_tokenizers_are_refused(tokenizer, tmp_path):
    tensors = blip_tensors()
    torch.save(tensors, tmp_path / "ImageReward.pt")
    with pytest.raises(BadInput, match=r"imagereward\.tokenizer=.*: 5 tokens found, 37 expected"):
        load_scorer("reward.name", "imagereward", 4, {"path": tmp_path / "ImageReward.pt", "tokenizer": tmp_path})
    del tensors["blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"]
    torch.save(tensors, tmp_path / "ImageReward.pt")
    with pytest.raises(BadInput, match=r"imagereward\.path=.*misses text\.encoder\.layer\.1\.crossattention"):
        load_scorer("reward.name", "imagereward", 4, {"path": tmp_path / "ImageReward.pt", "tokenizer": tokenizer})
