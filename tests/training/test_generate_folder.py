"""The folder that makers fill: kept across kills, one manifest a shard, other settings refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ortho_cli.errors import OutputError
from ortho_cli.training.generate_folder import MANIFEST, OutputFolder, read_manifests

HEAD = {"kind": "pictures", "seed": 0, "values": (1, 2)}  # a tuple is a list in JSON, and the same


def fill(folder: Path, names: list[str], shard: tuple[int, int] | None = None) -> OutputFolder:
    opened = OutputFolder(folder, HEAD, shard)
    for name in names:
        line = {"number": int(name[:6])}
        if opened.lacks(name, line):
            opened.write(name, line, lambda path, name=name: path.write_text(name) and None)
    return opened


def test_shards_write_a_manifest_each_and_read_as_one(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    fill(folder, ["000001_0.png", "000003_0.png"], (1, 2))
    fill(folder, ["000000_0.png", "000002_0.png"], (0, 2))
    assert sorted(path.name for path in folder.glob("*.jsonl")) == [
        "manifest-000-of-002.jsonl", "manifest-001-of-002.jsonl",
    ]  # fmt: skip
    assert not OutputFolder(folder, HEAD, (0, 2)).finish(["000000_0.png", "000004_0.png"])
    assert OutputFolder(folder, HEAD, (0, 2)).finish([f"{number:06d}_0.png" for number in range(4)])
    heads, lines = read_manifests(folder)
    head, *own = [json.loads(line) for line in (folder / MANIFEST).read_text().splitlines()]
    assert (head, own) == (heads[0], lines)
    assert heads == [{**HEAD, "values": [1, 2]}] * 3
    assert [line["number"] for line in lines] == [0, 1, 2, 3]
    whole = fill(folder, [f"{number:06d}_0.png" for number in range(5)])
    assert (whole.made, len(whole.skipped)) == (["000004_0.png"], 4)
    assert len(read_manifests(folder)[1]) == 5  # each file once


def test_a_line_that_a_killed_job_did_not_finish_is_written_again(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    fill(folder, ["000000_0.png", "000001_0.png"])
    manifest = folder / MANIFEST
    manifest.write_text(manifest.read_text()[:-5])
    again = fill(folder, ["000000_0.png", "000001_0.png", "000002_0.png"])
    assert again.made == ["000002_0.png"]
    assert [line["number"] for line in read_manifests(folder)[1]] == [0, 1, 2]


def test_a_file_that_was_made_of_something_else_is_refused(tmp_path: Path) -> None:
    opened = fill(tmp_path / "out", ["000001_0.png"])
    with pytest.raises(OutputError, match="made otherwise: number was 1, now 5"):
        opened.lacks("000001_0.png", {"number": 5})


def test_other_settings_are_refused_whichever_shard_had_them(tmp_path: Path) -> None:
    fill(tmp_path / "out", ["000001_0.png"], (1, 2))
    with pytest.raises(OutputError, match="seed was 0, now 7"):
        OutputFolder(tmp_path / "out", {**HEAD, "seed": 7}, (0, 2))
    assert len(list((tmp_path / "out").iterdir())) == 2
