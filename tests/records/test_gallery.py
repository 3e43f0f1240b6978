"""Small pictures of evaluations: how small, how many, and which of them stay."""

from io import BytesIO
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import train

from tempflow.common.errors import BadInput
from tempflow.records.figures import save_pictures
from tempflow.records.gallery import Room, as_grid, keep_small, read_small, steps_in

AMPLE = Room(99, 1e9)


def grey(*levels: int, size: tuple[int, int] = (4, 6)) -> torch.Tensor:
    """A picture of one grey for each level."""
    return torch.stack([torch.full((3, *size), level, dtype=torch.uint8) for level in levels])


def levels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(data)).convert("RGB"))


def test_small_pictures_are_kept_exactly_and_large_ones_made_small(tmp_path):
    noise = torch.randint(0, 256, (1, 3, 16, 24), dtype=torch.uint8)
    keep_small(tmp_path, 0, noise, AMPLE)
    keep_small(tmp_path, 5, grey(200, size=(300, 600)), AMPLE)
    found = read_small(tmp_path, [0, 5], 1)
    assert (levels(found[0][0].data) == noise[0].permute(1, 2, 0).numpy()).all()
    assert (found[5][0].width, found[5][0].height) == (256, 128)
    assert abs(levels(found[5][0].data).astype(int) - 200).max() <= 3


def test_the_evaluations_that_stay_are_spread_evenly(tmp_path):
    for step in range(0, 90, 5):
        keep_small(tmp_path, step, grey(step), Room(6, 1e9))
        assert {0, step} <= set(steps_in(tmp_path)) and len(steps_in(tmp_path)) <= 6
    steps = list(steps_in(tmp_path))
    gaps = [after - before for before, after in pairwise(steps)]
    assert len(steps) == 6 and max(gaps) <= 4 * min(gaps)


def test_bytes_are_bounded_too(tmp_path):
    noise = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for step in range(10):
        keep_small(tmp_path, step, noise, Room(99, 25_000))
        size = sum(path.stat().st_size for path in tmp_path.glob("gallery/*/*"))
        assert size <= 25_000 and {0, step} <= set(steps_in(tmp_path))
    assert 3 <= len(steps_in(tmp_path)) < 10


def test_no_room_keeps_none(tmp_path):
    keep_small(tmp_path, 0, grey(1), Room(0, 1e9))
    keep_small(tmp_path, 0, torch.zeros(0, 3, 4, 4, dtype=torch.uint8), AMPLE)
    assert not (tmp_path / "gallery").exists()


def test_runs_without_a_gallery_show_their_strips(tmp_path):
    for step, level in ((0, 10), (2, 20), (4, 30)):
        save_pictures(tmp_path, step, grey(level, level + 1))
    found = read_small(tmp_path, [0, 2, 4], 2)
    assert {step: [levels(small.data)[0, 0, 0] for small in row] for step, row in found.items()} == {
        0: [10, 11],
        4: [30, 31],
    }
    (tmp_path / "pictures" / "step_000004.png").write_bytes(b"garbage")
    with pytest.raises(BadInput, match="pictures"):
        read_small(tmp_path, [0, 2, 4], 2)


def test_what_is_not_whole_or_no_picture(tmp_path):
    for step in (0, 1, 2):
        keep_small(tmp_path, step, grey(1, 2), AMPLE)
    (tmp_path / "gallery" / "step_000001" / "1.webp").unlink()
    assert list(read_small(tmp_path, [0, 1, 2], 2)) == [0, 2]
    assert list(read_small(tmp_path, [0], 2)) == [0], "what a resumed run has not evaluated again is left out"
    (tmp_path / "gallery" / "step_000002" / "0.webp").write_bytes(b"GIF89a")
    with pytest.raises(BadInput, match="gallery"):
        read_small(tmp_path, [2], 2)


def test_a_grid_has_all_pictures_in_their_order(tmp_path):
    keep_small(tmp_path, 0, grey(10, 20, 30), AMPLE)
    grid = np.asarray(as_grid(read_small(tmp_path, [0], 3)[0]))
    assert grid.shape == (8, 12, 3) and [grid[0, 0, 0], grid[0, 6, 0], grid[4, 0, 0], grid[4, 6, 0]] == [10, 20, 30, 0]


def test_a_resumed_run_goes_on_with_its_gallery(tmp_path):
    few = ("learn.iterations=2", "eval.every=1", "eval.prompts=3", "run.trackers=[]")
    assert train(tmp_path / "run", *few, "eval.gallery=3") == 0
    assert list(steps_in(tmp_path / "run")) == [0, 1, 2]
    assert train(tmp_path / "run", *few, "eval.gallery=3", "learn.iterations=3", "run.resume=true") == 0
    steps = list(steps_in(tmp_path / "run"))
    assert len(steps) == 3 and steps[0] == 0 and steps[-1] == 3
    page = (tmp_path / "run" / "report.html").read_text()
    assert all(f'id="pictures-{step}"' in page for step in steps)
