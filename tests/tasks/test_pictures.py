"""Pictures on disk: every mode decoded, boxes cut where they should be, broken files named."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_sets import pixels, save_picture
from PIL import Image

from ortho_cli.errors import RecipeError, UsageError
from ortho_cli.tasks.pictures import AREA_DRAWS, PictureFiles, area_box, centre_box, to_tensor


def test_pixels_come_back_as_they_were(tmp_path: Path) -> None:
    images = pixels(3, 3, 5)
    for number, image in enumerate(images):
        save_picture(tmp_path / f"{number}.png", image)
    files = PictureFiles(tmp_path, ["0.png", "1.png", "2.png"])
    assert torch.equal(to_tensor(files.open(1), 5, 3), torch.from_numpy(images[1]))
    chosen = files.select([2, 0])
    assert len(chosen) == 2
    assert torch.equal(to_tensor(chosen.open(0), 5, 3), torch.from_numpy(images[2]))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "F"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_bytes(mode: str, channels: int) -> None:
    out = to_tensor(Image.new(mode, (6, 4)), 8, channels)
    assert (out.shape, out.dtype) == ((channels, 8, 8), torch.uint8)


def test_a_palette_with_a_see_through_colour(tmp_path: Path) -> None:
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 200, 100, 50])
    picture.save(tmp_path / "p.png", transparency=bytes([255, 0]))
    out = to_tensor(PictureFiles(tmp_path, ["p.png"]).open(0), 4, 3)
    assert out[:, 0, 0].tolist() == [200, 100, 50]


def test_a_box_is_cut_before_resizing() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    image[2:6, 4:8] = 90
    assert set(to_tensor(Image.fromarray(image), 4, 3, (4, 2, 8, 6)).flatten().tolist()) == {90}
    assert 0 in to_tensor(Image.fromarray(image), 4, 3).flatten().tolist()


def test_the_centre_of_wide_and_high_pictures() -> None:
    assert centre_box(400, 200, 0.875) == (112.5, 12.5, 287.5, 187.5)
    assert centre_box(200, 400, 0.875) == (12.5, 112.5, 187.5, 287.5)


@settings(deadline=None, max_examples=100)
@given(
    width=st.integers(1, 500),
    height=st.integers(1, 500),
    draws=st.lists(st.floats(0, 1, exclude_max=True), min_size=AREA_DRAWS, max_size=AREA_DRAWS),
)
def test_a_random_box_lies_in_the_picture_and_is_no_sliver(width: int, height: int, draws: list[float]) -> None:
    left, top, right, bottom = area_box(width, height, draws)
    assert 0 <= left < right <= width + 1e-9 and 0 <= top < bottom <= height + 1e-9
    assert 3 / 4 - 1e-9 <= (right - left) / (bottom - top) <= 4 / 3 + 1e-9


def test_a_picture_too_long_for_any_try_gives_its_middle() -> None:
    assert area_box(100, 1000, [0.999] * AREA_DRAWS) == (0, 500 - 100 / 1.5, 100, 500 + 100 / 1.5)


@pytest.mark.parametrize("data", [b"", b"no picture", None])
def test_a_broken_file_is_named(tmp_path: Path, data: bytes | None) -> None:
    path = tmp_path / "x.png"
    save_picture(path, pixels(1, 3, 32)[0])
    path.write_bytes(data if data is not None else path.read_bytes()[:200])
    with pytest.raises(RecipeError, match="no picture that Pillow can read") as caught:
        PictureFiles(tmp_path, ["x.png"]).open(0)
    assert caught.value.where == str(path)


def test_without_pillow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UsageError, match="need Pillow"):
        PictureFiles(tmp_path, ["x.png"]).open(0)
