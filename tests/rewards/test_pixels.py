"""Preprocessing in torch against that of transformers with Pillow."""

import numpy as np
import pytest
import torch
from PIL import Image
from reward_cases import boxed, pictures
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from tempflow.rewards.geneval.detection import detector_pixels
from tempflow.rewards.parts.pixels import (
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    centre_crop,
    clip_pixels,
    letterbox_pixels,
    normalise,
    qwen_size,
    resize,
)
from tempflow.rewards.scorers.hpsv3 import PIXELS, patches_of

LEVEL = 1 / 255


def as_files(images):
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]


def assert_levels(found, expected, std, share, levels=1):
    """Nowhere more than one level of 256 apart, and apart at all in at most `share` of the values."""
    apart = ((found - expected) * torch.tensor(std).view(3, 1, 1)).abs()
    assert apart.max() < (levels + 0.01) * LEVEL
    assert (apart > 0.01 * LEVEL).float().mean() <= share


@pytest.mark.parametrize(
    ("height", "width"),
    [
        (512, 512),
        (300, 425),
        (425, 300),
        (100, 90),
        (224, 224),
        (600, 300),
        (602, 300),
        (1500, 300),
        (300, 1500),
        (700, 100),
    ],
)
def test_clip_pixels(height, width):
    images = pictures(2, height, width)
    expected = CLIPImageProcessorPil()(as_files(images), return_tensors="pt")["pixel_values"]
    assert expected.shape == (2, 3, 224, 224)
    assert_levels(clip_pixels(images, 224), expected, CLIP_STD, 0.002)


@pytest.mark.parametrize("old", [(70, 120), (200, 120), (201, 120), (400, 120), (201, 50), (99, 50)])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_resize_takes_pillows_passes_in_pillows_order(old, mode):
    """To 100 x 70: in Pillow 13 rows go first where they lose more than twice what columns lose (200 is the border)."""
    images = torch.randint(0, 256, (1, 3, *old), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    (file,) = as_files(images)
    levels = np.asarray(file.resize((70, 100), getattr(Image.Resampling, mode.upper())))
    apart = resize(images, 100, 70, mode)[0] - torch.from_numpy(levels.copy()).permute(2, 0, 1)
    assert apart.abs().max() <= 1 and (apart != 0).float().mean() < 0.03  # ties; the other order: 0.2


def test_clip_pixels_are_antialiased():
    """Fine stripes become grey, not other stripes."""
    stripes = (torch.arange(512) % 2 * 255).to(torch.uint8).expand(1, 3, 512, 512)
    assert clip_pixels(stripes, 128).std((2, 3)).max() < 0.1


def test_crops_begin_where_the_official_ones_do():
    """A margin of 3 begins at 1 in transformers, at 2 in torchvision; a margin of 1 at 0 in both."""
    columns = torch.arange(9.0).expand(1, 3, 9, 9)
    assert centre_crop(columns, 6)[0, 0, 0, 0] == 1 and centre_crop(columns, 6, half_up=True)[0, 0, 0, 0] == 2
    assert centre_crop(columns, 8)[0, 0, 0, 0] == 0 == centre_crop(columns, 8, half_up=True)[0, 0, 0, 0]


def test_letterbox_keeps_the_whole_picture_between_black_margins():
    images = pictures(1, 64, 128)
    values = letterbox_pixels(images, 32) * torch.tensor(CLIP_STD).view(3, 1, 1)
    black = values[0, :, 0, 0]
    assert torch.equal(values[0, :, :8], black[:, None, None].expand(3, 8, 32))
    assert torch.equal(values[0, :, 24:], black[:, None, None].expand(3, 8, 32))
    inner = images.float().unflatten(3, (32, 4)).unflatten(2, (16, 4)).mean((3, 5)) / 255
    assert (values[:, :, 8:24] - black[:, None, None] - inner).abs().mean() < 0.03


@pytest.mark.parametrize(("height", "width", "side"), [(40, 53, 224), (53, 42, 24), (224, 100, 224), (99, 300, 32)])
def test_letterbox_pixels(height, width, side):
    """Against the filter written out; 40 x 53 leaves 55 lines, of which 27 are above."""
    images = pictures(2, height, width)
    torch.testing.assert_close(letterbox_pixels(images, side), boxed(images, side), atol=2e-5, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(512, 512), (250, 400), (1000, 1000)])
def test_detector_pixels(height, width):
    images = pictures(1, height, width)
    expected = Mask2FormerImageProcessorPil()(as_files(images), return_tensors="pt")["pixel_values"]
    found, inside = detector_pixels(images)
    assert found.shape == expected.shape and expected.shape[2:] == inside
    assert_levels(found, expected, IMAGENET_STD, 0.1, levels=2)  # 512/800 makes many exact ties of two levels


def test_detector_pixels_of_odd_sizes_are_padded():
    """As mmdetection and detectron2 do; transformers' processor would stretch the picture to a multiple of 32."""
    images = pictures(1, 600, 200)
    found, inside = detector_pixels(images)
    assert inside == (1333, 444) and found.shape == (1, 3, 1344, 448)
    assert not found[:, :, 1333:].any() and not found[..., 444:].any()
    levels = np.asarray(as_files(images)[0].resize((444, 1333), Image.Resampling.BILINEAR))
    expected = normalise(torch.from_numpy(levels.copy()).permute(2, 0, 1)[None], IMAGENET_MEAN, IMAGENET_STD)
    assert_levels(found[..., :1333, :444], expected, IMAGENET_STD, 0.002)


@pytest.mark.parametrize(("height", "width"), [(512, 512), (300, 500), (1400, 300)])
def test_qwen_patches(height, width):
    images = pictures(2, height, width)
    size = {"shortest_edge": PIXELS, "longest_edge": PIXELS}
    expected = Qwen2VLImageProcessorPil(size=size)(as_files(images), return_tensors="pt")
    patches, grid = patches_of(images, 14, 2)
    assert torch.equal(grid, expected["image_grid_thw"])
    channels = (len(patches), 3, -1, 1)
    assert_levels(patches.view(channels), expected["pixel_values"].view(channels), CLIP_STD, 0.002)


@pytest.mark.parametrize("size", [(512, 512), (1024, 1024), (448, 448), (100, 900), (768, 1344), (31, 30)])
def test_qwen_size(size):
    assert qwen_size(*size, PIXELS, 28) == smart_resize(*size, 28, PIXELS, PIXELS)
