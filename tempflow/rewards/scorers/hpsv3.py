"""HPSv3: human preference over a wide spectrum of pictures (arXiv 2508.03789), a reward head on Qwen2-VL 7B.

Score: mu, the mean of the predicted normal distribution of preference; about 0 to 15. (sigma is not used.)

As in the official code: the picture is resized to 256 tokens' worth of pixels; the text is the official instruction,
the prompt, and a reward token; at that token three linear layers in fp32 give mu and sigma. Positions are counted
1, 2, 3, ... through picture and text alike: the official forward passes embeddings without token ids, so that
Qwen2-VL's own two-dimensional positions were never used, neither in training nor in scoring.

The instruction belongs to the weights but is its authors' text; it is read from their package, which need only lie
there (`pip install --no-deps hpsv3`), or from a file of yours with `{text_prompt}` in it.

Verified: network, positions, head and pixel layout against an independent computation on small random weights, and
pixels against transformers' processor (tests/rewards/test_hpsv3.py). Not verified: a score of the real 7B weights
against one of the official package, whose pinned versions cannot be installed beside ours.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, Qwen2VLConfig

from tempflow.common.errors import BadInput
from tempflow.prompts import Prompt
from tempflow.rewards.parts.pixels import check_images, normalise, qwen_size, resize
from tempflow.rewards.parts.weights import dtype_of, find, frozen, install, needed, option, read_tensors, renamed

REWARD_TOKEN, IMAGE_TOKEN = "<|Reward|>", "<|image_pad|>"
PIXELS = 256 * 28 * 28
DEFAULT_TEMPLATE = "hpsv3"
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
)
"""Qwen2-VL's chat format for one picture and one text"""

RULES = [
    (r"^visual\.", "backbone.visual."),
    (r"^model\.(visual|language_model)\.", r"backbone.\1."),
    (r"^model\.", "backbone.language_model."),
    (r"^rm_head\.", "head."),
]
"""names of the checkpoint, as transformers 4.45 or as later versions write them -> those of `Judge`"""


class Judge(nn.Module):
    """Qwen2-VL with the reward head."""

    def __init__(self, config: Qwen2VLConfig, hidden: tuple[int, int], dtype: torch.dtype) -> None:
        """
        Args:
            hidden: widths of the head's inner layers.
        """
        super().__init__()
        self.backbone = AutoModel.from_config(config, dtype=dtype)
        width = config.text_config.hidden_size
        layers = [nn.Linear(width, hidden[0]), nn.ReLU(), nn.Dropout(), nn.Linear(*hidden), nn.ReLU()]
        self.head = nn.Sequential(*layers, nn.Linear(hidden[1], 2))

    def forward(self, tokens: Tensor, mask: Tensor, patches: Tensor, grid: Tensor, reward_token: int) -> Tensor:
        """Tokens (B, L), mask (B, L), patches (B x N, D), grid (B, 3) -> mu and sigma, fp32 (B, 2)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(3, *tokens.shape)
        states = self.backbone(
            input_ids=tokens, attention_mask=mask, position_ids=positions, pixel_values=patches, image_grid_thw=grid
        ).last_hidden_state
        return self.head(states[tokens == reward_token].float())


class HpsV3:
    """HPS v3."""

    def __init__(
        self,
        path: str | Path = "MizzenAI/HPSv3/HPSv3.safetensors",
        base: str | Path = "Qwen/Qwen2-VL-7B-Instruct",
        template: str | Path = DEFAULT_TEMPLATE,
        dtype: str = "bf16",
        device: Any = "cpu",
    ) -> None:
        """
        Args:
            path: file of the checkpoint, local or owner/repository/file of the hub.
            base: folder or hub id of Qwen2-VL 7B Instruct; only its configuration and tokenizer are read.
            template: text file of what stands before the chat's end, with {text_prompt} and <|Reward|> in it;
                hpsv3 reads it from the package of that name.
            dtype: fp32, bf16 or fp16 of Qwen2-VL; the head is fp32.
        """
        self.template = official_template() if template == DEFAULT_TEMPLATE else own_template(Path(template))
        self.tokenizer = find("hpsv3", "base", base, AutoTokenizer.from_pretrained)
        self.tokenizer.padding_side = "right"
        self.tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
        config = find("hpsv3", "base", base, Qwen2VLConfig.from_pretrained)
        if self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) != config.image_token_id:
            raise BadInput(option("hpsv3", "base"), base, f"no Qwen2-VL: its tokenizer lacks {IMAGE_TOKEN}")
        precision = dtype_of("hpsv3", dtype, device)
        self.judge, self.device = load_judge(path, config, len(self.tokenizer), precision), device
        frozen(self.judge.backbone, precision, device)  # rounds rotary frequencies, too, as officially
        frozen(self.judge.head, torch.float32, device)
        self.reward_token = self.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """uint8 (B, 3, H, W) and B prompts -> fp32 (B,)."""
        check_images(images, prompts)
        vision = self.judge.backbone.config.vision_config
        patches, grid = patches_of(images.to(self.device), vision.patch_size, vision.spatial_merge_size)
        places = int(grid[0].prod()) // vision.spatial_merge_size**2
        texts = [self._text(prompt.text, places) for prompt in prompts]
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt")
        rewards = (tokens["input_ids"] == self.reward_token).sum(1)
        if not bool((rewards == 1).all()):
            text = prompts[int(torch.nonzero(rewards != 1)[0, 0])].text
            raise ValueError(f'the text for "{text}" must hold {REWARD_TOKEN} exactly once, in the template')
        ids, mask = tokens["input_ids"].to(self.device), tokens["attention_mask"].to(self.device)
        return self.judge(ids, mask, patches, grid.to(self.device), self.reward_token)[:, 0]

    def _text(self, prompt: str, places: int) -> str:
        text = self.template.replace("{text_prompt}", prompt)
        return CHAT.replace("{text}", text).replace("{image}", IMAGE_TOKEN * places)


def patches_of(images: Tensor, patch: int, merge: int) -> tuple[Tensor, Tensor]:
    """What Qwen2-VL's processor makes of uint8 images (B, 3, H, W).

    Returns:
        Patches fp32 (B x rows x columns, 3 x 2 x patch x patch), neighbours that merge next to each other and each
        picture twice as if it were two frames; and the grid (B, 3) of frames, rows, columns.
    """
    height, width = qwen_size(*images.shape[-2:], PIXELS, patch * merge)
    rows, columns = height // patch, width // patch
    values = normalise(resize(images, height, width))
    blocks = values.view(-1, 3, rows // merge, merge, patch, columns // merge, merge, patch)
    blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6).expand(*[-1] * 6, 2, -1, -1)
    return blocks.reshape(len(images) * rows * columns, -1), torch.tensor([[1, rows, columns]] * len(images))


def load_judge(path: str | Path, config: Qwen2VLConfig, words: int, dtype: torch.dtype) -> Judge:
    """The judge of a checkpoint; the number of its token embeddings and the widths of its head are the file's."""
    tensors = renamed(read_tensors("hpsv3", "path", path), RULES)
    tensors = {key: tensor for key, tensor in tensors.items() if key != "lm_head.weight"}
    keys = ("backbone.language_model.embed_tokens.weight", "head.0.weight", "head.3.weight")
    rows, first, second = (len(needed("hpsv3", "path", path, tensors, key)) for key in keys)
    if rows < words:
        hint = f"has {rows} token embeddings, fewer than the {words} tokens of base with {REWARD_TOKEN}"
        raise BadInput(option("hpsv3", "path"), path, hint)
    config.text_config.vocab_size = rows
    judge = Judge(config, (first, second), dtype)
    install(judge, tensors, option("hpsv3", "path"), path)
    return judge


def own_template(path: Path) -> str:
    """The text of a template file."""
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(option("hpsv3", "template"), path, f"not readable as a text file ({error})") from error
    if "{text_prompt}" not in text or text.count(REWARD_TOKEN) != 1:
        hint = f"must hold {{text_prompt}}, and {REWARD_TOKEN} exactly once"
        raise BadInput(option("hpsv3", "template"), path, hint)
    return text


def official_template() -> str:
    """The official instruction and closing words, from the source text of the installed package hpsv3.

    The package is not imported: it would need versions of other packages that exclude ours.
    """
    hint = "the official instruction is not here; pip install --no-deps hpsv3, or give a text file"
    spec = importlib.util.find_spec("hpsv3")
    if spec is None or not spec.submodule_search_locations:
        raise BadInput(option("hpsv3", "template"), DEFAULT_TEMPLATE, hint)
    file = Path(next(iter(spec.submodule_search_locations))) / "dataset" / "data_collator_qwen.py"
    try:
        texts = _constants(ast.parse(file.read_text(encoding="utf-8")))
        return texts["INSTRUCTION"] + texts["prompt_with_special_token"]
    except (OSError, SyntaxError, KeyError) as error:
        raise BadInput(option("hpsv3", "template"), DEFAULT_TEMPLATE, f"{hint} ({error})") from error


def _constants(tree: ast.Module) -> Mapping[str, str]:
    """Names and values of a file's text constants."""
    return {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }
