"""Pictures with hints: the published layouts read as they are, faults told with file and line before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ortho_cli.errors import RecipeError
from ortho_cli.models.edges import canny
from ortho_cli.recipe.data_hints import HintedPictures, HintKind
from ortho_cli.tasks.hint_data import BUNDLED, load_hints
from ortho_cli.tasks.hint_samples import HintSamples

CANNY = (100.0, 200.0)
RANDOM = np.random.default_rng(0)


def section(name: str, path: Path | None = None, **settings: Any) -> HintedPictures:
    given = {"name": name, **({"path": str(path)} if path else {}), **settings}
    return HintedPictures.model_validate(given)


def draw(path: Path, shade: int, size: tuple[int, int] = (16, 16)) -> None:
    """A picture of one shade, with a bright square in it."""
    pixels = np.full((size[1], size[0], 3), shade, np.uint8)
    pixels[4:9, 5:10] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def lines(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def published(folder: Path, kind: str, count: int = 3) -> None:
    """OFT's layout: hints and pictures of one name in two folders, one list for each part beside them."""
    for part, names in (("train", range(count)), ("val", range(10, 12))):
        for name in names:
            draw(folder / part / "color" / f"{name}.png", name)
            draw(folder / part / kind / f"{name}.png", 100 + name)
        rows = [
            {"source": f"source/{name}.png", "target": f"target/{name}.png", "prompt": f"no {name}"} for name in names
        ]
        lines(folder / f"prompt_{part}_blip.json", rows)


@pytest.mark.parametrize(("name", "kind"), [("ade20k-hints", "segm"), ("coco-hints", "depth"),
                                            ("coco-hints", "sketch"), ("deepfashion-hints", "densepose")])  # fmt: skip
def test_the_published_pairs(name: str, kind: HintKind, tmp_path: Path) -> None:
    published(tmp_path, kind)
    found = HintSamples(load_hints(section(name, tmp_path, hint=kind), "train"), 16, 16, CANNY)
    assert len(found) == 3
    batch = found.fetch(0, torch.tensor([2, 0]))
    assert found.prompts(batch["index"]) == ["no 2", "no 0"]
    assert batch["image"][:, 0, 0, 0].tolist() == pytest.approx([2 / 127.5 - 1, -1])
    assert batch["hint"][:, 0, 0, 0].tolist() == pytest.approx([102 / 255, 100 / 255])
    assert torch.equal(found[5, 2]["hint"], batch["hint"][0])  # in any epoch
    judged = load_hints(section(name, tmp_path, hint=kind), "eval")
    assert [judged.pictures.prompt(place) for place in range(2)] == ["no 10", "no 11"]
    lines(tmp_path / "val" / "prompt_val_blip_full.json", [{"source": "source/10.png", "target": "x", "prompt": "all"}])
    assert load_hints(section(name, tmp_path, hint=kind), "eval").pictures.prompt(0) == "all"


def test_celebahq_is_one_array_and_has_two_suffixes(tmp_path: Path) -> None:
    draw(tmp_path / "celeba-hq-img" / "7.jpg", 50, (32, 32))
    draw(tmp_path / "celeba-hq-landmark2d_cond_512" / "7.png", 9)
    (tmp_path / "prompt_train_blip.json").write_text('[{"image": "7.jpg", "prompt": "a face"}]', "utf-8")
    found = load_hints(section("celebahq-hints", tmp_path, hint="landmark"), "train")
    picture, hint = found.pictures.open(0)
    assert hint is not None
    assert (found.pictures.prompt(0), picture.size, hint.size) == ("a face", (32, 32), (16, 16))


def test_a_folder_of_ones_own_in_both_forms(tmp_path: Path) -> None:
    for place in range(10):
        draw(tmp_path / f"{place}.png", place, (24, 16))
        draw(tmp_path / "hints" / f"{place}.png", 200, (12, 8))
    rows = [{"file_name": f"{p}.png", "hint_file_name": f"hints/{p}.png", "text": f"no {p}"} for p in range(10)]
    lines(tmp_path / "metadata.jsonl", rows)
    parts = [load_hints(section("hint-folder", tmp_path, hint="depth"), split) for split in ("train", "eval")]
    assert [len(part) for part in parts] == [8, 2]
    prompts = {part.pictures.prompt(place) for part in parts for place in range(len(part))}
    assert prompts == {f"no {place}" for place in range(10)}
    other = tmp_path / "other"
    draw(other / "train" / "target" / "1.png", 5)
    draw(other / "train" / "source" / "1.png", 6)
    lines(other / "train" / "prompt.json", [{"source": "source/1.png", "target": "target/1.png", "prompt": "one"}])
    found = load_hints(section("hint-folder", other, hint="sketch"), "train")
    picture, hint = found.pictures.open(0)
    assert hint is not None
    assert (picture.getpixel((0, 0)), hint.getpixel((0, 0))) == ((5, 5, 5), (6, 6, 6))
    with pytest.raises(RecipeError, match="has no file of prompts for eval"):
        load_hints(section("hint-folder", other, hint="sketch"), "eval")


def test_canny_hints_are_made_of_the_pictures(tmp_path: Path) -> None:
    draw(tmp_path / "train" / "a.png", 0, (32, 24))
    lines(tmp_path / "train" / "metadata.jsonl", [{"file_name": "a.png", "prompt": "a square"}])
    samples = HintSamples(load_hints(section("hint-folder", tmp_path, hint="canny"), "train"), 24, 24, CANNY)
    sample = samples[0, 0]
    with Image.open(tmp_path / "train" / "a.png") as picture:
        pixels = np.asarray(picture)[:, 4:28]  # the middle square
    assert np.array_equal(sample["hint"][0].numpy() == 1, canny(pixels))
    assert sample["hint"].unique().tolist() == [0, 1]
    larger = HintSamples(samples.hints, 24, 48, CANNY)[0, 0]
    assert (larger["image"].shape, larger["hint"].shape) == ((3, 24, 24), (3, 48, 48))
    with pytest.raises(RecipeError, match="a depth hint cannot be made"):
        load_hints(section("hint-folder", tmp_path, hint="depth"), "train")
    (tmp_path / "coco").mkdir()
    published(tmp_path / "coco", "depth")
    assert load_hints(section("coco-hints", tmp_path / "coco", hint="canny"), "train").pictures.open(0)[1] is None
    published(tmp_path / "coco", "canny")
    assert load_hints(section("coco-hints", tmp_path / "coco", hint="canny"), "train").pictures.open(0)[1] is not None


def test_colours_of_segments_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "train"
    draw(path / "a.png", 0)
    path.joinpath("h.png").parent.mkdir(exist_ok=True)
    Image.fromarray(RANDOM.integers(0, 2, (7, 7, 3), dtype=np.uint8) * 255).save(path / "h.png")
    lines(path / "metadata.jsonl", [{"file_name": "a.png", "hint_file_name": "h.png", "text": ""}])
    found = HintSamples(load_hints(section("hint-folder", tmp_path, hint="segm"), "train"), 16, 32, CANNY)[0, 0]
    assert found["hint"].unique().tolist() == [0, 1]


def test_scikit_image_brings_its_own() -> None:
    parts = [load_hints(section("skimage-hints", hint="canny"), split) for split in ("train", "eval")]
    assert sum(map(len, parts)) == len(BUNDLED) == 12
    batch = HintSamples(parts[0], 32, 64, CANNY).fetch(0, torch.arange(len(parts[0])))
    assert batch["image"].shape == (10, 3, 32, 32)
    assert -1 <= batch["image"].min() < batch["image"].max() <= 1
    assert all(0.005 < float(hint.mean()) < 0.6 for hint in batch["hint"])


FAULTS = {
    "missing picture": (lambda folder: (folder / "train/color/1.png").unlink(), r"there is no picture '.*1\.png'"),
    "missing hint": (lambda folder: (folder / "train/segm/1.png").unlink(), r"there is no hint '.*1\.png'"),
    "cut short": (lambda folder: _cut(folder / "train/color/1.png"), "no picture that Pillow can read"),
    "no picture": (lambda folder: (folder / "train/segm/1.png").write_text("x"), "no picture that Pillow can read"),
    "other shape": (lambda folder: draw(folder / "train/segm/1.png", 1, (32, 16)), "the hint is 2 times as wide"),
}


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_are_bad_stop_with_their_line_or_are_left_out(fault: str, tmp_path: Path) -> None:
    published(tmp_path, "segm")
    spoil, message = FAULTS[fault]
    spoil(tmp_path)
    with pytest.raises(RecipeError, match=message) as caught:
        load_hints(section("ade20k-hints", tmp_path, hint="segm"), "train")
    assert caught.value.where == f"{tmp_path / 'prompt_train_blip.json'}:2"
    assert "data.skip_bad" in str(caught.value.hint)
    kept = load_hints(section("ade20k-hints", tmp_path, skip_bad=True, hint="segm"), "train")
    assert [kept.pictures.prompt(place) for place in range(len(kept))] == ["no 0", "no 2"]
    (told,) = kept.faults
    assert told.startswith(f"{tmp_path / 'prompt_train_blip.json'}:2: ")


LINES = {
    "{": "no JSON",
    "3": "3 is no object",
    '{"source": "source/1.png", "target": "target/1.png"}': "has no picture or no prompt",
    '{"source": "1.png", "target": "1.png", "prompt": "a"}': "is not source/NAME",
    '{"source": "source/../../1.png", "target": "a", "prompt": "a"}': "leaves the folder",
    '{"prompt": "a"}': "has no picture or no prompt",
}


@pytest.mark.parametrize("line", LINES)
def test_a_wrong_line_is_named(line: str, tmp_path: Path) -> None:
    published(tmp_path, "segm")
    index = tmp_path / "prompt_train_blip.json"
    index.write_text(index.read_text("utf-8") + "\n" + line + "\n", "utf-8")
    with pytest.raises(RecipeError, match=LINES[line]) as caught:
        load_hints(section("ade20k-hints", tmp_path, hint="segm"), "train")
    assert caught.value.where == f"{index}:5"
    kept = load_hints(section("ade20k-hints", tmp_path, skip_bad=True, hint="segm"), "train")
    assert (len(kept), len(kept.faults)) == (3, 1)
    assert kept.faults[0].startswith(f"{index}:5: ")


def test_what_is_no_text_is_named_with_its_line(tmp_path: Path) -> None:
    published(tmp_path, "segm")
    index = tmp_path / "prompt_train_blip.json"
    index.write_bytes(index.read_bytes().replace(b"no 1", "caf\u00e9".encode("latin-1")))
    with pytest.raises(RecipeError, match="it is not UTF-8 text") as caught:
        load_hints(section("ade20k-hints", tmp_path, hint="segm"), "train")
    assert caught.value.where == f"{index}:2"


def test_what_is_not_there_says_what_it_would_be(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no folder") as caught:
        load_hints(section("ade20k-hints", tmp_path / "none", hint="segm"), "train")
    assert "keeper.mpdl.mpg.de" in str(caught.value.hint)
    assert "FOLDER/{train,val}/{color,segm}/<n>.png" in str(caught.value.hint)
    with pytest.raises(RecipeError, match="has no file of prompts for train"):
        load_hints(section("ade20k-hints", tmp_path, hint="segm"), "train")
    published(tmp_path, "segm", count=1)
    (tmp_path / "train/color/0.png").unlink()
    with pytest.raises(RecipeError, match="no sample of train is left"):
        load_hints(section("ade20k-hints", tmp_path, skip_bad=True, hint="segm"), "train")
