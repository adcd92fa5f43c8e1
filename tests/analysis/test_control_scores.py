"""Folders of pictures drawn to a hint against their references, through the registry as `ortho evaluate` asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ortho_cli import registry
from ortho_cli.analysis import control_scores
from ortho_cli.analysis.control_scores import landmarks_of_folders
from ortho_cli.analysis.evaluation import Skipped
from ortho_cli.analysis.metric_names import better, is_share
from ortho_cli.analysis.picture_folder import open_folder
from ortho_cli.analysis.picture_metrics import PictureOptions, measure_pictures


def no_network() -> Any:
    raise AssertionError("these metrics need no features")


OPTIONS = PictureOptions(no_network)
NAMES = ["canny", "landmarks", "segments"]
RANDOM = np.random.default_rng(0)


def save(path: Path, pixels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)


def test_the_names_are_in_the_registry() -> None:
    assert set(NAMES) <= set(registry.names("picture_metrics"))
    assert better("landmark_distance") == better("landmark_failures") == "min"
    assert better("canny_f1") == better("mean_iou") == "max"
    assert is_share("canny_iou")
    assert not is_share("landmark_distance_detected")


def test_edges(tmp_path: Path) -> None:
    import cv2

    pictures = RANDOM.integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)
    pictures[2] = 7  # no edges, wanted or drawn: no NaN in the mean
    drawn = [cv2.blur(pictures[0], (5, 5)), pictures[1], pictures[2]]
    for place in range(3):
        save(tmp_path / "reference" / f"{place:06d}.png", pictures[place])
        save(tmp_path / "generated" / f"{place:06d}_0.png", drawn[place])
    values, skipped = measure_pictures(
        open_folder(tmp_path / "generated"), open_folder(tmp_path / "reference"), ["canny"], OPTIONS
    )
    maps = [[cv2.Canny(np.ascontiguousarray(p), 100, 200) > 0 for p in pair]
            for pair in zip(drawn, pictures, strict=True)]  # fmt: skip
    both, either = int((maps[0][0] & maps[0][1]).sum()), int((maps[0][0] | maps[0][1]).sum())
    assert 0 < both < either
    assert not skipped
    assert values["canny_iou"] == pytest.approx((both / either + 1 + 1) / 3)
    assert values["canny_f1"] == pytest.approx((2 * both / (both + either) + 1 + 1) / 3)
    save(tmp_path / "reference" / "000000.png", RANDOM.integers(0, 256, (20, 40, 3)))
    folders = open_folder(tmp_path / "generated"), open_folder(tmp_path / "reference")
    (told,) = measure_pictures(*folders, ["canny"], OPTIONS)[1]
    assert "40 x 40 pixels, its reference 40 x 20" in str(told)
    (tmp_path / "reference" / "000001.png").unlink()
    values, skipped = measure_pictures(folders[0], open_folder(tmp_path / "reference"), NAMES, OPTIONS)
    assert not values
    assert [each.metric for each in skipped] == NAMES
    assert all("has no reference in" in str(each) for each in skipped)


def test_landmarks_count_what_has_no_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A detector that reads where the face is from a picture's first pixel: 0 for none, else its distance."""

    def detector(device: str) -> Any:
        def detect(picture: Image.Image) -> Any:
            level = np.asarray(picture)[0, 0, 0]
            return None if level == 0 else np.full((68, 2), float(level))

        return detect

    monkeypatch.setattr(control_scores, "FaceLandmarks", detector)
    for name, drawn, wanted in (("a", 10, 13), ("b", 0, 9), ("c", 5, 0), ("d", 4, 255)):
        save(tmp_path / "generated" / f"{name}.png", np.full((16, 16, 3), drawn))
        save(tmp_path / "reference" / f"{name}.png", np.full((16, 16, 3), wanted))
    np.savetxt(tmp_path / "reference" / "d.txt", np.full((68, 2), 8.0))  # of a picture of 32 pixels: 4 of this one's
    folders = open_folder(tmp_path / "generated"), open_folder(tmp_path / "reference")
    values = landmarks_of_folders(*folders, OPTIONS, side=32)
    assert not isinstance(values, Skipped)
    assert values["landmark_distance_detected"] == pytest.approx((3 * 2**0.5 + 0) / 2)
    assert values["landmark_distance"] == pytest.approx((3 * 2**0.5 + 16 + 0) / 3)
    assert values["landmark_failures"] == pytest.approx(1 / 3)


def test_segments(tmp_path: Path) -> None:
    import transformers

    config = transformers.SegformerConfig(
        num_labels=4, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(tmp_path / "net")
    transformers.SegformerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "net")
    pixels = RANDOM.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for folder in ("generated", "reference"):
        save(tmp_path / folder / "a.png", pixels)
    settings = {"segments": {"model": str(tmp_path / "net")}}

    def found() -> dict[str, float]:
        folders = open_folder(tmp_path / "generated"), open_folder(tmp_path / "reference")
        return measure_pictures(*folders, ["segments"], OPTIONS, settings)[0]

    assert set(found().values()) == {1.0}
    labels = control_scores.Segmenter(str(tmp_path / "net"))(Image.fromarray(pixels))
    noted = labels + 1
    noted[:8] = 0  # not labelled, so not counted
    noted[8:16] = noted[8:16] % 4 + 1  # wrong
    save(tmp_path / "reference" / "a.png", noted)
    assert found()["pixel_accuracy"] == pytest.approx(2 / 3)
    save(tmp_path / "reference" / "a.png", np.zeros((32, 32)))
    assert found() == {}
