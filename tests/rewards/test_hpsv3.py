"""HPSv3 on a small random Qwen2-VL, against Qwen2-VL and the reward head written out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from reward_cases import attention, pictures, random_tensors
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen2VLConfig

from tempflow.common.errors import BadInput
from tempflow.prompts import Prompt
from tempflow.rewards.scorer import load_scorer
from tempflow.rewards.scorers import hpsv3
from tempflow.rewards.scorers.hpsv3 import patches_of

SEE, READ, HEADS, GROUPS = 32, 24, 4, 2
"""widths of picture and text towers, heads of both, key and value heads of the text tower"""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>"]  # fmt: skip
TEMPLATE = "Rate\n{text_prompt}\nso: <|Reward|>\nEND"
PROMPTS = [Prompt("a cat"), Prompt("many words, {braces} and é"), Prompt("dogs")]
CHAT = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>%s<|vision_end|>"
        "%s<|im_end|>\n<|im_start|>assistant\n")  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Configuration and tokenizer: single bytes, and the special tokens."""
    folder = tmp_path_factory.mktemp("qwen")
    vocabulary = {symbol: place for place, symbol in enumerate([*sorted(ByteLevel.alphabet()), *SPECIAL])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], unk_token=None, extra_special_tokens=SPECIAL[1:])
    tokenizer.save_pretrained(folder)
    text = {
        "hidden_size": READ,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "vocab_size": len(tokenizer),
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 1]},
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vision = {"depth": 2, "embed_dim": SEE, "hidden_size": READ, "num_heads": HEADS, "mlp_ratio": 2}
    ids = {name: vocabulary[f"<|{token}|>"] for name, token in (
        ("image_token_id", "image_pad"), ("video_token_id", "video_pad"),
        ("vision_start_token_id", "vision_start"), ("vision_end_token_id", "vision_end"),
    )}  # fmt: skip
    Qwen2VLConfig(text_config=text, vision_config=vision, **ids).save_pretrained(folder)
    (folder / "template.txt").write_text(TEMPLATE)
    return folder


def qwen_tensors(words):
    """Under the names of the published checkpoint, which transformers 4.45 wrote."""
    shapes = {"visual.patch_embed.proj.weight": (SEE, 3, 2, 14, 14), "model.embed_tokens.weight": (words, READ)}
    shapes |= {"lm_head.weight": (words, READ), "model.norm.weight": (READ,)}

    def linear(name, out, into, bias=True):
        return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})

    for layer in ("visual.blocks.0", "visual.blocks.1"):
        shapes |= {f"{layer}.norm{n}.{kind}": (SEE,) for n in (1, 2) for kind in ("weight", "bias")}
        shapes |= linear(f"{layer}.attn.qkv", 3 * SEE, SEE) | linear(f"{layer}.attn.proj", SEE, SEE)
        shapes |= linear(f"{layer}.mlp.fc1", 2 * SEE, SEE) | linear(f"{layer}.mlp.fc2", SEE, 2 * SEE)
    shapes |= {"visual.merger.ln_q.weight": (SEE,), "visual.merger.ln_q.bias": (SEE,)}
    shapes |= linear("visual.merger.mlp.0", 4 * SEE, 4 * SEE) | linear("visual.merger.mlp.2", READ, 4 * SEE)
    for layer in ("model.layers.0", "model.layers.1"):
        shapes |= {f"{layer}.{name}_layernorm.weight": (READ,) for name in ("input", "post_attention")}
        shapes |= linear(f"{layer}.self_attn.q_proj", READ, READ)
        shapes |= linear(f"{layer}.self_attn.o_proj", READ, READ, False)
        for part in ("k_proj", "v_proj"):
            shapes |= linear(f"{layer}.self_attn.{part}", READ * GROUPS // HEADS, READ)
        shapes |= linear(f"{layer}.mlp.gate_proj", 40, READ, False) | linear(f"{layer}.mlp.up_proj", 40, READ, False)
        shapes |= linear(f"{layer}.mlp.down_proj", READ, 40, False)
    shapes |= linear("rm_head.0", 20, READ) | linear("rm_head.3", 16, 20) | linear("rm_head.5", 2, 16)
    return random_tensors(shapes, 5, 0.3)


def lin(x, w, name):
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def turn(x, angles, heads):
    """Rotates halves of each head of (L, heads x D) by angles (L, D/2)."""
    parts = []
    for part in x.chunk(heads, -1):
        left, right = part.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        parts.append(torch.cat([left * cos - right * sin, right * cos + left * sin], -1))
    return torch.cat(parts, -1)


def look(patches, rows, columns, w):
    """The vision tower on the patches of one picture; merges 2 x 2 neighbours."""
    x = patches @ w["visual.patch_embed.proj.weight"].flatten(1).T
    order = [(r + i, c + j) for r in range(0, rows, 2) for c in range(0, columns, 2) for i in (0, 1) for j in (0, 1)]
    width = SEE // HEADS
    speeds = 1 / 10000 ** (torch.arange(0, width // 2, 2) / (width // 2))
    angles = (torch.tensor(order).float()[:, :, None] * speeds).flatten(1)

    def norm(y, name):
        return F.layer_norm(y, (SEE,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    for layer in ("visual.blocks.0", "visual.blocks.1"):
        q, k, v = lin(norm(x, f"{layer}.norm1"), w, f"{layer}.attn.qkv").chunk(3, -1)
        q, k = turn(q, angles, HEADS), turn(k, angles, HEADS)
        x = x + lin(attention(q[None], k[None], v[None], HEADS)[0], w, f"{layer}.attn.proj")
        inner = lin(norm(x, f"{layer}.norm2"), w, f"{layer}.mlp.fc1")
        x = x + lin(inner * torch.sigmoid(1.702 * inner), w, f"{layer}.mlp.fc2")
    inner = lin(norm(x, "visual.merger.ln_q").view(-1, 4 * SEE), w, "visual.merger.mlp.0")
    return lin(inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2))), w, "visual.merger.mlp.2")


def read(x, w):
    """The text tower on the embeddings (L, READ) of one chat, positions 0, 1, 2, ..."""
    width = READ // HEADS
    angles = torch.arange(len(x)).float()[:, None] / 1e6 ** (torch.arange(0, width, 2) / width)
    allowed = torch.ones(len(x), len(x)).tril().bool()

    def norm(y, name):
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]

    for layer in ("model.layers.0", "model.layers.1"):
        y = norm(x, f"{layer}.input_layernorm")
        q, k, v = (lin(y, w, f"{layer}.self_attn.{part}_proj") for part in "qkv")
        q, k = turn(q, angles, HEADS), turn(k, angles, GROUPS)
        k, v = (y.view(-1, GROUPS, width).repeat_interleave(HEADS // GROUPS, 1).flatten(1) for y in (k, v))
        x = x + lin(attention(q[None], k[None], v[None], HEADS, allowed)[0], w, f"{layer}.self_attn.o_proj")
        y = norm(x, f"{layer}.post_attention_layernorm")
        gated = F.silu(lin(y, w, f"{layer}.mlp.gate_proj")) * lin(y, w, f"{layer}.mlp.up_proj")
        x = x + lin(gated, w, f"{layer}.mlp.down_proj")
    return norm(x, "model.norm")


def mu(image, prompt, tokenizer, w):
    """The first output of the head at the reward token, one picture at a time."""
    patches, grid = patches_of(image[None], 14, 2)
    rows, columns = grid[0, 1:].tolist()
    text = TEMPLATE.replace("{text_prompt}", prompt)
    tokens = tokenizer(CHAT % ("<|image_pad|>" * (rows * columns // 4), text), return_tensors="pt")["input_ids"][0]
    x = w["model.embed_tokens.weight"][tokens].clone()
    x[tokens == tokenizer.convert_tokens_to_ids("<|image_pad|>")] = look(patches, rows, columns, w)
    state = read(x, w)[tokens == tokenizer.convert_tokens_to_ids("<|Reward|>")]
    return lin(lin(lin(state, w, "rm_head.0").relu(), w, "rm_head.3").relu(), w, "rm_head.5")[0, 0]


@pytest.mark.parametrize("later_names", [False, True])
def test_hpsv3_reads_the_official_checkpoint(base, tmp_path, monkeypatch, later_names):
    monkeypatch.setattr(hpsv3, "PIXELS", 16 * 28 * 28)
    tensors = qwen_tensors(256 + len(SPECIAL) + 1)
    stored = tensors
    if later_names:
        stored = {key.replace("model.", "model.language_model."): tensor for key, tensor in tensors.items()}
        stored = {key.replace("visual.", "model.visual."): tensor for key, tensor in stored.items()}
    save_file(stored, tmp_path / "HPSv3.safetensors")
    options = {"path": tmp_path / "HPSv3.safetensors", "base": base, "dtype": "fp32"}
    scorer = load_scorer("reward.name", "hpsv3", 3, options | {"template": base / "template.txt"})
    images = pictures(3, 90, 130)
    scores = scorer(images, PROMPTS)
    expected = torch.stack([mu(image, prompt.text, scorer.function.tokenizer, tensors)
                            for image, prompt in zip(images, PROMPTS, strict=True)])  # fmt: skip
    assert expected.std() > 1e-2
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(BadInput, match=r"must hold <\|Reward\|> exactly once"):
        scorer(images, [Prompt("<|Reward|>"), *PROMPTS[1:]])


def test_head_stays_in_full_precision(base, tmp_path, monkeypatch):
    monkeypatch.setattr(hpsv3, "PIXELS", 16 * 28 * 28)
    tensors = qwen_tensors(256 + len(SPECIAL) + 1)
    save_file(tensors, tmp_path / "HPSv3.safetensors")
    options = {"path": tmp_path / "HPSv3.safetensors", "base": base, "template": base / "template.txt"}
    scorer = load_scorer("reward.name", "hpsv3", 3, options)
    assert scorer.function.judge.head[0].weight.equal(tensors["rm_head.0.weight"])
    assert scorer.function.judge.backbone.dtype == torch.bfloat16
    assert scorer(pictures(3, 90, 130), PROMPTS).isfinite().all()


def test_template_of_the_official_package_is_read_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "hpsv3"
    (package / "dataset").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('needs half the world')\n")
    (package / "dataset" / "data_collator_qwen.py").write_text(
        'import nothing_of_this_name\n\nINSTRUCTION = """Rate {text_prompt}."""\n'
        'prompt_with_special_token = """Now: <|Reward|>"""\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert hpsv3.official_template() == "Rate {text_prompt}.Now: <|Reward|>"
    (package / "dataset" / "data_collator_qwen.py").write_text("")
    with pytest.raises(BadInput, match=r"hpsv3\.template=hpsv3: .*pip install --no-deps hpsv3"):
        hpsv3.official_template()


def test_bad_templates_and_checkpoints_are_refused(base, tmp_path):
    (tmp_path / "bad.txt").write_text("{text_prompt} without a token")
    with pytest.raises(BadInput, match=r"hpsv3\.template=.*exactly once"):
        load_scorer("reward.name", "hpsv3", 1, {"template": tmp_path / "bad.txt"})
    save_file(qwen_tensors(256 + len(SPECIAL)), tmp_path / "small.safetensors")
    options = {"path": tmp_path / "small.safetensors", "base": base, "template": base / "template.txt"}
    with pytest.raises(BadInput, match=r"has 263 token embeddings, fewer than the 264 tokens"):
        load_scorer("reward.name", "hpsv3", 1, options)
