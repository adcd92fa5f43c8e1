"""Scores of pictures drawn to a hint: against naive loops, torchmetrics, and a SegFormer that is really loaded."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ortho_cli.analysis.control_detectors import FaceLandmarks, Segmenter, read_labels, read_landmarks
from ortho_cli.analysis.control_metrics import (
    confusion_counts,
    edge_overlap,
    landmark_distances,
    landmark_summary,
    segment_scores,
)
from ortho_cli.analysis.evaluation import Missing
from ortho_cli.errors import UsageError
from ortho_cli.models.edges import canny

RANDOM = np.random.default_rng(0)


def test_edge_overlap_is_the_published_formula() -> None:
    for _ in range(20):
        drawn, wanted = RANDOM.random((2, 7, 5)) < 0.4
        hits = sum(bool(a and b) for a, b in zip(drawn.flat, wanted.flat, strict=True))
        false, missed = int(drawn.sum()) - hits, int(wanted.sum()) - hits
        iou, f1 = edge_overlap(drawn, wanted)
        assert iou == pytest.approx(hits / (hits + false + missed))
        assert f1 == pytest.approx(2 * hits / (2 * hits + false + missed))
        assert f1 == pytest.approx(2 * iou / (1 + iou))


def test_empty_maps_are_no_nan() -> None:
    empty, some = np.zeros((4, 4), bool), np.eye(4, dtype=bool)
    assert edge_overlap(empty, empty) == (1.0, 1.0)
    assert edge_overlap(empty, some) == edge_overlap(some, empty) == (0.0, 0.0)
    assert edge_overlap(some, some) == (1.0, 1.0)


def test_canny_is_opencvs_of_the_authors_thresholds() -> None:
    import cv2
    from skimage.data import astronaut

    pixels = astronaut()[:128, 128:256]
    edges = canny(pixels)
    assert np.array_equal(edges, cv2.Canny(np.ascontiguousarray(pixels), 100, 200) == 255)
    assert 0.02 < edges.mean() < 0.4
    assert canny(pixels, 10, 50).sum() > edges.sum() > canny(pixels, 300, 600).sum()


def test_failures_of_landmarks_count() -> None:
    wanted = [RANDOM.random((68, 2)) * 512 for _ in range(3)]
    moved = [wanted[0] + [3.0, 4.0], None, wanted[2]]
    distances = landmark_distances(moved, wanted)
    assert distances == [pytest.approx(5.0), None, 0.0]
    summary = landmark_summary(distances, 512)
    assert summary["landmark_distance"] == pytest.approx((5 + 512 + 0) / 3)
    assert summary["landmark_failures"] == pytest.approx(1 / 3)
    assert summary["landmark_distance_detected"] == pytest.approx(2.5)
    assert landmark_summary([None], 64) == {"landmark_distance": 64, "landmark_failures": 1.0}


def test_segment_scores_are_torchmetrics() -> None:
    from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

    classes, counts = 6, np.zeros((6, 6), np.int64)
    pairs = []
    for _ in range(4):
        wanted, drawn = RANDOM.integers(0, 5, (2, 9, 8))  # class 5 is in no picture
        wanted[RANDOM.random(wanted.shape) < 0.2] = 255
        drawn[RANDOM.random(drawn.shape) < 0.05] = 5  # and drawn now and then
        pairs.append((torch.tensor(drawn), torch.tensor(wanted)))
        counts += confusion_counts(drawn, wanted, classes)
    found = segment_scores(counts)
    flat = [torch.cat([pair[side].flatten() for pair in pairs]) for side in (0, 1)]
    jaccard = MulticlassJaccardIndex(classes, average="macro", ignore_index=255)(*flat)
    micro = MulticlassAccuracy(classes, average="micro", ignore_index=255)(*flat)
    each = MulticlassAccuracy(classes, average=None, ignore_index=255)(*flat)
    assert found["mean_iou"] == pytest.approx(float(jaccard), abs=1e-6)
    assert found["pixel_accuracy"] == pytest.approx(float(micro), abs=1e-6)
    assert found["mean_accuracy"] == pytest.approx(float(each[:5].mean()), abs=1e-6)


def test_annotations_and_landmark_files(tmp_path: Path) -> None:
    labels = read_labels(Image.fromarray(np.array([[0, 1], [150, 7]], np.uint8)))
    assert labels.tolist() == [[255, 0], [149, 6]]
    points = RANDOM.random((68, 2)) * 1024
    np.savetxt(tmp_path / "1.txt", points)
    assert np.allclose(read_landmarks(tmp_path / "1.txt", 0.5), points / 2)
    np.savetxt(tmp_path / "2.txt", points[:5])
    with pytest.raises(UsageError, match="5 points of 2 numbers"):
        read_landmarks(tmp_path / "2.txt")
    (tmp_path / "3.txt").write_text("no numbers", "utf-8")
    with pytest.raises(UsageError, match="no landmarks"):
        read_landmarks(tmp_path / "3.txt")


def test_a_segformer_labels_every_pixel(tmp_path: Path) -> None:
    import transformers

    config = transformers.SegformerConfig(
        num_labels=5, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(tmp_path)
    transformers.SegformerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    segment = Segmenter(str(tmp_path))
    labels = segment(Image.fromarray(RANDOM.integers(0, 256, (48, 80, 3), dtype=np.uint8)))
    assert labels.shape == (48, 80)
    assert segment.classes == 5
    assert set(np.unique(labels)) <= set(range(5))


def test_what_is_missing_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "face_alignment", None)
    with pytest.raises(Missing, match="SegFormer 'nvidia/none' does not open") as caught:
        Segmenter("nvidia/none")
    assert caught.value.command == "hf download nvidia/none"
    with pytest.raises(Missing, match="face-alignment") as absent:
        FaceLandmarks()
    assert absent.value.command == "pip install face-alignment"
